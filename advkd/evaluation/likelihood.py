"""The variational bound of a diffusion teacher on its negative log-likelihood, in bits per dimension.

L = L_T + sum L_{s,t} + L_0 (Ho et al. 2020, eq. 5; Nichol and Dhariwal 2021, section 2.1) with D the teacher's x0 at x_t:

- L_T = KL(q(x_T | x0) || N(0, 1)), the prior;
- L_{s,t} = KL(q(x_s | x_t, x0) || N(c_0 D + c_x x_t, Sigma)), one for each transition from t to s < t. Both means have the same
  c_x x_t, so that they are c_0 (x0 - D) apart;
- L_0 = -log p(x0 | x_t) at the chain's first timestep, the decoder N(D, Sigma_0): its mass in a pixel's bin, or its density.

The chain has all T timesteps or some of them, evenly spaced. Each image takes one draw of noise at each timestep, a function of
(seed, index, timestep), so that batches and interruptions change none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from ..diffusion.coefficients import VARIANCES, ddpm_coefficients
from ..diffusion.guidance import null_labels, require_labels
from ..diffusion.sampling import DiffusionModel
from ..diffusion.schedule import Level, Schedule
from ..diffusion.stochastic import x0_variance
from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import require_dense, whole
from ..runtime.progress import progress_bar

BOUND_VARIANCES = (*VARIANCES, "analytic")
"""Variances of the reverse transitions: the scheduler's kinds, or the optimal one of Analytic-DPM (Bao et al. 2022, eq. 6)."""

BATCH_SIZE = 16
"""Images that the network sees at once."""


@dataclass(frozen=True)
class Likelihood:
    """A bound on the negative log2-likelihood per dimension; lower is better. Parts are means over the images.

    Attributes:
        bits_per_dimension: the bound, sum of its parts.
        interval: 95 % interval of the bound over images and noise, by its standard error.
        prior: L_T.
        steps: L_{s,t} of every transition, from noise to image.
        decoder: L_0.
        timesteps: those of the states, falling: a transition begins at each, the decoder at the last.
        images: number of images.
        evaluations: images that the network was applied to.
    """

    bits_per_dimension: float
    interval: tuple[float, float]
    prior: float
    steps: tuple[float, ...]
    decoder: float
    timesteps: tuple[int, ...]
    images: int
    evaluations: int

    @classmethod
    def of(cls, terms: torch.Tensor, timesteps: tuple[int, ...]) -> "Likelihood":
        """Means of the terms of images.

        Args:
            terms: ``(N, len(timesteps) + 1)`` float64 of :meth:`VariationalBound.terms`, N >= 2.
            timesteps: of the chain, falling.

        Returns:
            The bound and its interval.
        """
        n, parts, totals = len(terms), terms.mean(0).tolist(), terms.sum(1)
        mean, reach = totals.mean().item(), NormalDist().inv_cdf(0.975) * totals.std().item() / math.sqrt(n)
        return cls(
            bits_per_dimension=mean,
            interval=(mean - reach, mean + reach),
            prior=parts[0],
            steps=tuple(parts[1:-1]),
            decoder=parts[-1],
            timesteps=timesteps,
            images=n,
            evaluations=n * len(timesteps),
        )


def variational_bound(
    teacher: DiffusionModel,
    images: torch.Tensor,
    steps: int | None = None,
    seed: int = 0,
    labels: torch.Tensor | int | None = None,
    batch_size: int = BATCH_SIZE,
    variance: str | None = None,
    progress: bool = False,
) -> Likelihood:
    """The variational bound of a teacher on images.

    Args:
        teacher: a :class:`~advkd.Teacher`, or an exact one.
        images: ``(N, ...)`` of the teacher's shape, N >= 2. uint8: pixels k, the images k / 127.5 - 1, of which the decoder
            gives probabilities in bins of width 2 / 255, those at the ends open. float32 or float64: values of which it gives
            densities; the bound is then on their differential log2-density and may be negative.
        steps: timesteps of the chain, in [2, T]; None: all T.
        seed: key of the noise, in [0, 2^64).
        labels: ``(N,)`` classes of a conditional teacher, or one for all; None: the null class.
        batch_size: images that the network sees at once; it changes nothing but rounding.
        variance: of the reverse transitions, one of :data:`BOUND_VARIANCES`; None: the teacher's ``variance_type``.
        progress: show a bar.

    Returns:
        The bound, its parts and its interval; ``N * steps`` network evaluations.

    Raises:
        InputError: before work starts: images of another shape or dtype, fewer than two, steps, a variance, classes or a seed
            that cannot be, or a schedule that reaches alpha_bar 0 or 1.

    Examples:
        >>> images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
        >>> variational_bound(Teacher.from_pretrained("digits"), images, steps=10).bits_per_dimension
    """
    bound = VariationalBound(teacher, steps, seed, variance)
    labels = bound.check(images, labels)
    batch_size = whole("batch_size", batch_size, 1)
    terms = []
    with progress_bar(total=len(images) * len(bound.timesteps), desc="likelihood", unit="evaluation", shown=progress) as bar:
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            terms.append(bound.terms(images[part], first, None if labels is None else labels[part], bar.update))
    return Likelihood.of(torch.cat(terms), bound.timesteps)


