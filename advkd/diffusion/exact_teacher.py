"""The common part of teachers whose denoiser is known in closed form (:mod:`advkd.diffusion.exact`)."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops import philox_normal
from .denoiser import levels_of, require_coordinates, vp_weights
from .guidance import condition_of, require_null
from .prediction import eps_weights
from .sampling import DiffusionModel
from .schedule import Level, Schedule

Sigma = float | torch.Tensor


class ExactTeacher(DiffusionModel):
    """The common part of teachers with a known denoiser: :meth:`x0` of a subclass is their formula. They compute on the CPU.

    Args:
        shape: of a sample.
        schedule: noise schedule; None: linear betas, T = 1000.
        coordinates: of the states of :meth:`predict`, :meth:`score` and :meth:`flow`: ``vp`` (sqrt(a) x0 + sqrt(1 - a) eps) or
            ``ve`` (x0 + sigma eps). Runs of solvers are ``vp`` always.
        num_classes: number of classes; 0 without.
    """

    prediction = "sample"
    clip = math.inf

    def __init__(self, shape: Sequence[int], schedule: Schedule | None = None, coordinates: str = "vp", num_classes: int = 0):
        require_coordinates(coordinates)
        super().__init__(schedule or Schedule.linear(), tuple(shape), dtype=torch.float64)
        self.coordinates = coordinates
        self.num_classes = num_classes
        self.null_class = num_classes if num_classes else None

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Posterior mean of x0 given x = alpha x0 + noise eps.

        Args:
            x: ``(N, ...)`` float64 states.
            alpha: weight of the image, float64, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: ``(N,)`` classes; ``num_classes`` stands for none; None: no class at all.

        Returns:
            ``(N, ...)`` float64.
        """
        raise NotImplementedError

    def predict(
        self, x: torch.Tensor, sigma: Sigma, condition: torch.Tensor | None = None, guidance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means of the image and of the noise at a state.

        Args:
            x: ``(N, ...)`` states in the teacher's coordinates.
            sigma: noise level, a number or ``(N,)``, positive.
            condition: ``(N,)`` classes, ``num_classes`` standing for none; None: no class.
            guidance: ``(N,)`` weights w of classifier-free guidance: x0 is (1 + w) D(x, class) - w D(x); None: none.

        Returns:
            ``(x0, eps)``, both ``(N, ...)`` float64; differentiable in ``x`` (any order).

        Raises:
            InputError: noise levels or classes that cannot be, or guidance of a teacher without classes.
        """
        alpha, noise = self._weights(x, sigma)
        told = condition_of(self, len(x), condition)
        clean = self.x0(x.double(), alpha, noise, told)
        if guidance is not None:
            null = torch.full((len(x),), require_null(self), dtype=torch.int64, device=x.device)
            plain = self.x0(x.double(), alpha, noise, null)
            clean = torch.lerp(plain, clean, 1 + _over(x, guidance.double()))
        e_x, e_m = eps_weights(_over(x, alpha), _over(x, noise), "sample")
        return clean, e_x * x.double() + e_m * clean

    def score(self, x: torch.Tensor, sigma: Sigma, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of the log density of states, -eps / noise (Tweedie's formula).

        Args:
            x: ``(N, ...)`` states in the teacher's coordinates.
            sigma: noise level, a number or ``(N,)``, positive.
            condition: ``(N,)`` classes, or None.

        Returns:
            ``(N, ...)`` float64.
        """
        _, noise = self._weights(x, sigma)
        eps = self.predict(x, sigma, condition)[1]
        return -eps / _over(x, noise)

    def log_probability_gradient(self, x: torch.Tensor, alpha_bar: float | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Gradient by the state of log p(class | x_t), the exact classifier's: the classes' scores less the data's.

        Args:
            x: ``(N, ...)`` variance-preserving states.
            alpha_bar: of the states, a number or ``(N,)``.
            labels: ``(N,)`` classes.

        Returns:
            ``(N, ...)`` float64.
        """
        a = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x.device)
        alpha, noise = (w.reshape(-1, 1) if w.ndim else w for w in (a.sqrt(), (1 - a).sqrt()))
        x = x.double()
        difference = self.x0(x, alpha, noise, condition_of(self, len(x), labels)) - self.x0(x, alpha, noise)
        return difference * _over(x, alpha / noise**2)

    def data(self, n: int, seed: int = 0) -> torch.Tensor:
        """Samples of the data itself.

        Args:
            n: number of samples.
            seed: of the draws, in [0, 2^64).

        Returns:
            ``(n, ...)`` float64.
        """
        raise NotImplementedError

    def noise_power(self, level: Level) -> float:
        """E|eps|^2 / d of the noise that the denoiser finds at a level, by 4,096 draws.

        Args:
            level: level of the states.

        Returns:
            Mean over draws and dimensions, in [0, 1].
        """
        x0, eps = self.data(4096), self.noise(4096)
        alpha, noise = torch.tensor((level.alpha, level.noise), dtype=torch.float64, device=self.device)
        x = alpha * x0 + noise * eps
        return ((x - alpha * self.x0(x, alpha, noise)) / noise).square().mean().item()

    def _network(self, compiled: bool = False) -> Any:
        return lambda x, place, labels=None: self.x0(x, place.alpha, place.noise, labels)

    def _weights(self, x, sigma):
        sigma = levels_of(x, sigma).reshape(-1, 1)
        return (torch.ones_like(sigma), sigma) if self.coordinates == "ve" else vp_weights(sigma)

    def _normal(self, n, seed, shape, draw):
        """Normal numbers for the data, from the end of the stream: noise by timestep is at its beginning."""
        return philox_normal(seed, range(n), shape, stream="x_T", step=2**24 - draw).double()


def _over(x, weight):
    """A weight, a scalar or ``(N, 1)``, in a shape that multiplies states."""
    return weight.reshape(-1, *[1] * (x.ndim - 1)) if weight.ndim else weight
