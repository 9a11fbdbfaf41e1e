"""The common part of methods whose student is a denoiser: a network with v prediction on a noise schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..data.draws import Draw
from ..data.sources import Batch
from ..diffusion.denoiser import Denoiser
from ..diffusion.denoiser_student import Sampler
from ..diffusion.low_images import LowImages
from ..diffusion.schedule import Schedule
from ..errors import InputError
from ..models.autoencoder import Autoencoder
from .base import Kept, Method, Settings, Stage, Trained, cosine

LEVELS = ("uniform", "lognormal")
"""Distributions of the noise level: see ``level`` of a method's configuration."""


@dataclass
class DenoiserConfig:
    """Numbers that all methods on denoisers have.

    Attributes:
        updates: student updates, of every stage.
        batch_size: global batch.
        learning_rate: of Adam.
        final_learning_rate: fraction of the learning rate left at the end of a stage (cosine decay; 1 keeps it constant).
        clip: bound of the gradient's norm (0: none).
        ema: decay of the average that is saved (0: none).
        mixed_precision: ``no`` or ``bf16``.
        seed: of all draws.
        checkpoint_every: updates between checkpoints.
        log_every: updates that one row of ``metrics.csv`` averages.
    """

    updates: int = 400
    batch_size: int = 32
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 1

    def validate(self) -> None:
        """Raise :class:`advkd.InputError` that names the field that cannot work."""
        for name in ("updates", "batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, holds, wanted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("final_learning_rate", 0 <= self.final_learning_rate <= 1, "in [0, 1]"),
            ("clip", 0 <= self.clip < math.inf, "at least 0 and finite"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("mixed_precision", self.mixed_precision in ("no", "bf16"), "no or bf16"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
        ):
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class DenoiserMethod(Method):
    """A method whose student gives v = sqrt(a) eps - sqrt(1 - a) x0 at a variance-preserving state and a timestep.

    Args:
        config: the method's configuration.
        student: network of state ``(N, ...)``, timesteps ``(N,)`` float32 and a condition (None, classes or
            :func:`advkd.models.denoiser.pack`), that gives v in the state's shape.
        schedule: noise schedule of the student, and of the teacher where the method has one.

    Attributes:
        student: the network, which is trained in place.
        schedule: the noise schedule.
        clip: x0 is clamped to [-clip, clip] when the student draws; the runner sets it, the classes and the shape.
        shape: of an image, ``(C, H, W)``; empty where no runner says so.
        num_classes: number of classes that the student is told; 0 without.
        null_class: label that stands for no class, or None.
        autoencoder: between latents and pictures, of a student that draws latents; None of one that draws pictures.
        low: low images that the student of super-resolution is told, or None.
        given: data that the run has: ``images``, ``pairs`` or ``none``; its runner says so before it asks for :meth:`needs`.
    """

    students: ClassVar[tuple[str, ...]] = ("denoiser",)
    requires: ClassVar[str] = "images (--data)"
    inputs: ClassVar[tuple[str, ...]] = ("data", "teacher")
    config: Any
    clip: float = math.inf
    shape: tuple[int, ...] = ()
    num_classes: int = 0
    null_class: int | None = None
    autoencoder: Autoencoder | None = None
    low: LowImages | None = None
    given: str = "images"

    def __init__(self, config: Any, student: nn.Module, schedule: Schedule):
        config.validate()
        self.config, self.student, self.schedule = config, student, schedule

    @classmethod
    def calls_teacher(cls, config: Any) -> bool:
        """True: updates call a teacher.

        Args:
            config: not used.
        """
        return True

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        config = self.config
        return Settings(config.seed, config.checkpoint_every, config.log_every, config.mixed_precision)

    def stages(self) -> Sequence[Stage]:
        """One stage.

        Returns:
            ``[Stage]``.
        """
        return [Stage(1, self.config.updates, self.config.batch_size)]

    def folder(self, stage: Stage) -> str:
        """Folder within the run's own that the student of a stage is saved to.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            Its name; empty for the run's own folder.
        """
        return ""

    def sampler(self, stage: Stage) -> Sampler:
        """How the student of a stage draws.

        Args:
            stage: one of :meth:`stages`.

        Returns:
            Sampler, saved beside the student.
        """
        raise NotImplementedError

    def denoiser(self, network: nn.Module, clip: float = math.inf) -> Denoiser:
        """The posterior means of a network, its own eps where x0 is clamped; a clamped x0 has no gradient.

        Args:
            network: of the student's kind.
            clip: x0 is clamped to [-clip, clip]; infinity clamps nothing.

        Returns:
            Denoiser of variance-preserving states; gradients flow.
        """
        return Denoiser(network, self.schedule, "v_prediction", clip, clipped_eps=False)

    def condition(self, batch: Batch, draw: Draw) -> Any:
        """Conditions that student and teacher are told beside the timestep.

        Args:
            batch: of an update.
            draw: of its rows.

        Returns:
            ``(N,)`` classes, some of them the null class, or None; of a student of super-resolution the low images of the batch
            with noise of levels drawn uniformly.
        """
        if self.low is None:
            return self.dropped(batch.labels, draw, self.config.drop)
        images, size = batch.images, self.low.size
        level = draw.integers("level of the low image", self.low.level + 1)
        noise = draw.normal("low image", images.shape[1], size, size)
        return self.low.trained(images, level, noise, self.schedule)

    def dropped(self, labels: Any, draw: Draw, share: float) -> Any:
        """Labels, some replaced by the null class, so that the student learns it, too.

        Args:
            labels: ``(N,)`` classes, or None.
            draw: of the rows.
            share: probability of the null class.

        Returns:
            ``(N,)`` classes; ``labels`` themselves where the student has no null class.
        """
        if labels is None or self.null_class is None or not share:
            return labels
        return labels.masked_fill(draw.uniform("null class") < share, self.null_class)

    def trained(self, module: nn.Module, updates: int) -> Trained:
        """A network in training mode, with Adam under a cosine schedule.

        Args:
            module: the network.
            updates: length of the schedule.

        Returns:
            :class:`~advkd.methods.base.Trained` with the configuration's numbers.
        """
        config = self.config
        return Trained(
            module.train().requires_grad_(True),
            config.learning_rate,
            schedule=lambda update: cosine(update, updates, config.final_learning_rate),
            clip=config.clip,
            average=config.ema,
            memory_format=_layout(module),
        )

    def frozen(self, module: nn.Module) -> Kept:
        """A network that teaches, in eval mode, without gradients.

        Args:
            module: the network.

        Returns:
            :class:`~advkd.methods.base.Kept`.
        """
        return Kept(module.eval().requires_grad_(False), _layout(module))


def require_unused(config: Any, unused: bool, owner: str, *names: str) -> None:
    """Refuse numbers that would do nothing.

    Args:
        config: a configuration.
        unused: True if the numbers do nothing with its other fields.
        owner: what has them, and is not chosen.
        names: their fields.

    Raises:
        InputError: they do nothing and one of them is not the default.
    """
    for name in names:
        if unused and getattr(config, name) != getattr(type(config), name):
            raise InputError(f"{name} does nothing without {owner}: choose that, or leave {name} out")


def require_level_distribution(config: Any) -> None:
    """Refuse ``level``, ``level_mean`` and ``level_deviation`` that cannot work.

    Args:
        config: a configuration that has them.

    Raises:
        InputError: the one that cannot.
    """
    for name, holds, wanted in (
        ("level", config.level in LEVELS, f"one of {', '.join(LEVELS)}"),
        ("level_mean", math.isfinite(config.level_mean), "finite"),
        ("level_deviation", 0 < config.level_deviation < math.inf, "positive and finite"),
    ):
        if not holds:
            raise InputError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
    require_unused(config, config.level == "uniform", "level lognormal", "level_mean", "level_deviation")


def _layout(module):
    """Convolutions are faster with channels last."""
    image_like = any(parameter.ndim == 4 for parameter in module.parameters())
    return torch.channels_last if image_like else torch.preserve_format
