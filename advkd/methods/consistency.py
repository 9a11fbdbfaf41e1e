"""Consistency distillation and training (Song et al. 2023; Song and Dhariwal 2024): all states of a path have one image.

States are y = x0 + sigma eps. The function f(y, sigma) = c y + (1 - c) D(y, sigma), D the student's image and c the weight of
:func:`advkd.diffusion.stochastic.skip_weight`, is the identity at the lowest level. It learns to give at a level what it gives
at the next lower one, where a step of the teacher leads (distillation), or the same noise on the same image (training).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import over, vp_weights
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule, karras_sigmas
from ..diffusion.solvers import Solver
from ..diffusion.stochastic import skip_weight
from ..errors import InputError
from .base import Kept, Needs, Stage, Step, Trained
from .denoiser_method import DenoiserConfig, DenoiserMethod, require_level_distribution, require_unused
from .distances import DISTANCES

Function = Callable[[Tensor, Tensor, Any], Tensor]
"""Function of the state y ``(N, ...)``, its noise levels ``(N,)`` and a condition that gives an image."""

WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda high, low: torch.ones_like(high),
    "inverse-step": lambda high, low: 1 / (high - low),
}
"""Weight of the distance by the two noise levels (Song and Dhariwal 2024, section 3.1, for the second)."""


@dataclass
class ConsistencyConfig(DenoiserConfig):
    """How ``advkd distill consistency`` trains.

    Attributes:
        levels: number of noise levels N.
        final_levels: levels that training ends with, doubled on the way at equal intervals (0: as many as ``levels``).
        rho: exponent of the levels' spacing (Karras et al. 2022, eq. 5).
        sigma_min: lowest level, where the function is the identity (0: the schedule's lowest).
        sigma_max: highest level, at which sampling begins (0: the schedule's highest).
        sigma_data: deviation of the data in the weight of the state.
        level: ``uniform``, or ``lognormal`` for levels as often as a normal log sigma is between them.
        level_mean: mean of that log sigma.
        level_deviation: its deviation.
        weight: of the distance: ``constant``, or ``inverse-step`` for 1 / (sigma' - sigma).
        distance: ``mse``, or ``huber`` for pseudo-Huber.
        solver: of the teacher's step: ``heun`` or ``euler``.
        target: decay of the average that gives targets, for ``levels`` levels (0: the student itself, without a gradient).
        sigmas: noise levels of further evaluations with which the saved student draws, falling.
        drop: share of the labels that are replaced by a conditional student's null class.
    """

    updates: int = 2000
    ema: float = 0.99
    levels: int = 18
    final_levels: int = 0
    rho: float = 7.0
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    sigma_data: float = 0.5
    level: str = "uniform"
    level_mean: float = -1.1
    level_deviation: float = 2.0
    weight: str = "constant"
    distance: str = "huber"
    solver: str = "heun"
    target: float = 0.95
    sigmas: tuple[float, ...] = ()
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("levels", self.levels >= 2, "at least 2"),
            ("final_levels", not self.final_levels or self.final_levels >= self.levels, f"0 or at least levels, {self.levels}"),
            ("rho", 0 < self.rho < math.inf, "positive and finite"),
            ("sigma_min", 0 <= self.sigma_min < math.inf, "at least 0 and finite"),
            ("sigma_max", 0 <= self.sigma_max < math.inf, "at least 0 and finite"),
            ("sigma_data", 0 < self.sigma_data < math.inf, "positive and finite"),
            ("weight", self.weight in WEIGHTS, f"one of {', '.join(WEIGHTS)}"),
            ("distance", self.distance in DISTANCES, f"one of {', '.join(DISTANCES)}"),
            ("solver", self.solver in STEPS, f"one of {', '.join(STEPS)}"),
            ("target", 0 <= self.target < 1, "in [0, 1)"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        require_level_distribution(self)


class Consistency(DenoiserMethod):
    """One function for all states of a path: an image in one evaluation, better ones in more.

    With --teacher the states of a path are those of a step of it (consistency distillation), without one those of the same
    image and the same noise (consistency training).

    Args:
        config: a :class:`ConsistencyConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of the student, and of the teacher.

    Attributes:
        sigma_min: lowest noise level.
        sigma_max: highest noise level.

    Raises:
        InputError: noise levels outside of the schedule's, or more of them than it has timesteps.
    """

    name = "consistency"
    reference = "Song et al. 2023, Consistency models, algorithms 2 and 3; Song and Dhariwal 2024, Improved techniques"
    requires = "images (--data) and a student of v prediction (--init); a teacher (--teacher) for distillation"
    Config = ConsistencyConfig
    takes_low_images = True
    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, student: nn.Module, schedule: Schedule):
        super().__init__(config, student, schedule)
        lowest, highest = schedule.sigma(0.0).item(), schedule.sigma(len(schedule) - 1.0).item()
        self.sigma_min, self.sigma_max = config.sigma_min or lowest, config.sigma_max or highest
        if not 0 < lowest <= self.sigma_min < self.sigma_max <= highest or math.isinf(self.sigma_max):
            raise InputError(
                f"sigma_min and sigma_max must be finite and within the schedule's levels, {lowest:.3g} to {highest:.3g}, got "
                f"{self.sigma_min:.3g} and {self.sigma_max:.3g}"
            )
        if (most := max(config.levels, config.final_levels)) > len(schedule):
            name = "final_levels" if config.final_levels else "levels"
            raise InputError(f"{name} must be at most the schedule's {len(schedule)} timesteps, got {most}")
        if config.level == "lognormal":
            for count in {config.levels, config.final_levels or config.levels}:
                levels = torch.tensor(
                    karras_sigmas(count, self.sigma_min, self.sigma_max, config.rho)[::-1], dtype=torch.float64
                )
                if not lognormal_chances(levels, config.level_mean, config.level_deviation).isfinite().all():
                    raise InputError(f"level_mean must be near the logarithms of the levels, got {config.level_mean}")
        ends = (self.sigma_max, *config.sigmas, self.sigma_min)
        if any(a <= b for a, b in zip(ends, ends[1:])):
            raise InputError(f"sigmas must fall between {self.sigma_max:.3g} and {self.sigma_min:.3g}, got {config.sigmas}")
        self._target = student

    def needs(self) -> Needs:
        """Images, with labels where the student is told classes.

        Returns:
            Needs.

        Raises:
            InputError: a solver without a teacher to take its steps.
        """
        require_unused(self.config, self.teacher is None, "a teacher (--teacher)", "solver")
        return Needs("images", labels=self.num_classes > 0, student="denoiser")

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The student, and the average that gives targets.

        Args:
            stage: the one stage.

        Returns:
            ``student``, and ``target`` where it is another module.
        """
        parts: dict[str, Trained | Kept] = {"student": self.trained(self.student, stage.updates)}
        if self.config.target:
            self._target = copy.deepcopy(self.student)
            parts["target"] = self.frozen(self._target)
        return parts

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """The student and its target once each, and the teacher's step.

        Args:
            stage: not used.

        Returns:
            ``(forward, backward)`` by sample.
        """
        taught = 0 if self.teacher is None else STEPS[self.config.solver][1]
        return 2 + taught, 1

    def sampler(self, stage: Stage) -> Sampler:
        """Multistep consistency sampling from the highest level, then from ``sigmas``.

        Args:
            stage: not used.

        Returns:
            Sampler.
        """
        return Sampler(consistency_solver(self.config, self.schedule, self.config.sigmas), 1 + len(self.config.sigmas))

    def sigmas(self, update: int) -> Tensor:
        """Noise levels of an update.

        Args:
            update: updates so far.

        Returns:
            ``(N,)`` float64, rising.
        """
        inner = karras_sigmas(self.count(update), self.sigma_min, self.sigma_max, self.config.rho)[-2:0:-1]
        # The lowest one exactly: powers and roots round, and the function is the identity at no other.
        return torch.tensor([self.sigma_min, *inner, self.sigma_max], dtype=torch.float64, device="cpu")

    def count(self, update: int) -> int:
        """Number of levels, which doubles at equal intervals (Song and Dhariwal 2024, section 3.4).

        Args:
            update: updates so far.

        Returns:
            N.
        """
        config = self.config
        if not config.final_levels:
            return config.levels
        doublings = math.log2(config.final_levels / config.levels)
        interval = max(1, int(config.updates / (doublings + 1)))
        return min(config.levels * 2 ** (update // interval), config.final_levels)

    def function(self, network: nn.Module) -> Function:
        """The consistency function of a network; at ``sigma_min`` it is the identity, bit for bit.

        D is not clamped: what the state's noise brings to c y it has to take away, beyond the range of images.

        Args:
            network: of the student's kind.

        Returns:
            Function of states x0 + sigma eps; gradients flow.
        """
        denoiser = self.denoiser(network)

        def f(y, sigma, condition=None):
            skip = over(y, skip_weight(sigma, self.sigma_min, self.config.sigma_data))
            return skip * y + (1 - skip) * image_at(denoiser, y, sigma, condition)

        return f

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """w d(f(y', sigma'), f-(y, sigma)): y' = x0 + sigma' z, and y a step of the teacher from it, or x0 + sigma z.

        Args:
            step: actions of the update.
            batch: ``images``, and ``labels`` where the student is told classes.
            draw: levels and noise.
        """
        config, images, update = self.config, batch.images, draw.start // self.config.batch_size
        sigmas = self.sigmas(update).to(images.device)
        j = self._level(draw, sigmas)
        low, high = sigmas[j], sigmas[j + 1]
        noise, condition = draw.normal("z", *images.shape[1:]), self.condition(batch, draw)
        y = images + over(images, high) * noise
        with torch.no_grad():
            if self.teacher is None:
                y_low = images + over(images, low) * noise
            else:
                y_low = STEPS[config.solver][0](self.teacher, y, high, low, condition)
            with step.autocast():
                target = self.function(self._target)(y_low, low, condition)
        with step.autocast():
            image = self.function(self.student)(y, high, condition)
        weight = WEIGHTS[config.weight](high, low).to(images.dtype)
        loss = DISTANCES[config.distance](image.to(images.dtype), target.to(images.dtype), weight)
        step("student", loss)
        step.log(loss=loss.detach())
        if config.target:
            # The rate of fewer, longer intervals: mu(k) = mu^(s_0 / N(k)) (Song et al. 2023, appendix C).
            self._follow(config.target ** (config.levels / len(sigmas)))

    @torch.no_grad()
    def _follow(self, decay):
        pairs = list(zip(self._target.parameters(), self.student.parameters(), strict=True))
        torch._foreach_lerp_([mean for mean, _ in pairs], [value.detach() for _, value in pairs], 1 - decay)

    def _level(self, draw, sigmas):
        """Numbers of the lower levels of the pairs."""
        if self.config.level == "uniform":
            return draw.integers("level", len(sigmas) - 1)
        chances = lognormal_chances(sigmas, self.config.level_mean, self.config.level_deviation)
        wanted = draw.uniform("level").double()
        return torch.searchsorted(chances.cumsum(0), wanted, right=True).clamp_max(len(chances) - 1)


def lognormal_chances(sigmas: Tensor, mean: float, deviation: float) -> Tensor:
    """Probability of every interval of levels, that of a normal log sigma (Song and Dhariwal 2024, section 3.5).

    Args:
        sigmas: ``(N,)`` noise levels, rising.
        mean: of log sigma.
        deviation: of log sigma.

    Returns:
        ``(N - 1,)``, with the sum 1.
    """
    cumulative = torch.special.ndtr((sigmas.log() - mean) / deviation)
    chances = cumulative.diff()
    return chances / chances.sum()


def consistency_solver(config: ConsistencyConfig, schedule: Schedule, sigmas: tuple[float, ...] = ()) -> Solver:
    """Multistep consistency sampling by a function of a configuration.

    Args:
        config: the configuration.
        schedule: noise schedule of the student.
        sigmas: noise levels of the evaluations after the first one, falling.

    Returns:
        Solver that begins at the highest level.
    """
    first = 1 / (1 + config.sigma_max**2) if config.sigma_max else schedule.alpha_bars[-1].item()
    lowest = config.sigma_min or schedule.sigma(0.0).item()
    further = (1 / (1 + sigma**2) for sigma in sigmas)
    return Solver("consistency", sigma_min=lowest, sigma_data=config.sigma_data, alpha_bars=(first, *further))


def image_at(model: Any, y: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
    """D of a diffusion model at y = x0 + sigma eps.

    Args:
        model: a teacher or :class:`~advkd.diffusion.denoiser.Denoiser`, of variance-preserving states.
        y: ``(N, ...)`` states.
        sigma: ``(N,)`` float64 noise levels.
        condition: what ``model.predict`` takes, or None.

    Returns:
        ``(N, ...)`` in ``y``'s dtype; differentiable as ``model`` is.
    """
    alpha, _ = vp_weights(sigma)
    return model.predict(over(y, alpha) * y, sigma, condition)[0].to(y.dtype)


def euler_step(model: Any, y: Tensor, high: Tensor, low: Tensor, condition: Any = None) -> Tensor:
    """Euler's step of dy / dsigma = (y - D) / sigma.

    Args:
        model: see :func:`image_at`.
        y: ``(N, ...)`` states x0 + sigma eps.
        high: ``(N,)`` float64 noise levels.
        low: ``(N,)`` float64 levels to go to.
        condition: what ``model.predict`` takes, or None.

    Returns:
        ``(N, ...)`` states.
    """
    return y + over(y, (low - high) / high) * (y - image_at(model, y, high, condition))


def heun_step(model: Any, y: Tensor, high: Tensor, low: Tensor, condition: Any = None) -> Tensor:
    """Heun's step of the same equation (Karras et al. 2022, algorithm 1); see :func:`euler_step`.

    Args:
        model: see :func:`image_at`.
        y: ``(N, ...)`` states x0 + sigma eps.
        high: ``(N,)`` float64 noise levels.
        low: ``(N,)`` float64 levels to go to, positive.
        condition: what ``model.predict`` takes, or None.

    Returns:
        ``(N, ...)`` states.
    """
    slope = (y - image_at(model, y, high, condition)) / over(y, high)
    reached = y + over(y, low - high) * slope
    second = (reached - image_at(model, reached, low, condition)) / over(y, low)
    return y + over(y, (low - high) / 2) * (slope + second)


STEPS: dict[str, tuple[Callable[..., Tensor], int]] = {"heun": (heun_step, 2), "euler": (euler_step, 1)}
"""Steps of the teacher by name, with their evaluations."""