@dataclass(frozen=True)
class Transition:
    """A reverse transition N(c_0 D + c_x x_t, Sigma) from ``level``.

    Attributes:
        level: of the state that the network sees.
        c_0: weight of D in the mean.
        posterior: variance of q(x_s | x_t, x0).
        variance: Sigma.
    """

    level: Level
    c_0: float
    posterior: float
    variance: float


class VariationalBound:
    """The terms of :func:`variational_bound`, batch by batch.

    Args:
        teacher: a :class:`~advkd.Teacher`, or an exact one.
        steps: timesteps of the chain, in [2, T]; None: all T.
        seed: key of the noise, in [0, 2^64).
        variance: of the reverse transitions, one of :data:`BOUND_VARIANCES`; None: the teacher's ``variance_type``.

    Attributes:
        timesteps: of the chain, falling.
        transitions: one for each timestep but the last.
        decoder: the last level and Sigma_0.

    Raises:
        InputError: steps or a variance that cannot be, or a schedule that reaches alpha_bar 0 or 1.
    """

    def __init__(self, teacher: DiffusionModel, steps: int | None = None, seed: int = 0, variance: str | None = None):
        self.teacher, self.seed = teacher, whole("seed", seed, 0, 2**64)
        self.variance = teacher.variance_type if variance is None else variance
        if self.variance not in BOUND_VARIANCES:
            raise InputError(f"variance must be one of {', '.join(BOUND_VARIANCES)}, got {self.variance!r}")
        levels = _chain(teacher.schedule, steps)
        self.timesteps = tuple(int(level.t) for level in levels)
        pairs = zip(levels[:-1], levels[1:], strict=True)
        self.transitions = [self._transition(level, following) for level, following in pairs]
        self.decoder = levels[-1], self._decoder_variance(levels[-1])

    def check(self, images: torch.Tensor, labels: torch.Tensor | int | None = None) -> torch.Tensor | None:
        """Refuse images or classes that do not fit the teacher.

        Args:
            images: ``(N, ...)`` uint8 pixels or float32 or float64 values.
            labels: ``(N,)`` classes, or one for all; None: the null class.

        Returns:
            Classes ``(N,)`` int64 on the teacher's device, or None for an unconditional teacher.

        Raises:
            InputError: they do not fit.
        """
        require_dense("images", images)
        shape = tuple(self.teacher.shape)
        if tuple(images.shape[1:]) != shape or len(images) < 2:
            raise InputError(f"images must be (N, {', '.join(map(str, shape))}) with N >= 2, got {tuple(images.shape)}")
        if images.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise InputError(f"images must be uint8 pixels or float32 or float64 values, got {images.dtype}")
        if not images.isfinite().all():
            raise InputError("images must be finite: some values are not")
        if labels is None:
            return null_labels(self.teacher, len(images))
        if not self.teacher.num_classes:
            raise InputError(f"labels: teacher {self.teacher.name} is unconditional; leave them out")
        return require_labels(labels, len(images), self.teacher.num_classes, self.teacher.device)

    @torch.no_grad()
    def terms(
        self,
        images: torch.Tensor,
        first: int = 0,
        labels: torch.Tensor | None = None,
        count: Callable[[int], object] = lambda evaluations: None,
    ) -> torch.Tensor:
        """L_T, every L_{s,t} and L_0 of images.

        Args:
            images: ``(n, ...)`` images as for :func:`variational_bound`.
            first: index of the first one, for the noise.
            labels: ``(n,)`` classes as :meth:`check` gives them, or None.
            count: called with n after every timestep.

        Returns:
            ``(n, len(timesteps) + 1)`` float64 on the CPU, in bits per dimension.
        """
        x0 = images.to(self.teacher.device).double()
        pixels = x0 if images.dtype == torch.uint8 else None
        x0 = x0 if pixels is None else pixels / 127.5 - 1
        last, variance = self.decoder
        columns = [_mean(self._prior(x0))]
        for transition in self.transitions:
            square = (x0 - self._denoised(x0, transition.level, first, labels)).square()
            columns.append(_mean(gaussian_kl(transition.c_0**2 * square, transition.posterior, transition.variance)))
            count(len(images))
        mean = self._denoised(x0, last, first, labels)
        decoded = log_density(x0, mean, variance) if pixels is None else log_probability(pixels, mean, variance)
        columns.append(_mean(-decoded))
        count(len(images))
        return torch.stack(columns, dim=1).cpu() / math.log(2)

    def _prior(self, x0):
        a = self.transitions[0].level.alpha_bar
        return gaussian_kl(a * x0.square(), 1 - a, 1.0)

    def _denoised(self, x0, level, first, labels):
        """The teacher's x0 at states of a level, float64."""
        indices = torch.arange(first, first + len(x0), dtype=torch.int64, device=x0.device)
        # Step 0 of the stream is the noise that samplers start from.
        eps = philox_normal(self.seed, indices, x0.shape[1:], stream="x_T", step=int(level.t) + 1).double()
        state = level.alpha * x0 + level.noise * eps
        if getattr(self.teacher, "coordinates", "vp") == "ve":
            state = state / level.alpha
        return self.teacher.predict(state.to(self.teacher.state_dtype), level.sigma, labels)[0].double()

    def _transition(self, level, following):
        ends = level.alpha_bar, following.alpha_bar, "sample"
        small = ddpm_coefficients(*ends, VARIANCES[0])
        if self.variance == "analytic":
            # The posterior's variance and what D leaves open of x0 (Bao et al. 2022, eq. 6 with DDPM's lambda).
            variance = small.c_z**2 + small.c_0**2 * self._uncertainty(level)
        else:
            variance = ddpm_coefficients(*ends, self.variance).c_z ** 2
        return Transition(level, small.c_0, small.c_z**2, variance)

    def _decoder_variance(self, level):
        # The posterior has no variance at the image: the transition before lends its own, as in the authors' code.
        return self._uncertainty(level) if self.variance == "analytic" else self.transitions[-1].posterior

    def _uncertainty(self, level):
        """Mean variance of x0 given a state of a level."""
        try:
            power = self.teacher.noise_power(level)
        except InputError as error:
            raise InputError(f"variance analytic: teacher {self.teacher.name}: {error}") from error
        return max(x0_variance(level, power, self.teacher.clip), 1e-20)


