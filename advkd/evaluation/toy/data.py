"""Data sets of the plane with exact teachers, and measures of samples by their modes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.exact import MixtureTeacher
from ...diffusion.schedule import Schedule

SCHEDULE = Schedule.edm(1000, 0.01, 20.0)
"""Noise levels from a third of a Gaussian's deviation on; equal shares of the timesteps are those of Karras et al. 2022."""
REACH = 3.0
"""Deviations from the nearest centre within which a point is one of the data's."""
FAIR = 0.5
"""Share of its weight that a mode must have among samples to be kept."""


class Unlabelled(MixtureTeacher):
    """A mixture that is told no class, with the components of another one.

    Args:
        mixture: the other one.
    """

    def __init__(self, mixture: MixtureTeacher):
        super().__init__(mixture.means, mixture.weights, mixture.variance, mixture.schedule)
        self.num_classes, self.null_class = 0, None


@dataclass(frozen=True)
class ToyData:
    """A mixture of narrow Gaussians of about unit variance.

    Attributes:
        name: a key of :data:`DATA`.
        teacher: the exact teacher, told no class.
        guide: the same, told classes.
        modes: ``(K,)`` mode of every component; a mode of the moons is a stretch of an arc.
        what: a mode, in words.
        classes: a class, in words.
    """

    name: str
    teacher: Unlabelled
    guide: MixtureTeacher
    modes: Tensor
    what: str
    classes: str

    @property
    def deviation(self) -> float:
        """Deviation of a component."""
        return math.sqrt(self.teacher.variance)

    @property
    def total(self) -> int:
        """Number of modes."""
        return int(self.modes.max()) + 1

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The component with the nearest centre.

        Args:
            x: ``(N, 2)`` points.

        Returns:
            Distances to its centre in deviations, and its number, both ``(N,)``.
        """
        distance, component = torch.cdist(x.double(), self.teacher.means).min(dim=1)
        return distance / self.deviation, component

    def labels(self, x: Tensor) -> Tensor:
        """Classes ``(N,)`` of points ``(N, 2)``, those of their nearest components."""
        return self.guide.labels[self.nearest(x)[1]]

    def measured(self, x: Tensor) -> dict[str, float]:
        """Fidelity and diversity of samples.

        Args:
            x: ``(N, 2)`` samples.

        Returns:
            ``within``: share within :data:`REACH` deviations of a centre; ``modes``: share of the modes that have at least
            :data:`FAIR` of their weight there; ``width``: deviation of those with one nearest centre from their own mean, over
            that of the data's; ``spread``: root mean square distance of all samples from their mean, over that of the data.
        """
        distance, component = self.nearest(x)
        near = distance <= REACH
        weights = torch.zeros(self.total).double().index_add(0, self.modes, self.teacher.weights)
        counts = torch.bincount(self.modes[component[near]], minlength=len(weights))
        own = self.teacher.data(2**13, seed=2**40)
        return {
            "within": near.double().mean().item(),
            "modes": (counts >= FAIR * weights * len(x)).double().mean().item(),
            "width": self._width(x) / self._width(own),
            "spread": _spread(x) / _spread(own),
        }

    def _width(self, x):
        """Deviation of points within reach of a centre from the mean of those that share it; a lone point has none."""
        distance, component = self.nearest(x)
        near = distance <= REACH
        x, (_, component) = x[near].double(), torch.unique(component[near], return_inverse=True)
        count = torch.bincount(component)
        means = torch.zeros(len(count), 2).double().index_add(0, component, x) / count[:, None]
        squares = (x - means[component]).square().sum()
        return (squares / max(len(x) - len(count), 1)).sqrt().item()

    def density(self, x: Tensor) -> Tensor:
        """Density of the data.

        Args:
            x: ``(N, 2)`` points.

        Returns:
            ``(N,)`` float64.
        """
        variance = self.teacher.variance
        exponents = -torch.cdist(x.double(), self.teacher.means).square() / (2 * variance)
        return exponents.exp() @ self.teacher.weights / (2 * math.pi * variance)


def _spread(x):
    """Root mean square distance of points from their mean."""
    return x.double().var(dim=0, correction=0).sum().sqrt().item()


def _grid():
    """A grid of 5 x 5, its spacing 20 deviations."""
    preset = MixtureTeacher.from_preset("25-gaussians")
    scale = preset.means.square().mean().sqrt()
    columns = torch.arange(25) // 5
    variance = preset.variance / scale.item() ** 2
    guide = MixtureTeacher(preset.means / scale, preset.weights, variance, SCHEDULE, labels=columns)
    return ToyData("25-gaussians", Unlabelled(guide), guide, torch.arange(25), "Gaussian", "column of the grid")


def _moons(number=48, stretches=8, deviation=0.07):
    """Two half circles, each a row of Gaussians less than two deviations apart, in stretches of six."""
    angle = torch.linspace(0, math.pi, number, dtype=torch.float64)
    upper, lower = ((angle.cos(), angle.sin()), (1 - angle.cos(), 0.5 - angle.sin()))
    means = torch.cat([torch.stack(arc, dim=1) for arc in (upper, lower)])
    means = means - means.mean(0)
    means = means / means.square().mean().sqrt()
    component = torch.arange(2 * number)
    guide = MixtureTeacher(means, [1.0] * (2 * number), deviation**2, SCHEDULE, labels=component // number)
    return ToyData("two-moons", Unlabelled(guide), guide, component // (number // stretches), "stretch of a moon", "moon")


DATA: dict[str, Callable[[], ToyData]] = {"25-gaussians": _grid, "two-moons": _moons}
"""Name -> function that makes a data set."""
