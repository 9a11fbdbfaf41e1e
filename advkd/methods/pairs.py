"""One-step distillation by regression on recorded pairs of start noise and image (Luhman and Luhman 2021)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import Denoiser
from ..diffusion.denoiser_student import Sampler
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import Solver
from ..errors import InputError
from .base import Method, Needs, Settings, Stage, Step, Trained, cosine
from .generator import previewed


@dataclass
class PairsConfig:
    """How ``advkd distill pairs`` trains.

    Attributes:
        updates: student updates.
        batch_size: global batch.
        learning_rate: of Adam.
        final_learning_rate: fraction of the learning rate left at the end (cosine decay; 1 keeps it constant).
        ema: decay of the average that is saved (0: none).
        level: noise level sigma at which a denoiser student is entered, once.
        pairs: only the first so many trajectories are used (0: all).
        grow: trajectories that the teacher adds to the data after every ``grow_every`` updates (0: none).
        grow_every: see ``grow``.
        mixed_precision: ``no`` or ``bf16``.
        seed: of weights and all draws.
        checkpoint_every: updates between checkpoints.
        log_every: updates that one row of ``metrics.csv`` averages.
    """

    updates: int = 2000
    batch_size: int = 64
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.05
    ema: float = 0.99
    level: float = 1.0
    pairs: int = 0
    grow: int = 0
    grow_every: int = 100
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 1

    def validate(self, num: int) -> None:
        """Check every field.

        Args:
            num: number of trajectories in the data.

        Raises:
            InputError: a field that cannot work with so many trajectories; the message names it.
        """
        for name in ("updates", "grow_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pairs < 0 or self.grow < 0:
            raise InputError(f"pairs and grow must not be negative, got {self.pairs}, {self.grow}")
        if self.pairs > num:
            raise InputError(f"pairs must be at most the {num} trajectories, got {self.pairs}")
        if not 2 <= self.batch_size <= (self.pairs or num):
            raise InputError(f"batch_size must be from 2 to the {self.pairs or num} trajectories, got {self.batch_size}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.final_learning_rate <= 1 or not 0 <= self.ema < 1:
            values = f"{self.learning_rate}, {self.final_learning_rate}, {self.ema}"
            raise InputError(
                f"learning_rate must be positive and finite, final_learning_rate in [0, 1], ema in [0, 1), got {values}"
            )
        if not 0 < self.level < math.inf:
            raise InputError(f"level must be positive and finite, got {self.level}")
        if self.mixed_precision not in ("no", "bf16"):
            raise InputError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")


class Pairs(Method):
    """Regression on the teacher's image of the same noise, in one pass.

    Args:
        config: a :class:`PairsConfig`.
        student: module from z to images; of a :class:`advkd.Student` the submodules and the head are trained. With ``schedule``
            a network that gives v at a state, a timestep and a condition: its image at ``config.level`` is the student's.
        schedule: noise schedule of a denoiser student; None: the student is a generator.

    Examples:
        >>> distill("trajectories", Student.from_preset("digits"), PairsConfig(updates=500), "out", method="pairs")
    """

    name = "pairs"
    reference = "Luhman and Luhman 2021, Knowledge distillation in iterative generative models for improved sampling speed"
    Config = PairsConfig
    students = ("generator", "denoiser")

    def __init__(self, config: PairsConfig, student: nn.Module, schedule: Schedule | None = None):
        self.config, self.student, self.schedule = config, student, schedule
        # The network is entered at a level where it is neither all noise nor all image: Luo et al. 2023 (Diff-Instruct) do so.
        self._denoiser = None if schedule is None else Denoiser(student, schedule, "v_prediction")
        if schedule is None and config.level != type(config).level:
            raise InputError("level is of a denoiser student, which is entered there: leave it out")
        if schedule is not None:
            least, most = schedule.sigma(0).item(), schedule.sigma(len(schedule) - 1).item()
            if not least <= config.level <= most:
                raise InputError(
                    f"level must be within the schedule's noise levels, {least:.3g} to {most:.3g}, got {config.level}"
                )

    def check(self, data: Any) -> None:
        """Refuse trajectories that the configuration cannot be trained on.

        Args:
            data: the trajectories, of which the number counts.

        Raises:
            InputError: a field of the configuration that cannot work with so many.
        """
        self.config.validate(len(data))

    def needs(self) -> Needs:
        """Start noise and image of deterministic paths.

        Returns:
            ``pairs`` of a deterministic sampler, labelled for a student with classes, limited and grown as configured.
        """
        config, labels = self.config, bool(getattr(self.student, "num_classes", 0))
        return Needs("pairs", paired=True, labels=labels, limit=config.pairs, grow=config.grow, grow_every=config.grow_every)

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        config = self.config
        return Settings(config.seed, config.checkpoint_every, config.log_every, config.mixed_precision)

    def stages(self) -> list[Stage]:
        """One stage, on the last level: the image.

        Returns:
            ``[Stage]``; its ``levels`` are empty for a module that has no ``depth`` as :class:`advkd.Student` has.
        """
        depth: Any = getattr(self.student, "depth", None)
        levels = (depth,) if depth else ()
        return [Stage(1, self.config.updates, self.config.batch_size, levels)]

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The student in training mode, with Adam under a cosine schedule; the terminal modules of a Student are frozen.

        Args:
            stage: the one stage.

        Returns:
            ``{"student": Trained}``.
        """
        student, config = self.student.train(), self.config
        if hasattr(student, "terminals"):
            student.terminals.requires_grad_(False)
        layout = torch.channels_last if self._denoiser else torch.preserve_format
        if self._denoiser:
            student.requires_grad_(True)
        return {
            "student": Trained(student, config.learning_rate, schedule=self._schedule, average=config.ema, memory_format=layout)
        }

    def _schedule(self, update):
        return cosine(update, self.config.updates, self.config.final_learning_rate)

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """|f(z) - x|^2 / 2 for pairs (z, x) = (x_T, sampler(x_T)): the divergence of unit normals around them.

        The loss is its mean over all numbers of the batch's images, and the one column that is logged.

        Args:
            step: actions of the update.
            batch: ``z`` and ``images``, one row a pair; ``labels`` of a conditional student.
            draw: not used: the update is not random.
        """
        with step.autocast():
            images = self._images(batch)
        loss = 0.5 * (images.to(batch.images) - batch.images).square().mean()
        step("student", loss)
        step.log(loss=loss.detach())

    def _images(self, batch):
        if self._denoiser is None:
            return self.student(batch.z) if batch.labels is None else self.student(batch.z, labels=batch.labels)
        return self._denoiser.predict(batch.z, self.config.level, batch.labels)[0]

    def sampler(self, stage: Stage) -> Sampler:
        """One evaluation of a denoiser student.

        Args:
            stage: the one stage.

        Returns:
            DDIM from the level at which the network is entered.
        """
        return Sampler(Solver("ddim", alpha_bars=(1 / (1 + self.config.level**2),)))

    def folder(self, stage: Stage) -> str:
        """A denoiser student is saved to the run's own folder.

        Args:
            stage: the one stage.

        Returns:
            An empty name.
        """
        return ""

    def samples(self, student: Any, stage: Stage) -> Tensor | None:
        """Images, the same in every run of one seed, of all classes in turn.

        Args:
            student: the result so far.
            stage: the one stage.

        Returns:
            ``(N, C, H, W)``, or None for a module that has no ``latents`` as :class:`advkd.Student` has.
        """
        return previewed(student, self.config.seed)
