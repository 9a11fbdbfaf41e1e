"""Frechet distances of several sets with intervals of their differences: sets of one start noise share their luck.

Image i of every set comes from the same start noise, so that a bootstrap draws the same rows of all sets, and of the reference,
at once: what the noise does to all of them cancels in the differences.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .feature_sets import require_bootstrap
from .metrics import frechet_at_infinity, frechet_distance
from .resampling import recentred_interval, rows_generator


@dataclass(frozen=True)
class Resampled:
    """A measured value, and its values at the draws of a bootstrap; differences are taken draw by draw.

    Attributes:
        value: measured on the sets as they are.
        draws: values at each draw, in their order.
    """

    value: float
    draws: list[float]

    @property
    def interval(self) -> list[float]:
        """Its 95 % interval, ``[low, high]``."""
        return recentred_interval(self.draws, self.value, 0.95)

    def __sub__(self, other: "Resampled") -> "Resampled":
        return Resampled(self.value - other.value, [a - b for a, b in zip(self.draws, other.draws, strict=True)])

    def __truediv__(self, unit: float) -> "Resampled":
        return Resampled(self.value / unit, [draw / unit for draw in self.draws])

    @classmethod
    def median(cls, several: Sequence["Resampled"]) -> "Resampled":
        """The median of several values, and of their values at each draw.

        Args:
            several: values of the same draws, one or more.
        """
        draws = [statistics.median(values) for values in zip(*(one.draws for one in several), strict=True)]
        return cls(statistics.median(one.value for one in several), draws)


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
    rows = {num: paired_rows(num, len(reference), resamples, seed) for num in {len(features) for features in sets.values()}}
    bases = {num: resampled_frechet(sets[baseline][:num], reference, drawn) for num, drawn in rows.items()}
    return {name: _compared(f, reference, rows[len(f)], bases[len(f)], seed) for name, f in sets.items()}


def paired_rows(num: int, others: int, resamples: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that a bootstrap draws of all sets of one length, and of their reference.

    Args:
        num: rows of each set.
        others: rows of the reference.
        resamples: number of draws.
        seed: determines the draws.

    Returns:
        ``(rows of the sets (num,), rows of the reference (others,))`` of every draw, int64.
    """
    generator = rows_generator(seed)

    def drawn(size):
        return torch.randint(size, (size,), generator=generator, dtype=torch.int64, device="cpu")

    return [(drawn(num), drawn(others)) for _ in range(resamples)]


def resampled_frechet(
    features: torch.Tensor, reference: torch.Tensor, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Resampled:
    """The Frechet distance of a set, and at every draw.

    Args:
        features: ``(N, D)``.
        reference: ``(M, D)``.
        rows: of :func:`paired_rows`.

    Returns:
        A :class:`Resampled`.
    """
    drawn = [frechet_distance(features[own], reference[others]) for own, others in rows]
    return Resampled(frechet_distance(features, reference), drawn)


def resampled_limit(
    features: torch.Tensor, reference: torch.Tensor, rows: Sequence[tuple[torch.Tensor, torch.Tensor]], seed: int = 0
) -> Resampled:
    """The Frechet distance of a set at infinity, and at every draw, with the same subsets for all sets of a length.

    Args:
        features: ``(N, D)``, N at least D + 2.
        reference: ``(M, D)``, M at least D + 2.
        rows: of :func:`paired_rows`.
        seed: determines the subsets of the sets themselves.

    Returns:
        A :class:`Resampled`.
    """
    drawn = [
        frechet_at_infinity(features[own], reference[others], points=4, subsets=1, seed=draw)["value"]
        for draw, (own, others) in enumerate(rows)
    ]
    return Resampled(frechet_at_infinity(features, reference, seed=seed)["value"], drawn)


def _compared(features, reference, rows, base, seed):
    distance, limit = resampled_frechet(features, reference, rows), resampled_limit(features, reference, rows, seed)
    difference = distance - base
    figures = (distance, limit, difference)
    return Compared(len(features), *(figure for one in figures for figure in (one.value, one.interval)))
