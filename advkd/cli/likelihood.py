"""``advkd evaluate --likelihood``: its options, and those that do not go with it."""

from typing import Any

from ..config import overlay
from ..errors import InputError

LIKELIHOOD = (
    "Bound the teacher's negative log-likelihood of --images (a folder, or 'digits', the default) in bits per dimension. "
    "By default --num 96, all steps and --seed 0: about five minutes on two cores for the embedded teacher; time grows with "
    "both numbers. A killed run goes on, and a larger --num adds to a smaller one."
)
"""Help of the option."""

TAKEN = ("num", "seed", "steps", "variance")
"""Options that are fields of the likelihood's configuration; teacher, images and out are its arguments."""


def measure_likelihood(teacher: str | None, images: str | None, out: str | None, device: str, options: dict[str, Any]) -> str:
    """Evaluate a teacher's likelihood.

    Args:
        teacher: source of the teacher; None: ``digits``.
        images: ``digits`` or a folder; None: ``digits``.
        out: folder for ``likelihood.json``.
        device: torch device.
        options: the other options of the command by name; those that were not given are None.

    Returns:
        The result as a line of text.

    Raises:
        InputError: an option that does not go with ``--likelihood``, or no ``out``.
    """
    from ..evaluation.evaluate_likelihood import LikelihoodConfig, describe, evaluate_likelihood

    given = [name for name, value in options.items() if value is not None and name not in TAKEN]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} does not go with --likelihood")
    if out is None:
        raise InputError("--out is missing: name a folder for likelihood.json")
    config = overlay(LikelihoodConfig(), {name: options[name] for name in TAKEN}, "evaluate --likelihood")
    return describe(evaluate_likelihood(teacher or "digits", images or "digits", config, out, device))
