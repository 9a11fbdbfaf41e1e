"""Teachers whose denoiser is known in closed form: a laboratory in which samplers and distillation methods can be proved.

Data are Gaussian, a mixture of Gaussians, or a finite set of images; the posterior mean E[x0 | x_t] at every noise level is
then a formula, and a solver's error, a sampler's marginals or a student's optimum can be compared with what they must be.
Teachers compute in float64 with the solvers' own programs (:mod:`advkd.diffusion.solvers`), and take the place of
:class:`advkd.Teacher` wherever its interface is used.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..ops import philox_normal
from .prediction import eps_weights
from .sampling import DiffusionModel
from .schedule import Level, Schedule

Sigma = float | torch.Tensor


class ExactTeacher(DiffusionModel):
    """The common part of teachers with a known denoiser: :meth:`x0` of a subclass is their formula.

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
        if coordinates not in ("vp", "ve"):
            raise InputError(f"coordinates must be vp or ve, got {coordinates!r}")
        super().__init__(schedule or Schedule.linear(), tuple(shape), dtype=torch.float64)
        self.coordinates = coordinates
        self.num_classes = num_classes
        self.null_class = num_classes if num_classes else None

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
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
        self, x: torch.Tensor, sigma: Sigma, condition: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means of the image and of the noise at a state.

        Args:
            x: ``(N, ...)`` states in the teacher's coordinates.
            sigma: noise level, a number or ``(N,)``, positive.
            condition: ``(N,)`` classes, or None.

        Returns:
            ``(x0, eps)``, both ``(N, ...)`` float64; differentiable in ``x`` (any order).
        """
        alpha, noise = self._weights(x, sigma)
        clean = self.x0(x.double(), alpha, noise, condition)
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
        difference = self.x0(x, alpha, noise, labels) - self.x0(x, alpha, noise)
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
        x0 = self.data(4096, seed=1)
        eps = philox_normal(2, torch.arange(len(x0)), self.shape, stream="x_T").double()
        alpha, noise = torch.tensor(level.alpha).double(), torch.tensor(level.noise).double()
        x = alpha * x0 + noise * eps
        return ((x - alpha * self.x0(x, alpha, noise)) / noise).square().mean().item()

    def _network(self, compiled: bool = False) -> Any:
        return lambda x, place, labels=None: self.x0(x, place.alpha, place.noise, labels)

    def _weights(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
        sigma = sigma.reshape(-1, 1) if sigma.ndim else sigma
        if self.coordinates == "ve":
            return torch.ones_like(sigma), sigma
        scale = (1 + sigma * sigma).sqrt()
        return 1 / scale, sigma / scale

    def _normal(self, n, seed, shape):
        return philox_normal(seed, torch.arange(n), shape, stream="x_T").double()


class GaussianTeacher(ExactTeacher):
    """Gaussian data N(mean, covariance).

    Args:
        mean: mean of a sample, of any shape.
        covariance: ``(d, d)``, or the variances in the shape of ``mean``, which are independent then.
        schedule: noise schedule; None: linear betas, T = 1000.
        coordinates: ``vp`` or ``ve``.

    Raises:
        InputError: a covariance of another shape, or one that is not symmetric and positive.

    Examples:
        >>> teacher = GaussianTeacher(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        >>> teacher.sample(4, solver="unipc", steps=10).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        mean: torch.Tensor,
        covariance: torch.Tensor,
        schedule: Schedule | None = None,
        coordinates: str = "vp",
    ):
        mean, covariance = mean.double(), covariance.double()
        super().__init__(mean.shape, schedule, coordinates)
        d = mean.numel()
        if covariance.shape == mean.shape and not (mean.ndim == 2 and covariance.shape == (d, d)):
            covariance = covariance.flatten().diag()
        if covariance.shape != (d, d) or not torch.allclose(covariance, covariance.T):
            raise InputError(f"covariance must be {tuple(mean.shape)} or a symmetric ({d}, {d}), got {tuple(covariance.shape)}")
        self.mean, self.covariance = mean.flatten(), covariance
        self.variances, self._axes = torch.linalg.eigh(covariance)
        if not (self.variances > 0).all():
            raise InputError(f"covariance must be positive definite, its least variance is {self.variances.min():.3g}")

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """mean + alpha C (alpha^2 C + noise^2)^-1 (x - alpha mean), by axes of the covariance.

        Args:
            x: ``(N, ...)`` float64 states.
            alpha: weight of the image, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: not used: there are no classes.

        Returns:
            ``(N, ...)`` float64.
        """
        gain = alpha * self.variances / (alpha**2 * self.variances + noise**2)
        return (self.mean + ((x.flatten(1) - alpha * self.mean) @ self._axes * gain) @ self._axes.T).reshape(x.shape)

    def flow(self, x: torch.Tensor, sigma: Sigma, sigma_next: Sigma) -> torch.Tensor:
        """The probability flow's map between two noise levels: (x - alpha mean) / sqrt(variance) is constant along every axis.

        Args:
            x: ``(N, ...)`` states at ``sigma``, in the teacher's coordinates.
            sigma: noise level of the states.
            sigma_next: noise level to go to; 0 for the data.

        Returns:
            ``(N, ...)`` float64 states at ``sigma_next``.
        """
        (alpha, noise), (alpha_next, noise_next) = self._weights(x, sigma), self._weights(x, sigma_next)
        before, after = (a**2 * self.variances + s**2 for a, s in ((alpha, noise), (alpha_next, noise_next)))
        axes = (x.double().flatten(1) - alpha * self.mean) @ self._axes * (after / before).sqrt()
        return (alpha_next * self.mean + axes @ self._axes.T).reshape(x.shape)

    def data(self, n: int, seed: int = 0) -> torch.Tensor:
        """Samples of the data itself.

        Args:
            n: number of samples.
            seed: of the draws, in [0, 2^64).

        Returns:
            ``(n, ...)`` float64.
        """
        z = self._normal(n, seed, (len(self.mean),))
        return (self.mean + z * self.variances.sqrt() @ self._axes.T).reshape(n, *self.shape)

    def noise_power(self, level: Level) -> float:
        """E|eps|^2 / d: the mean of noise^2 / (alpha^2 v + noise^2) over the axes' variances v.

        Args:
            level: level of the states.

        Returns:
            Mean over dimensions, in [0, 1].
        """
        return (level.noise**2 / (level.alpha**2 * self.variances + level.noise**2)).mean().item()


def _over(x, weight):
    """A weight, a scalar or ``(N, 1)``, in a shape that multiplies states."""
    return weight.reshape(-1, *[1] * (x.ndim - 1)) if weight.ndim else weight