def _chain(schedule: Schedule, steps: int | None) -> list[Level]:
    """Levels of evenly spaced timesteps, both ends among them, from noise to image."""
    steps = len(schedule) if steps is None else whole("steps", steps, 2, len(schedule) + 1)
    levels = schedule.levels("linspace", steps)
    bars = [0.0, *(level.alpha_bar for level in levels), 1.0]
    if len(levels) < 2 or not all(a < b for a, b in zip(bars[:-1], bars[1:], strict=True)):
        raise InputError("a bound needs two timesteps or more whose alpha_bars differ, none 0 or 1: the schedule has others")
    return levels


def _mean(values):
    """Mean over the dimensions of a sample."""
    return values.flatten(1).mean(1)


def gaussian_kl(square: torch.Tensor, variance: float, other: float) -> torch.Tensor:
    """KL divergence of N(m, variance) from N(m', other), by dimension, in nats.

    Args:
        square: (m - m')^2, float64 of any shape.
        variance: of the first distribution, positive.
        other: variance of the second, positive.

    Returns:
        float64 tensor of that shape.
    """
    return 0.5 * (math.log(other / variance) + (variance + square) / other - 1)


def log_density(x: torch.Tensor, mean: torch.Tensor, variance: float) -> torch.Tensor:
    """Log density of N(mean, variance), by dimension.

    Args:
        x: values, float64 of any shape.
        mean: of the same shape.
        variance: positive.

    Returns:
        float64 tensor of that shape, in nats.
    """
    return -0.5 * (math.log(2 * math.pi * variance) + (x - mean).square() / variance)


def log_probability(pixels: torch.Tensor, mean: torch.Tensor, variance: float) -> torch.Tensor:
    """Log mass of N(mean, variance) in the bins of 8-bit pixels (Ho et al. 2020, eq. 13), by dimension.

    The bin of pixel k is k / 127.5 - 1 -+ 1 / 255; those of 0 and 255 reach to infinity, so that a pixel's 256 masses sum to 1.
    Exact in the tails too, where the difference of two distribution functions would round to 0.

    Args:
        pixels: whole numbers in [0, 255], float64 of any shape.
        mean: of images in [-1, 1], of the same shape.
        variance: positive.

    Returns:
        float64 tensor of that shape, in nats.
    """
    below, above = ((pixels + side) / 127.5 - 1 for side in (-0.5, 0.5))
    lower = torch.where(pixels == 0, -math.inf, (below - mean) / math.sqrt(variance))
    upper = torch.where(pixels == 255, math.inf, (above - mean) / math.sqrt(variance))
    # In the left tail both functions are small numbers; a bin on the right is mirrored there.
    mirrored = lower + upper > 0
    low, high = (
        torch.special.log_ndtr(torch.where(mirrored, -right, left)) for left, right in ((lower, upper), (upper, lower))
    )
    return high + torch.log(-torch.expm1(low - high))
