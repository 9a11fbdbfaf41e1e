"""The common part of methods with two scores: the teacher's, and that of the student's images, of a network trained on them.

The gradient of the integral Kullback-Leibler divergence of the student's images from the teacher's is w(sigma) (s_q - s_p) at
noised images (Luo et al. 2023, theorem 3.1), and s_q - s_p = (D_q - D_p) / sigma^2 in terms of the posterior means.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..diffusion.denoiser import Denoiser, noised, over
from ..diffusion.guidance import require_null
from ..diffusion.schedule import Schedule
from ..errors import InputError
from ..models.denoiser import DenoiserNetwork
from .base import Kept, Stage, Step, Trained, cosine
from .denoiser_method import DenoiserConfig, DenoiserMethod, require_level_distribution, require_unused

DIRECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "constant": lambda image, taught, sigma, deviation: torch.ones_like(sigma),
    "dmd": lambda image, taught, sigma, deviation: 1 / (image - taught).abs().flatten(1).mean(dim=1).clamp_min(1e-5),
    "edm": lambda image, taught, sigma, deviation: deviation**-2 + sigma**-2,
}
"""Weight of D_q - D_p by the student's image, D_p, the noise level and the data's deviation: 1, 1 / mean|x - D_p| (Yin et al.
2024, eq. 8), or (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1)."""

OWN_ERROR: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda sigma: sigma**-2,
    "v_prediction": lambda sigma: 1 + sigma**-2,
    "sample": torch.ones_like,
}
"""Weight of the squared error of x0 that makes it the error of a network's own output, by its prediction."""


