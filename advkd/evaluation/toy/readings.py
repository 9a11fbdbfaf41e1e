"""One line of text for each picture, computed from its measures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import ToyData
from .laboratory import Outcome
from .methods import LEVELS
from .solvers import COUNTS, WHOLE

COLLAPSED, SHARP, SPREAD = 0.25, 0.9, 1.25
"""Spread or width below which samples have collapsed, share within three deviations from which they are sharp, and width above
which they are blurred."""
JUDGED = 0.05
"""Least share within three deviations whose width says something of the samples."""


@dataclass(frozen=True)
class Measured:
    """Measures of one picture.

    Attributes:
        name: its row.
        title: its title.
        evaluations: network evaluations of a sample.
        found: of :meth:`~advkd.evaluation.toy.data.ToyData.measured`.
    """

    name: str
    title: str
    evaluations: int
    found: dict[str, float]


def samples_reading(data: ToyData, samples: Mapping[str, Tensor]) -> str:
    """Modes and shares of every picture, and a verdict on the last one.

    Args:
        data: the data set.
        samples: title -> points ``(N, 2)``.
    """
    measured = {title: data.measured(points) for title, points in samples.items()}
    parts = [f"{title}: {facts(data, found)}" for title, found in measured.items()]
    return f"{'; '.join(parts)}. The last one {verdict(data, list(measured.values())[-1])}."


def guided_reading(data: ToyData, outcome: Outcome) -> str:
    """Shares of samples in the class that was asked for, and within three deviations.

    Args:
        data: the data set.
        outcome: of guided distillation.
    """
    said = []
    for title, points in outcome.samples.items():
        found = data.measured(points)
        said.append(f"{title}: {outcome.numbers[title]:.0%}, {found['within']:.0%}, {found['width']:.2f}")
    return f"Samples in the {data.classes} that was asked for, those within, and their width: {'; '.join(said)}."


def facts(data: ToyData, found: dict[str, float]) -> str:
    """Modes, share and width as text.

    Args:
        data: the data set.
        found: of :meth:`~advkd.evaluation.toy.data.ToyData.measured`.
    """
    kept = round(found["modes"] * data.total)
    shares = f"{found['within']:.0%} within, width {found['width']:.2f}, spread {found['spread']:.2f}"
    return f"{kept} of {data.total} modes, {shares}"


def verdict(data: ToyData, found: dict[str, float]) -> str:
    """A judgement of samples by their measures.

    Args:
        data: the data set.
        found: of :meth:`~advkd.evaluation.toy.data.ToyData.measured`.
    """
    lost = data.total - round(found["modes"] * data.total)
    said = [f"loses {lost} of {data.total} modes" if lost else "keeps every mode"]
    if found["spread"] < COLLAPSED:
        said.append(f"has collapsed to one place, {found['spread']:.2f} of the data's spread")
    elif found["within"] >= JUDGED and found["width"] < COLLAPSED:
        said.append(f"has collapsed to {found['width']:.2f} of the data's width")
    if found["within"] < SHARP:
        said.append(f"leaves {1 - found['within']:.0%} of the samples between the modes")
    elif found["width"] > SPREAD:
        said.append("is blurred")
    return " and ".join(said)


def order_reading(outcome: Outcome) -> str:
    """The steepest and the flattest solver.

    Args:
        outcome: of :func:`~advkd.evaluation.toy.solvers.solvers`.
    """
    slopes = {name: slope for name, (_, _, slope) in outcome.numbers["order"].items()}
    last = {name: errors[-1] for name, (_, errors, _) in outcome.numbers["order"].items()}
    (flattest, steepest), nearest = _ends(slopes), _ends(last)[0]
    return (
        f"Fitted orders reach from {slopes[flattest]:.2f} ({flattest}) to {slopes[steepest]:.2f} ({steepest}). With about "
        f"{COUNTS[-1]} evaluations {nearest} is nearest to the flow, {last[nearest]:.1e} away, and ddim {last['ddim']:.1e}."
    )


def whole_reading(outcome: Outcome) -> str:
    """The solvers that are best and worst with few evaluations and with many.

    Args:
        outcome: of :func:`~advkd.evaluation.toy.solvers.solvers`.
    """
    parts = []
    for count in (WHOLE[1], WHOLE[-1]):
        shares = {name: _at_most(count, *values) for name, values in outcome.numbers["whole"].items() if name != "consistency"}
        worst, best = _ends(shares)
        parts.append(f"with at most {count} evaluations {best} has {shares[best]:.0%}, {worst} {shares[worst]:.0%}")
    told = outcome.numbers["whole"]["consistency"][1][-1]
    return (
        f"Shares of samples within three deviations: {'; '.join(parts)}. consistency, which expects a consistency function and "
        f"is given posterior means here, has {told:.0%}."
    )


def paths_reading(outcome: Outcome) -> str:
    """How far paths are from straight.

    Args:
        outcome: with paths.
    """
    said = ", ".join(f"{title}: {bends(paths):.2f}" for title, paths in outcome.paths.items())
    return f"Mean length of the paths over the distance of their ends, {said}; 1 is straight."


def bends(paths: Tensor) -> float:
    """Length of paths over the distance between their ends, both summed over paths.

    Args:
        paths: ``(steps + 1, n, 2)``.

    Returns:
        1 for straight ones.
    """
    length = paths.diff(dim=0).norm(dim=2).sum()
    return (length / (paths[-1] - paths[0]).norm(dim=1).sum()).item()


def straightness_reading(found: dict[str, float]) -> str:
    """Order of flows by straightness.

    Args:
        found: S by title.
    """
    ordered = sorted(found, key=found.__getitem__)
    said = ", then ".join(f"{title} ({found[title]:.3g})" for title in ordered)
    return f"S = E int |x - z - u|^2 d tau, 0 for straight paths; the straightest is {said}."


def score_reading(errors: list[float]) -> str:
    """Where the v network's noise is nearest to the exact one, and furthest from it.

    Args:
        errors: root mean squares by the levels of :data:`~advkd.evaluation.toy.methods.LEVELS`.
    """
    levels = range(len(errors))
    best, worst = min(levels, key=errors.__getitem__), max(levels, key=errors.__getitem__)
    return (
        f"The v network's noise is {errors[worst]:.2g} from the exact one at sigma {LEVELS[worst]:.2g}, at most, and "
        f"{errors[best]:.2g} at sigma {LEVELS[best]:.2g}, at least."
    )


def arrows_reading(found: Mapping[float, tuple[Tensor, Tensor, Tensor]]) -> str:
    """Angles between learned and exact scores.

    Args:
        found: of :func:`~advkd.evaluation.toy.pictures.arrows` by noise level.
    """
    said = []
    for sigma, (_, exact, learned) in found.items():
        cosine = torch.nn.functional.cosine_similarity(exact, learned, dim=1).clamp(-1, 1)
        said.append(f"{cosine.arccos().rad2deg().median():.1f} degrees at sigma {sigma:g}")
    return f"Median angle between learned and exact scores on the grid: {', '.join(said)}."


def two_scores_reading(outcome: Outcome, what: str) -> str:
    """Error of q beside the signal that the generator follows, and beside what points can tell.

    Args:
        outcome: of a method with two scores.
        what: the method.
    """
    errors, floor, signal = (outcome.numbers[name] for name in ("errors", "floor", "signal"))
    seen = sum(error > least for error, least in zip(errors, floor, strict=True))
    shares = [error / most for error, most in zip(errors, signal, strict=True)]
    return (
        f"{what}: q's error is {min(shares):.0%} to {max(shares):.0%} of the signal, and above the difference that two sets of "
        f"the generator's points have at {seen} of {len(LEVELS)} levels."
    )


def summary_reading(data: ToyData, measured: list[Measured]) -> str:
    """The row that is best in one evaluation: the lesser of its shares of good samples and of modes is the greatest.

    Args:
        data: the data set.
        measured: of students.
    """
    one = {row.name: row.found for row in measured if row.evaluations == 1}
    if not one:
        return "No method that was chosen draws in one evaluation."
    worst, best = _ends({name: min(found["within"], found["modes"]) for name, found in one.items()})
    return (
        f"In one evaluation {best} is best in the lesser of both shares ({facts(data, one[best])}), and {worst} last "
        f"({facts(data, one[worst])})."
    )


def _ends(values):
    """Names of the least and of the greatest value."""
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def _at_most(count, evaluations, shares):
    """The share of the longest run of at most ``count`` evaluations; 0 without one."""
    return max((pair for pair in zip(evaluations, shares, strict=True) if pair[0] <= count), default=(0, 0.0))[1]
