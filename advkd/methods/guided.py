"""Guided distillation (Meng et al. 2023): a student that takes the guidance weight, then rounds of progressive distillation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import noised
from ..diffusion.denoiser_student import Sampler
from ..diffusion.guidance import require_null
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from ..models.denoiser import pack
from .base import Kept, Needs, Stage, Step, Trained
from .progressive import Progressive, ProgressiveConfig

SAMPLERS = {"deterministic": ("ddim", 1), "stochastic": ("ddim-renoised", 2)}
"""Solver of the rounds' students, and the levels that one of its steps passes."""


@dataclass
class GuidedConfig(ProgressiveConfig):
    """How ``advkd distill guided`` trains.

    Attributes:
        guidance: largest weight w that the student takes; training draws weights from 0 to it.
        first_updates: student updates before the rounds, in which it learns to take the weight.
        first_steps: steps of DDIM of the student before the rounds (0: those of the first round's teacher).
        sampler: of the rounds' students: ``deterministic`` (DDIM), or ``stochastic`` (steps of double length, then noise).
        usual: weight with which the saved students draw where none is asked for.
    """

    guidance: float = 4.0
    first_updates: int = 1000
    first_steps: int = 0
    sampler: str = "deterministic"
    usual: float = 1.0

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        super().validate()
        for name, holds, wanted in (
            ("guidance", 0 < self.guidance < math.inf, "positive and finite"),
            ("first_updates", self.first_updates >= 1, "at least 1"),
            ("first_steps", self.first_steps >= 0, "at least 0"),
            ("usual", 0 <= self.usual <= self.guidance, f"in [0, {self.guidance:g}], the largest weight"),
            ("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class Guided(Progressive):
    """One evaluation in the place of two, by a network told class and guidance weight; then rounds as those of progressive.

    Args:
        config: a :class:`GuidedConfig`.
        student: network that gives v, told :func:`advkd.models.denoiser.pack` of classes and weights.
        schedule: noise schedule of student and teacher.

    Raises:
        InputError: more steps than the schedule has levels.
    """

    name = "guided"
    reference = "Meng et al. 2023, On distillation of guided diffusion models, algorithms 1 and 2"
    requires = "a teacher told classes and none of them (--teacher), and labelled images (--data)"
    Config = GuidedConfig
    first_round = 2
    takes_weights = True
    takes_low_images = False
    config: GuidedConfig

    def __init__(self, config: GuidedConfig, student: nn.Module, schedule: Schedule):
        super().__init__(config, student, schedule)
        self._guiding = True

    @classmethod
    def begin(cls, config: Any, student: Any) -> Any:
        """The student, or a copy that takes a guidance weight beside its classes, which at first changes nothing.

        Args:
            config: a :class:`GuidedConfig`.
            student: a :class:`~advkd.diffusion.denoiser_student.DenoiserStudent`.

        Returns:
            One that takes weights up to ``config.guidance``.

        Raises:
            InputError: weights of another prediction, or a student that takes smaller weights only.
        """
        config.validate()
        student, most = super().begin(config, student), student.model.most_guidance
        if most and config.guidance > most:
            raise InputError(f"guidance must be at most {most:g}, that of the student's own training, got {config.guidance}")
        return student if most else student.told_more(config.seed, guidance=config.guidance)

    def needs(self) -> Needs:
        """Labelled images and a teacher that knows classes and none of them.

        Returns:
            Needs.

        Raises:
            InputError: a teacher that cannot be guided.
        """
        if self.teacher is not None:
            require_null(self.teacher)
        return Needs("images", teacher=True, labels=True, student="denoiser")

    def stages(self) -> Sequence[Stage]:
        """Guidance, then the rounds.

        Returns:
            One stage each.
        """
        return [Stage(1, self.config.first_updates, self.config.batch_size), *super().stages()]

    def steps(self, stage: Stage) -> int:
        """Steps of the student of a stage.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            Their number.
        """
        if stage.number < self.first_round:
            return self.config.first_steps or 2 * self.config.rounds[0]
        return super().steps(stage)

    def build(self, stage: Stage) -> dict[str, Trained | Kept]:
        """The student at first; see :class:`Progressive` for the rounds.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            ``student``, and ``round`` in the rounds.
        """
        self._guiding = stage.number < self.first_round
        return {"student": self.trained(self.student, stage.updates)} if self._guiding else super().build(stage)

    def folder(self, stage: Stage) -> str:
        """``w``, then the number of steps.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            ``w``, or ``8``, say.
        """
        return "w" if stage.number < self.first_round else super().folder(stage)

    def sampler(self, stage: Stage) -> Sampler:
        """DDIM at first; in the rounds the configuration's, at their levels.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            Sampler.
        """
        name = "ddim" if stage.number < self.first_round else SAMPLERS[self.config.sampler][0]
        return Sampler(Solver(name, spacing="trailing"), self.steps(stage), self.config.usual)

    @property
    def reach(self) -> int:
        """Levels that a step of the rounds' students passes."""
        return SAMPLERS[self.config.sampler][1]

    def condition(self, batch: Batch, draw: Draw) -> Tensor:
        """Classes and weights of the rounds.

        Args:
            batch: of an update.
            draw: of its rows.

        Returns:
            ``(N, 2)``; see :func:`advkd.models.denoiser.pack`.
        """
        return pack(*self._told(batch, draw))

    def _told(self, batch, draw):
        """Classes, some of them the null class, and weights."""
        return self.dropped(batch.labels, draw, self.config.drop), self.config.guidance * draw.uniform("w")

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """At first max(1, SNR) |D(x_t, c, w) - ((1 + w) D(x_t, c) - w D(x_t))|^2, clamped after guidance; then the rounds'.

        Args:
            step: actions of the update.
            batch: ``images`` and ``labels``.
            draw: timesteps, noise and weights.
        """
        if not self._guiding:
            super().update(step, batch, draw)
            return
        images = batch.images
        sigma = self.schedule.sigma(draw.integers("t", len(self.schedule)))
        x = noised(images, draw.normal("x_t", *images.shape[1:]), sigma)
        labels, weights = self._told(batch, draw)
        with torch.no_grad():
            target, _ = self.teacher.predict(x, sigma, labels, weights)
        self.regress(step, x, sigma, pack(labels, weights), target.to(x.dtype))
