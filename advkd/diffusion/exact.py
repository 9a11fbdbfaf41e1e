"""Teachers whose denoiser is known in closed form: a laboratory in which samplers and distillation methods can be proved.

Data are Gaussian, a mixture of Gaussians, or a finite set of images; the posterior mean E[x0 | x_t] at every noise level is
then a formula, and a solver's error, a sampler's marginals or a student's optimum can be compared with what they must be.
Teachers compute in float64, on the CPU, with the solvers' own programs (:mod:`advkd.diffusion.solvers`); runs and ``predict``
are those of :class:`advkd.Teacher`.
"""

import math
from collections.abc import Sequence

import torch

from ..errors import InputError
from .exact_teacher import ExactTeacher, Sigma
from .schedule import Level, Schedule


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
        mean, covariance = mean.double().cpu(), covariance.double().cpu()
        if not mean.ndim or not mean.isfinite().all() or not covariance.isfinite().all():
            raise InputError(f"mean and covariance must be finite numbers, the mean of one dimension or more, got {mean}")
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
        z = self._normal(n, seed, (len(self.mean),), 1)
        return (self.mean + z * self.variances.sqrt() @ self._axes.T).reshape(n, *self.shape)

    def noise_power(self, level: Level) -> float:
        """E|eps|^2 / d: the mean of noise^2 / (alpha^2 v + noise^2) over the axes' variances v.

        Args:
            level: level of the states.

        Returns:
            Mean over dimensions, in [0, 1].
        """
        return (level.noise**2 / (level.alpha**2 * self.variances + level.noise**2)).mean().item()


class MixtureTeacher(ExactTeacher):
    """A mixture of Gaussians of one variance; a sample's class is that of its component.

    Args:
        means: ``(K, ...)`` means of the components.
        weights: ``(K,)`` their shares, positive; they are scaled to sum to 1.
        variance: variance of every component in every direction.
        schedule: noise schedule; None: linear betas, T = 1000.
        coordinates: ``vp`` or ``ve``.
        labels: ``(K,)`` classes 0, 1, ... of the components; None: a class each.

    Raises:
        InputError: weights or a variance that are not positive, or of another number, or classes of which one has no component.

    Examples:
        >>> MixtureTeacher.from_preset("25-gaussians").data(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        means: torch.Tensor,
        weights: torch.Tensor | Sequence[float],
        variance: float,
        schedule: Schedule | None = None,
        coordinates: str = "vp",
        labels: torch.Tensor | None = None,
    ):
        means = means.double().cpu()
        if means.ndim < 2 or not means.isfinite().all():
            raise InputError(f"means must be (K, ...) finite numbers, got {tuple(means.shape)}")
        self.labels = torch.arange(len(means), device="cpu") if labels is None else labels.cpu()
        if self.labels.shape != means.shape[:1]:
            raise InputError(f"labels must be ({len(means)},), one for each of the means, got {tuple(self.labels.shape)}")
        super().__init__(means.shape[1:], schedule, coordinates, num_classes=_count(self.labels))
        self.weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        self.variance = float(variance)
        if (
            self.weights.shape != means.shape[:1]
            or not ((self.weights > 0) & self.weights.isfinite()).all()
            or not self.variance > 0
        ):
            raise InputError(f"weights must be {len(means)} positive numbers and variance positive, got {weights}, {variance}")
        self.weights = self.weights / self.weights.sum()
        self.means = means.flatten(1)

    @classmethod
    def from_preset(cls, name: str, schedule: Schedule | None = None, coordinates: str = "vp") -> "MixtureTeacher":
        """A mixture by name.

        Args:
            name: ``25-gaussians`` (a 5 x 5 grid in the plane, 1 apart, deviation 0.05: Xiao et al. 2022, figure 6),
                ``8-gaussians`` (a ring of radius 2, deviation 0.1) or ``two-gaussians`` (in one dimension, at -1 and 1,
                variance 0.1).
            schedule: noise schedule; None: linear betas, T = 1000.
            coordinates: ``vp`` or ``ve``.

        Returns:
            Teacher of equal weights.

        Raises:
            InputError: another name.
        """
        presets = {"25-gaussians": (_grid, 0.05**2), "8-gaussians": (_ring, 0.1**2), "two-gaussians": (_pair, 0.1)}
        if name not in presets:
            raise InputError(f"name must be one of {', '.join(presets)}, got {name!r}")
        means, variance = presets[name]
        centres = means()
        return cls(centres, [1.0] * len(centres), variance, schedule, coordinates)

    def responsibilities(
        self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """p(component | x) for x = alpha x0 + noise eps, among the components of the state's class.

        Args:
            x: ``(N, ...)`` float64 states.
            alpha: weight of the image, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: ``(N,)`` classes; the number of classes stands for none; None: no class at all.

        Returns:
            ``(N, K)`` float64, rows summing to 1.
        """
        distances = _square_distances(x.flatten(1), alpha, self.means)
        spread = alpha**2 * self.variance + noise**2
        exponents = _of_class(self.weights.log() - distances / (2 * spread), labels, self.labels, self.num_classes)
        return torch.softmax(exponents, dim=1)

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Posterior mean: those of the components of the state's class, mixed by responsibility.

        Args:
            x: ``(N, ...)`` float64 states.
            alpha: weight of the image, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: ``(N,)`` classes; the number of classes stands for none; None: no class at all.

        Returns:
            ``(N, ...)`` float64.
        """
        centre = self.responsibilities(x, alpha, noise, labels) @ self.means
        gain = alpha * self.variance / (alpha**2 * self.variance + noise**2)
        return (centre + gain * (x.flatten(1) - alpha * centre)).reshape(x.shape)

    def data(self, n: int, seed: int = 0) -> torch.Tensor:
        """Samples of the data itself.

        Args:
            n: number of samples.
            seed: of the draws, in [0, 2^64).

        Returns:
            ``(n, ...)`` float64.
        """
        uniform = torch.special.ndtr(self._normal(n, seed, (1,), 2))
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform.flatten()).clamp_max(len(self.means) - 1)
        z = self._normal(n, seed, (self.means.shape[1],), 1)
        return (self.means[chosen] + math.sqrt(self.variance) * z).reshape(n, *self.shape)


