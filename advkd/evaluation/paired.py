"""Frechet distances of several sets with intervals of their differences: sets of one start noise share their luck.

Image i of every set comes from the same start noise, so that a bootstrap draws the same rows of all sets, and of the reference,
at once: what the noise does to all of them cancels in the differences.
"""

from dataclasses import dataclass

import torch

from ..errors import InputError
from .feature_sets import require_bootstrap
from .metrics import frechet_at_infinity, frechet_distance
from .resampling import recentred_interval, rows_generator


@dataclass(frozen=True)
class Compared:
    """A set's distance to the reference, and how it differs from the baseline's.

    Attributes:
        num: images of the set.
        frechet: Frechet distance at this number.
        frechet_interval: its 95 % interval.
        at_infinity: distance extrapolated to infinitely many images.
        at_infinity_interval: its 95 % interval.
        difference: ``frechet`` less that of the baseline's first ``num`` images.
        difference_interval: 95 % interval of the difference, rows drawn together.
    """

    num: int
    frechet: float
    frechet_interval: list[float]
    at_infinity: float
    at_infinity_interval: list[float]
    difference: float
    difference_interval: list[float]


def compare_paired(
    sets: dict[str, torch.Tensor], reference: torch.Tensor, baseline: str, resamples: int = 100, seed: int = 0
) -> dict[str, Compared]:
    """Distances of sets of features to one reference, with paired intervals.

    Args:
        sets: features ``(N, D)`` by name; row i of every set belongs to one start noise. N may differ.
        reference: ``(M, D)``.
        baseline: name of the set that differences are to; it has at least as many rows as the others.
        resamples: bootstrap draws, at least 20.
        seed: determines draws and subsets.

    Returns:
        A :class:`Compared` for every set.

    Raises:
        InputError: a baseline that is not among the sets or is shorter than one of them, or too few resamples.
    """
    require_bootstrap(resamples, 0.95)
    if baseline not in sets:
        raise InputError(f"baseline must be one of {', '.join(sets)}, got {baseline!r}")
    for name, features in sets.items():
        if len(features) > len(sets[baseline]):
            raise InputError(f"{name} has {len(features)} images, more than the baseline {baseline} with {len(sets[baseline])}")
    draws = {num: _Draws(sets[baseline][:num], reference, resamples, seed) for num in {len(f) for f in sets.values()}}
    return {name: _compared(features, reference, draws[len(features)], seed) for name, features in sets.items()}


class _Draws:
    """The rows of a bootstrap for sets of one length, and the baseline's distances at each draw."""

    def __init__(self, baseline, reference, resamples, seed):
        generator = rows_generator(seed)
        sizes = len(baseline), len(reference)
        self.rows = [[torch.randint(size, (size,), generator=generator) for size in sizes] for _ in range(resamples)]
        self.measured = frechet_distance(baseline, reference)
        self.distances = [frechet_distance(baseline[rows], reference[others]) for rows, others in self.rows]


def _compared(features, reference, draws, seed):
    measured = frechet_distance(features, reference)
    limit = frechet_at_infinity(features, reference, seed=seed)["value"]
    distances, limits = [], []
    for draw, (rows, others) in enumerate(draws.rows):
        pair = features[rows], reference[others]
        distances.append(frechet_distance(*pair))
        limits.append(frechet_at_infinity(*pair, points=4, subsets=1, seed=draw)["value"])
    difference = measured - draws.measured
    return Compared(
        len(features),
        measured,
        recentred_interval(distances, measured, 0.95),
        limit,
        recentred_interval(limits, limit, 0.95),
        difference,
        recentred_interval([a - b for a, b in zip(distances, draws.distances, strict=True)], difference, 0.95),
    )
