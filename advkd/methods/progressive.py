"""Progressive distillation (Salimans and Ho 2022): students do in one step what the student before them does in two."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import levels_of, noised, vp_weights
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from .base import Kept, Needs, Stage, Step, Trained
from .denoiser_method import DenoiserConfig, DenoiserMethod

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda snr: snr.clamp_min(1.0),
    "snr_plus_one": lambda snr: snr + 1.0,
    "x0": torch.ones_like,
}
"""Weight of the error of x0 by the signal-to-noise ratio (section 4): the larger one of the errors of x0 and of eps, that of v,
or that of x0."""

Predict = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""Function of the state, its noise levels and a condition that gives x0 and eps."""


@dataclass
class ProgressiveConfig(DenoiserConfig):
    """How ``advkd distill progressive`` trains.

    Attributes:
        updates: student updates of every round.
        last_updates: student updates of the last two rounds, which are the hardest (0: as many as of the others).
        rounds: steps of the student after each round, half of those before; the first teacher takes twice the first of them.
        weight: of the squared error of x0: ``truncated`` (max(1, SNR)), ``snr_plus_one`` (the error of v) or ``x0`` (1).
        drop: share of the labels that are replaced by a conditional student's null class.
    """

    learning_rate: float = 3e-4
    last_updates: int = 0
    rounds: tuple[int, ...] = (8, 4, 2, 1)
    weight: str = "truncated"
    drop: float = 0.1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        rounds = self.rounds
        if not rounds or rounds[-1] < 1 or any(steps != 2 * half for steps, half in zip(rounds, rounds[1:])):
            raise InputError(f"rounds must be numbers of steps, each half of the one before, 8,4,2,1 say, got {rounds}")
        for name, holds, wanted in (
            ("last_updates", self.last_updates >= 0, "at least 0"),
            ("weight", self.weight in WEIGHTS, f"one of {', '.join(WEIGHTS)}"),
            ("drop", 0 <= self.drop < 1, "in [0, 1)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class Progressive(DenoiserMethod):
    """Rounds, each of which halves the steps of DDIM; the student of every round is saved.

    The first round's teacher is --teacher, where one is named, else the student that training begins with; after that the
    student of the round before, its average where it has one. A student that teaches computes its steps as it draws: with x0
    clamped and its own eps kept, which is what solver ddim does. --teacher gives eps that goes with the clamped x0.

    Args:
        config: a :class:`ProgressiveConfig`.
        student: network that gives v; see :class:`~advkd.methods.denoiser_method.DenoiserMethod`.
        schedule: noise schedule of student and teacher.

    Raises:
        InputError: more steps than the schedule has levels.
    """

    name = "progressive"
    reference = "Salimans and Ho 2022, Progressive distillation for fast sampling of diffusion models, algorithm 2"
    requires = "images (--data), and a student of v prediction (--init); a teacher (--teacher) for the first round if you like"
    Config = ProgressiveConfig
    takes_low_images = True
    first_round: ClassVar[int] = 1
    config: ProgressiveConfig

    def __init__(self, config: ProgressiveConfig, student: nn.Module, schedule: Schedule):
        super().__init__(config, student, schedule)
        self.sigmas = nested_levels(schedule, config.rounds)
        self._steps, self._taught = config.rounds[0], False

    @property
    def reach(self) -> int:
        """Levels of its own that a step of a student passes."""
        return 1

    def needs(self) -> Needs:
        """Images, with labels where the student is told classes."""
        return Needs("images", labels=self.num_classes > 0, student="denoiser")

    def stages(self) -> Sequence[Stage]:
        """The rounds.

        Returns:
            One stage each.
        """
        config, count = self.config, len(self.config.rounds)
        updates = [config.last_updates or config.updates if i >= count - 2 else config.updates for i in range(count)]
        return [Stage(self.first_round + i, updates[i], config.batch_size) for i in range(count)]

    def steps(self, stage: Stage) -> int:
        """Steps of the student of a stage.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            Their number.
        """
        return self.config.rounds[stage.number - self.first_round]

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """A copy of the student of the round before, and that one as the round's teacher.

        Args:
            stage: the round.

        Returns:
            ``student``, and ``round`` in all rounds but one that --teacher teaches.
        """
        before = self.averages.get("student", self.student)
        self.student, self._steps = copy.deepcopy(before), self.steps(stage)
        self._taught = stage.number == 1 and self.teacher is not None
        self._before = before
        parts: dict[str, Trained | Kept] = {"student": self.trained(self.student, stage.updates)}
        return parts if self._taught else {**parts, "round": self.frozen(before)}

    def evaluations(self, stage: Stage) -> tuple[int, int]:
        """Two of the teacher and one of the student.

        Args:
            stage: not used.

        Returns:
            ``(3, 1)``.
        """
        return 3, 1

    def folder(self, stage: Stage) -> str:
        """The number of steps.

        Args:
            stage: the round.

        Returns:
            ``8``, say.
        """
        return str(self.steps(stage))

    def sampler(self, stage: Stage) -> Sampler:
        """DDIM at the round's levels, which are those of the trailing spacing.

        Args:
            stage: the round.

        Returns:
            Sampler.
        """
        return Sampler(Solver("ddim", spacing="trailing"), self.steps(stage))

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """w(SNR) |D(x_t) - x~|^2, where one step of DDIM with x~ is two of the teacher's.

        Args:
            step: actions of the update.
            batch: ``images``, and ``labels`` where the student is told classes.
            draw: levels and noise.
        """
        images, (start, middle, end) = batch.images, self._levels(draw)
        x = noised(images, draw.normal("x_t", *images.shape[1:]), start)
        condition = self.condition(batch, draw)
        with torch.no_grad():
            halfway = ddim_step(self._teach, x, start, middle, condition)
            target = matching_x0(x, ddim_step(self._teach, halfway, middle, end, condition), start, end)
        self.regress(step, x, start, condition, target)

    def regress(self, step: Step, x: Tensor, sigma: Tensor, condition: Any, target: Tensor) -> None:
        """Move the student down the loss of its x0, which is not clamped, and log it.

        Args:
            step: actions of the update.
            x: ``(N, ...)`` states.
            sigma: ``(N,)`` noise levels.
            condition: what the student is told.
            target: ``(N, ...)`` x0 to be learnt.
        """
        with step.autocast():
            x0, _ = self.denoiser(self.student).predict(x, sigma, condition)
        loss = self.loss(x0, target, sigma)
        step("student", loss)
        step.log(loss=loss.detach())

    def loss(self, x0: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """The weighted error of x0, w(SNR) |x0 - target|^2 by number of a sample.

        Args:
            x0: ``(N, ...)`` of the student.
            target: ``(N, ...)`` x0 to be learnt.
            sigma: ``(N,)`` noise levels.

        Returns:
            Scalar.
        """
        weight = WEIGHTS[self.config.weight](sigma**-2).to(x0.dtype)
        return (weight * (x0 - target).square().flatten(1).mean(dim=1)).mean()

    def _levels(self, draw):
        """Noise levels of a student's step of the round and of the teacher's step within it: start, middle and end."""
        count = 2 * self._steps
        sigmas = self.sigmas[:: (len(self.sigmas) - 1) // count].to(draw.indices.device)
        start = 2 * draw.integers("level", self._steps)
        # Beyond the image there is nothing: D of an image is itself.
        return tuple(sigmas[(start + i * self.reach).clamp_max(count)] for i in range(3))

    def _teach(self, x, sigma, condition):
        """x0 and eps of the round's teacher."""
        if self._taught:
            return self.teacher.predict(x, sigma, condition)
        return self.denoiser(self._before, self.clip).predict(x, sigma, condition)


def nested_levels(schedule: Schedule, rounds: Sequence[int]) -> Tensor:
    """Noise levels of the first round's teacher; every second one is the student's, and so on.

    Args:
        schedule: the noise schedule.
        rounds: steps of the students, each half of the one before.

    Returns:
        ``(2 rounds[0] + 1,)`` float64 sigma, falling; the last one, the image's, is 0.

    Raises:
        InputError: more steps than the schedule has levels, or levels of the trailing spacing that are not nested.
    """
    steps = 2 * rounds[0]
    if steps > len(schedule):
        raise InputError(
            f"rounds: the first teacher would take {steps} steps on a schedule of {len(schedule)} timesteps: "
            f"begin with at most {len(schedule) // 2}, got {tuple(rounds)}"
        )
    levels = schedule.levels("trailing", steps)
    sigmas = torch.tensor([*(level.sigma for level in levels), 0.0], dtype=torch.float64, device="cpu")
    if not (sigmas.diff() < 0).all() or any(levels[:: steps // n] != schedule.levels("trailing", n) for n in rounds):
        raise InputError(f"rounds: the schedule's levels repeat or are not nested: begin with fewer steps, got {tuple(rounds)}")
    return sigmas


def ddim_step(predict: Predict, x: Tensor, sigma: Tensor, sigma_next: Tensor, condition: Any = None) -> Tensor:
    """A step of DDIM without noise, sqrt(a') x0 + sqrt(1 - a') eps.

    Args:
        predict: x0 and eps of a state.
        x: ``(N, ...)`` variance-preserving states.
        sigma: ``(N,)`` their noise levels.
        sigma_next: ``(N,)`` noise levels to go to; 0 for the image.
        condition: handed on to ``predict``.

    Returns:
        ``(N, ...)`` states in ``x``'s dtype.
    """
    x0, eps = predict(x, sigma, condition)
    return noised(x0.to(x.dtype), eps.to(x.dtype), sigma_next)


def matching_x0(x: Tensor, x_next: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The x0 with which one step of DDIM goes from a state to another one (Salimans and Ho 2022, algorithm 2).

    (x' - r x) / (sqrt(a') - r sqrt(a)) with r = sqrt((1 - a') / (1 - a)): ``x_next`` itself where that is an image.

    Args:
        x: ``(N, ...)`` states.
        x_next: ``(N, ...)`` states after the step.
        sigma: ``(N,)`` noise levels of ``x``, positive.
        sigma_next: ``(N,)`` noise levels of ``x_next``, lower ones.

    Returns:
        ``(N, ...)`` in ``x``'s dtype.
    """
    (alpha, noise), (alpha_next, noise_next) = (
        vp_weights(levels_of(x, level).reshape(-1, *[1] * (x.ndim - 1))) for level in (sigma, sigma_next)
    )
    ratio = noise_next / noise
    return (x_next - ratio.to(x.dtype) * x) / (alpha_next - ratio * alpha).to(x.dtype)