class FiniteSetTeacher(ExactTeacher):
    """A finite set of images as the data: E[x0 | x_t] is a softmax over the images, and the flow ends at one of them.

    Args:
        images: ``(M, ...)`` images.
        labels: ``(M,)`` classes 0 .. K - 1 of the images, or None.
        schedule: noise schedule; None: linear betas, T = 1000.
        coordinates: ``vp`` or ``ve``.

    Raises:
        InputError: no images, or labels of another number or with a class that no image has.

    Examples:
        >>> FiniteSetTeacher(torch.rand(10, 1, 8, 8)).sample(2, solver="unipc", steps=10).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        schedule: Schedule | None = None,
        coordinates: str = "vp",
    ):
        if images.ndim < 2 or not len(images) or (labels is not None and labels.shape != images.shape[:1]):
            raise InputError(f"images must be (M, ...) with M >= 1 and labels (M,), got {tuple(images.shape)}")
        if not images.is_floating_point() or not images.isfinite().all():
            raise InputError(f"images must be finite floating-point numbers, got {images.dtype}: scale pixels to [-1, 1] first")
        super().__init__(images.shape[1:], schedule, coordinates, 0 if labels is None else _count(labels))
        self.images, self.labels = images.double().cpu().flatten(1), None if labels is None else labels.cpu()

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """sum_i w_i x_i with w = softmax(-|x - alpha x_i|^2 / (2 noise^2)), over the images of the state's class.

        Args:
            x: ``(N, ...)`` float64 states.
            alpha: weight of the image, a scalar or ``(N, 1)``.
            noise: weight of the noise, likewise.
            labels: ``(N,)`` classes; K stands for none; None: no class at all.

        Returns:
            ``(N, ...)`` float64.
        """
        exponents = -_square_distances(x.flatten(1), alpha, self.images) / (2 * noise**2)
        exponents = _of_class(exponents, labels, self.labels, self.num_classes)
        return (torch.softmax(exponents, dim=1) @ self.images).reshape(x.shape)

    def data(self, n: int, seed: int = 0) -> torch.Tensor:
        """Images of the set, drawn with replacement.

        Args:
            n: number of samples.
            seed: of the draws, in [0, 2^64).

        Returns:
            ``(n, ...)`` float64.
        """
        uniform = torch.special.ndtr(self._normal(n, seed, (1,), 2)).flatten()
        return self.images[(uniform * len(self.images)).long().clamp_max(len(self.images) - 1)].reshape(n, *self.shape)


def _square_distances(x, alpha, centres):
    """|x - alpha c|^2 for every state and centre, ``(N, K)``, without its part that is common to a row."""
    return alpha**2 * centres.square().sum(1) - 2 * alpha * (x @ centres.T)


def _of_class(exponents, labels, own, classes):
    """Logarithms of weights ``(N, K)``, those of another class than the state's at minus infinity."""
    if labels is None or own is None:
        return exponents
    other = (labels[:, None] != own) & (labels[:, None] != classes)
    return exponents.masked_fill(other, -math.inf)


def _count(labels):
    """Number of the classes 0 .. K - 1 that labels name."""
    found = labels.unique()
    if not torch.equal(found, torch.arange(len(found), device=labels.device)):
        raise InputError(f"labels must be whole numbers 0 .. K - 1, each of them of an image, got {found.tolist()}")
    return len(found)


_PRESET = {"dtype": torch.float64, "device": "cpu"}


def _grid():
    axis = torch.arange(-2, 3, **_PRESET)
    return torch.cartesian_prod(axis, axis)


def _ring():
    angles = torch.arange(8, **_PRESET) * math.pi / 4
    return 2 * torch.stack((angles.cos(), angles.sin()), dim=1)


def _pair():
    return torch.tensor([[-1.0], [1.0]], **_PRESET)
