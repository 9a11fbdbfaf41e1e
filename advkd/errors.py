"""The errors a user of advkd is expected to meet."""


class InputError(ValueError):
    """An argument, a file or a combination of options that cannot work; the message names it and the remedy.

    The command line prints the message alone and ends with exit code 2.
    """


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name and cannot run here; the message gives the reason.

    With ``backend="auto"`` the next best backend runs instead, in the end the reference. The command line prints the message
    alone and ends with exit code 2.
    """


class TrainingError(RuntimeError):
    """A training run that cannot go on (a loss that is not finite); the last good checkpoint is kept.

    Work whose processes were ended raises it too, and keeps what they finished. The command line prints the message
    alone and ends with exit code 1.
    """
