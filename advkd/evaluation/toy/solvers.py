"""Every solver on an exact teacher: its error against the flow, the samples of whole runs, and paths."""

import numpy as np

from ...diffusion.solvers import METHODS, Solver
from .laboratory import EXACT, FRESH, Laboratory, Outcome

COUNTS = (8, 16, 32, 64, 128, 256)
"""Network evaluations at which errors are measured."""
FITTED = 3
"""The last so many of them give the slope, where errors follow their leading term."""
WHOLE = (4, 8, 16, 32, 64)
"""Network evaluations of whole runs, at most."""
POINTS = 128
"""Start noises of the errors."""
REFERENCE = "dpm-3", 500
"""Solver and steps in the flow's place."""
SHOWN = {"ddim": 8, "heun": 8, "unipc-3": 8, "euler-maruyama": 64}
"""Solver -> steps of its paths."""
ANCESTRAL = (100, 500)
"""Steps of DDPM."""


def solvers(lab: Laboratory) -> Outcome:
    """Errors of the deterministic solvers, samples of all by evaluations, and the paths of some.

    Args:
        lab: of the data set.

    Returns:
        Outcome whose numbers are ``order``, ``{solver: [evaluations, errors, slope]}``, and ``whole``, ``{solver:
        [evaluations, shares within three deviations]}``.
    """
    outcome, wanted = shown(lab), _before_the_image(lab, *REFERENCE)
    deterministic = [name for name, method in METHODS.items() if method.order]
    outcome.numbers["order"] = {name: _errors(lab, name, wanted) for name in deterministic}
    outcome.numbers["whole"] = {name: _shares(lab, name) for name in METHODS}
    return outcome


def shown(lab: Laboratory) -> Outcome:
    """Samples and paths of some solvers.

    Args:
        lab: of the data set.
    """
    outcome = Outcome()
    for name, steps in SHOWN.items():
        lab.draw(outcome, f"{name}, steps: {steps}", lab.teacher, Solver(name, "trailing"), steps)
    return outcome


def ddpm_title(steps: int) -> str:
    """Title of the exact teacher's samples by DDPM."""
    return f"DDPM, steps: {steps}"


def exact_teacher(lab: Laboratory) -> Outcome:
    """Points of the data, with the flow's paths; and DDPM with many steps.

    Args:
        lab: of the data set.
    """
    outcome = Outcome()
    lab.draw(outcome, EXACT, lab.teacher, "unipc-2", 40)
    for steps in ANCESTRAL:
        lab.draw(outcome, ddpm_title(steps), lab.teacher, Solver("ddpm", "trailing"), steps)
    return outcome


def _before_the_image(lab, name, steps):
    """States at the lowest noise level: the step to the image is one of first order for most solvers."""
    z = lab.teacher.noise(POINTS, FRESH + lab.seed)
    *_, (_, x), _ = lab.teacher.path(z, Solver(name, "log_snr"), steps)
    return x


def _errors(lab, name, wanted):
    """Evaluations, median distances from the flow, and the fitted order."""
    each, counts, found = METHODS[name].evaluations, [], []
    for count in COUNTS:
        steps = count // each
        if steps + 1 < METHODS[name].least:
            continue
        counts.append(steps * each)
        error = (_before_the_image(lab, name, steps + 1) - wanted).norm(dim=1).median().item()
        found.append(max(error, 1e-16))
    return [counts, found, fitted_order(counts, found)]


def fitted_order(counts: list[int], errors: list[float]) -> float:
    """Least-squares slope of -log error by log count, over the last :data:`FITTED` of them.

    Args:
        counts: network evaluations.
        errors: after them.

    Returns:
        The order.
    """
    return float(-np.polyfit(np.log(counts[-FITTED:]), np.log(errors[-FITTED:]), 1)[0])


def _shares(lab, name):
    counts, shares = [], []
    for count in WHOLE:
        steps = 1 + (count - 1) // METHODS[name].evaluations
        if steps < METHODS[name].least:
            continue
        solver = Solver(name, "trailing")
        points = lab.teacher.sample(min(lab.num, 1024), FRESH + lab.seed, solver, steps)
        counts.append(solver.evaluations(steps))
        shares.append(lab.data.measured(points)["within"])
    return [counts, shares]