@dataclass
class ScoreConfig(DenoiserConfig):
    """Numbers that methods with a score network have.

    Attributes:
        score_updates: updates of the score network for each of the student.
        score_first: updates of the student that are left out at the beginning, where score and critic learn alone.
        score_learning_rate: of the score network's Adam.
        score_ema: decay of the score network's average, which then gives the student's gradient (0: the network itself).
        betas: of both Adams.
        level: distribution of the noise level: ``uniform`` over the timesteps, or ``lognormal``.
        level_mean: mean of log sigma of ``lognormal``, which is clamped to the schedule's levels.
        level_deviation: its deviation.
        weight: of D_q - D_p: ``constant``, ``dmd`` for 1 / mean|x - D_p|, or ``edm`` for 1 / sigma_data^2 + 1 / sigma^2.
        sigma_data: deviation of the data in ``edm``.
        guidance: weight w of the teacher's classifier-free guidance towards a conditional student's classes.
    """

    updates: int = 1000
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.1
    ema: float = 0.99
    score_updates: int = 1
    score_first: int = 0
    score_learning_rate: float = 2e-4
    score_ema: float = 0.0
    betas: tuple[float, float] = (0.0, 0.99)
    level: str = "uniform"
    level_mean: float = -1.2
    level_deviation: float = 1.2
    weight: str = "constant"
    sigma_data: float = 0.5
    guidance: float = 0.0

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("score_updates", self.score_updates >= 1, "at least 1"),
            ("score_first", 0 <= self.score_first < self.updates, f"in [0, {self.updates}), the updates"),
            ("score_learning_rate", 0 < self.score_learning_rate < math.inf, "positive and finite"),
            ("score_ema", 0 <= self.score_ema < 1, "in [0, 1)"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            ("weight", self.weight in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
            ("sigma_data", 0 < self.sigma_data < math.inf, "positive and finite"),
            ("guidance", 0 <= self.guidance < math.inf, "at least 0 and finite"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        require_level_distribution(self)
        require_unused(self, self.weight != "edm", "weight edm", "sigma_data")


class ScoreMethod(DenoiserMethod):
    """A method with a score network beside the student.

    Args:
        config: a :class:`ScoreConfig`.
        student: the student.
        schedule: noise schedule of student and teacher.
        score: network of the teacher's prediction for the student's images, trained in place; None: a copy of the teacher's.
    """

    columns: tuple[str, ...] = ("loss", "score", "difference")
    inputs: ClassVar[tuple[str, ...]] = ("data", "teacher")
    config: Any

    def __init__(self, config: Any, student: nn.Module, schedule: Schedule, score: nn.Module | None = None):
        super().__init__(config, student, schedule)
        self._score = score

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The student, and the score network.

        Args:
            stage: the one stage.

        Returns:
            ``student`` and ``score``.
        """
        config = self.config
        if self._score is None:
            self._score = DenoiserNetwork(copy.deepcopy(self.teacher.unet).float())
        student, score = self.trained(self.student, stage.updates), self.trained(self._score, stage.updates)
        student.betas = score.betas = config.betas
        score.learning_rate, score.average = config.score_learning_rate, config.score_ema
        student.schedule = lambda update: 0.0 if update < config.score_first else self._rate(update)
        return {"student": student, "score": score}

    def require_fit(self, classes: int) -> None:
        """Refuse guidance that cannot be, and a score network that is not of the teacher's states.

        Args:
            classes: number of the student's classes.

        Raises:
            InputError: guidance without classes to be guided to, or of a teacher that has no null class; a score network that
                takes or gives other states than the teacher, or none where the teacher has none to copy.
        """
        guidance, teacher = self.config.guidance, self.teacher
        if guidance and teacher is not None:
            require_null(teacher)
        if guidance and not classes:
            raise InputError("guidance is towards classes, and the student is told none: leave it out")
        if teacher is None:
            return
        if self._score is not None:
            _require_states(self._score, teacher)
        elif not hasattr(teacher, "unet"):
            raise InputError("score: the teacher has no network to begin with a copy of: give one")

    def _rate(self, update):
        return cosine(update, self.config.updates, self.config.final_learning_rate)

    @property
    def trained_share(self) -> float:
        """Share of the updates in which the student is trained, too."""
        return 1 - self.config.score_first / self.config.updates

    def waits(self, draw: Draw) -> bool:
        """True in the updates that the score network is given for itself.

        Args:
            draw: of a batch of the update.
        """
        return draw.start // (self.config.batch_size * self.config.score_updates) < self.config.score_first

    def noise_levels(self, draw: Draw, purpose: str) -> Tensor:
        """Noise levels as the configuration distributes them; an infinite one of the schedule is never drawn.

        Args:
            draw: of the rows.
            purpose: name of the draw.

        Returns:
            ``(N,)`` float64, within the schedule's finite ones.
        """
        config, schedule = self.config, self.schedule
        last = int((schedule.alpha_bars > 0).sum()) - 1
        if config.level == "uniform":
            return schedule.sigma(draw.integers(purpose, last + 1))
        sigma = (config.level_mean + config.level_deviation * draw.normal(purpose).double()).exp()
        return sigma.clamp(schedule.sigma(0.0).item(), schedule.sigma(float(last)).item())

    def learn_score(self, step: Step, images: Tensor, draw: Draw, sigma: Tensor, condition: Any = None) -> None:
        """Denoising score matching on the student's images (Vincent 2011), by the error of the network's own output.

        Args:
            step: actions of the update.
            images: ``(N, ...)`` images of the student, without a graph.
            draw: of the rows.
            sigma: ``(N,)`` noise levels.
            condition: ``(N,)`` classes, or None.
        """
        x = noised(images, draw.normal("score noise", *images.shape[1:]), sigma)
        with step.autocast():
            found, _ = self._q(self._score, math.inf).predict(x, sigma, condition)
        weight = OWN_ERROR[self.teacher.prediction](sigma).to(images.dtype)
        loss = (weight * (found.to(images.dtype) - images).square().flatten(1).mean(dim=1)).mean()
        step("score", loss)
        step.log(score=loss.detach())

    @torch.no_grad()
    def direction(self, images: Tensor, draw: Draw, sigma: Tensor, condition: Any = None) -> Tensor:
        """w (D_q - D_p) at noised images, the gradient that the student's images descend along.

        Args:
            images: ``(N, ...)`` images of the student.
            draw: of the rows.
            sigma: ``(N,)`` noise levels.
            condition: ``(N,)`` classes, or None.

        Returns:
            ``(N, ...)`` in the images' dtype, without a graph.
        """
        images = images.detach()
        x = noised(images, draw.normal("noise", *images.shape[1:]), sigma)
        network = self.averages.get("score", self._score)
        found, _ = self._q(network, self.teacher.clip).predict(x, sigma, condition)
        guided = (torch.full((len(x),), self.config.guidance).to(sigma),) if self.config.guidance else ()
        taught = self.teacher.predict(x, sigma, condition, *guided)[0].to(x.dtype)
        weight = DIRECTIONS[self.config.weight](images, taught, sigma, self.config.sigma_data)
        return over(x, weight) * (found.to(x.dtype) - taught)

    def _q(self, network, clip):
        return Denoiser(network, self.schedule, self.teacher.prediction, clip)


def _require_states(score, teacher):
    weights = next(score.parameters())
    state, told = weights.new_zeros(1, *teacher.shape), None
    if getattr(teacher, "num_classes", 0):
        told = torch.zeros(1, dtype=torch.int64, device=weights.device)
    try:
        with torch.no_grad():
            Denoiser(score, teacher.schedule, teacher.prediction).predict(state, teacher.schedule.sigma(0.0).item(), told)
    except (InputError, RuntimeError, ValueError) as error:
        raise InputError(
            f"score: the network does not take and give states {tuple(state.shape[1:])} as the teacher does ({error}): "
            "leave it out for a copy of the teacher's"
        ) from error


def along(direction: Tensor, images: Tensor) -> Tensor:
    """A loss whose gradient by the images is a direction, over their number and size.

    Args:
        direction: ``(N, ...)`` without a graph.
        images: ``(N, ...)`` with one.

    Returns:
        Scalar, the mean of the products.
    """
    return (direction * images).mean()
