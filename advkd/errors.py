"""The errors a user of advkd is expected to meet."""


class InputError(ValueError):
    """An argument, a file or a combination of options that cannot work; the message names it and the remedy."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name and cannot run here; the message gives the reason."""


class TrainingError(RuntimeError):
    """A training run that cannot go on (a loss that is not finite); the last good checkpoint is kept."""
