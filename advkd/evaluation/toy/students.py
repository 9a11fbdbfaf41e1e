"""Small networks of points of the plane: denoisers that give v, generators, score networks; and a denoiser as a model."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion.denoiser import Denoiser
from ...diffusion.sampling import DiffusionModel
from ...diffusion.schedule import Schedule
from ...models.optimised_images import OptimisedImages

WIDTH, DEPTH = 128, 3
"""Units of a hidden layer, and hidden layers."""
WAVES = 2.0 ** torch.arange(4)
"""Frequencies at which times and places are embedded."""


class ToyNetwork(nn.Module):
    """v of a point at a timestep, by a perceptron of the point's, the time's and the condition's embeddings.

    Args:
        timesteps: of the schedule.
        classes: classes that it is told, the null class among them (0: none).
        guidance: largest guidance weight that it is told beside them (0: none).
        latent: numbers of the latent that it is told (0: none).
    """

    def __init__(self, timesteps: int, classes: int = 0, guidance: float = 0.0, latent: int = 0):
        super().__init__()
        self.timesteps, self.classes, self.guidance = timesteps, classes, guidance
        self.layers = perceptron(3 * (1 + 2 * len(WAVES)) + classes + (guidance > 0) + latent)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: ``(N, 2)`` variance-preserving states.
            t: ``(N,)`` timesteps.
            condition: ``(N,)`` classes, ``(N, k)`` of :func:`advkd.models.denoiser.pack`, or None.

        Returns:
            ``(N, 2)``.
        """
        parts = [embedded(torch.cat((x, 2 * t.to(x)[:, None] / self.timesteps - 1), dim=1))]
        if condition is not None:
            told = condition.reshape(len(x), -1)
            if self.classes:
                parts.append(nn.functional.one_hot(told[:, 0].round().long(), self.classes).to(x))
                told = told[:, 1:] / (self.guidance or 1.0)
            parts.append(told.to(x))
        return self.layers(torch.cat(parts, dim=1))


class PointsAsImages(nn.Module):
    """A network of points for images of two channels and one pixel, which critics take.

    Args:
        network: module of states, timesteps and a condition.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The network's output ``(N, 2, 1, 1)`` at states of that shape."""
        return self.network(x.flatten(1), t, condition)[:, :, None, None]


class ToyCritic(nn.Module):
    """Scores of points beside a condition, by a perceptron of layers that the fused update takes.

    Args:
        condition: numbers of the condition.
    """

    def __init__(self, condition: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), perceptron(2 + condition, 1, nn.LeakyReLU(0.2)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Scores ``(N,)`` of points ``(N, 2, 1, 1)`` and conditions ``(N, condition, 1, 1)``."""
        return self.layers(torch.cat((x, condition), dim=1)).squeeze(1)


class ToyGenerator(nn.Module):
    """A point from noise in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron(2 * (1 + 2 * len(WAVES)))

    def forward(self, z: Tensor) -> Tensor:
        """Points ``(N, 2)`` of standard normal numbers ``(N, 2)``."""
        return self.layers(embedded(z))


class ToyScore(nn.Module):
    """Posterior mean by a network that gives v, the output that an exact teacher has.

    Args:
        network: module of states, timesteps and a condition; it is copied.
        schedule: the noise schedule.
    """

    def __init__(self, network: nn.Module, schedule: Schedule):
        super().__init__()
        self.network, self._schedule = copy.deepcopy(network), schedule

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x0 ``(N, 2)`` at states ``(N, 2)`` and timesteps ``(N,)``."""
        denoiser = Denoiser(self.network, self._schedule, "v_prediction")
        return denoiser.predict(x, self._schedule.sigma(t), condition)[0]


class ToyPoints(OptimisedImages):
    """Points that are their own parameters."""

    spread = 1.0

    def forward(self, numbers: Tensor) -> Tensor:
        """Some of the points; see :class:`~advkd.models.optimised_images.OptimisedImages`."""
        return self.values[numbers]


class ToyModel(DiffusionModel):
    """A denoiser of points as a diffusion model, on which all solvers run.

    Args:
        network: module that gives v.
        schedule: the noise schedule.
        classes: classes that it is told, without the null class, the last one.
        guidance: largest guidance weight that it is told.
        latent: numbers of the latent that it is told.
    """

    prediction = "v_prediction"
    clip = math.inf

    def __init__(self, network: nn.Module, schedule: Schedule, classes: int = 0, guidance: float = 0.0, latent: int = 0):
        super().__init__(schedule, (2,))
        self.latent = latent
        self.network, self.num_classes, self.most_guidance = network.eval(), classes, guidance
        self.null_class = classes or None

    def predict(self, x: Tensor, sigma: float | Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Posterior means of the point and of the noise; see :meth:`advkd.diffusion.denoiser.Denoiser.predict`."""
        return Denoiser(self.network, self.schedule, "v_prediction").predict(x, sigma, condition)

    def _network(self, compiled: bool = False) -> Any:
        return lambda x, place, labels=None: self.network(x, place.t.float().expand(len(x)), labels)


def perceptron(inputs: int, outputs: int = 2, activation: nn.Module | None = None) -> nn.Sequential:
    """A perceptron.

    Args:
        inputs: numbers of a sample.
        outputs: numbers that it gives.
        activation: between its layers (None: SiLU).

    Returns:
        Module of ``(N, inputs)``, with :data:`DEPTH` hidden layers of :data:`WIDTH` units.
    """
    sizes, layers = [inputs, *[WIDTH] * DEPTH], []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), activation or nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def embedded(numbers: Tensor) -> Tensor:
    """Numbers with their sines and cosines at :data:`WAVES`.

    Args:
        numbers: ``(N, k)``, of about unit size.

    Returns:
        ``(N, k (1 + 2 waves))``.
    """
    angles = (numbers[:, :, None] * WAVES.to(numbers)).flatten(1)
    return torch.cat((numbers, angles.sin(), angles.cos()), dim=1)
