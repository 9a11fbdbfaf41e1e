"""Training of classifiers: of images, whose features measure those of a small data set, and of noisy images, for guidance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..data.draws import Draw
from ..data.glyph_sets import trained_glyphs
from ..data.sources import Batch
from ..diffusion.training_schedules import require_schedule
from ..errors import InputError
from ..models.classifier import add_noise
from .base import Method, Needs, Settings, Stage, Step, Trained, cosine


@dataclass
class ClassifierTrainingConfig:
    """How ``advkd classifier train`` trains.

    Attributes:
        data: ``digits``, ``glyphs`` or a folder that holds one folder of images per class.
        size: side of the images in pixels (0: from the data).
        classes: of glyphs ``digits``, ``letters`` or ``all``, the default.
        images: number of glyphs that are trained on (0: 32,768).
        num_features: features of an image.
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule.
        held_out: fraction of the images that is not trained on and tells the accuracy.
        noisy: the classifier is of noisy images at all of a teacher's levels, which it is told: for guidance, not for features.
        schedule: the teacher's noise schedule, ``linear``, ``cosine`` or ``edm``; used with ``noisy``.
        seed: of the split, weights, data order, distortions and noise.
        checkpoint_every: steps between checkpoints.
    """

    data: str = "digits"
    size: int = 0
    classes: str = ""
    images: int = 0
    num_features: int = 64
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    held_out: float = 0.2
    noisy: bool = False
    schedule: str = "linear"
    seed: int = 0
    checkpoint_every: int = 200

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("steps", "batch_size", "num_features", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size and (self.size < 8 or self.size & (self.size - 1)):
            raise InputError(f"size must be 4 * 2^k and at least 8, got {self.size}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {self.held_out}")
        require_schedule(self.schedule)
        if self.schedule != type(self).schedule and not self.noisy:
            raise InputError("schedule is that of noisy images: give --noisy, too")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")
        glyphs = trained_glyphs(self.data, self.classes, self.images)
        if glyphs is not None:
            glyphs.require(self.size or 32)


class Classification(Method):
    """Cross-entropy on distorted images, clean or noisy. Runs in one process: torch's batch norm sees no other.

    Args:
        config: a :class:`ClassifierTrainingConfig`.
        classifier: module from images to logits; from x_t and alpha_bar, float64 ``(N,)``, where those are noisy.
        generator: torch's generator on the CPU that rows, distortions and noise are drawn from.
        alpha_bars: alpha_bar of every timestep, float64 ``(T,)``, or None for clean images.
    """

    name = "classification"
    reference = "cross-entropy with AdamW (Loshchilov and Hutter 2019)"
    Config = ClassifierTrainingConfig
    columns = ()
    distils = False
    requires = "labelled images (advkd classifier train)"
    parallel = False

    def __init__(
        self,
        config: ClassifierTrainingConfig,
        classifier: nn.Module,
        generator: torch.Generator,
        alpha_bars: torch.Tensor | None = None,
    ):
        self.config, self.classifier, self.alpha_bars, self._generator = config, classifier, alpha_bars, generator

    def needs(self) -> Needs:
        """Images and their classes."""
        return Needs("images", labels=True, student="classifier")

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        return Settings(self.config.seed, self.config.checkpoint_every)

    def stages(self) -> list[Stage]:
        """One stage."""
        return [Stage(1, self.config.steps, self.config.batch_size)]

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The classifier, under a cosine schedule."""
        rate, weight_decay = self.config.learning_rate, 1e-2
        return {"student": Trained(self.classifier.train(), rate, weight_decay=weight_decay, schedule=self._schedule)}

    def _schedule(self, update):
        return cosine(update, self.config.steps)

    def generator(self, update: int) -> torch.Generator:
        """The run's one generator, wherever it is: a checkpoint keeps its state."""
        return self._generator

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """Cross-entropy of distorted images, or of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps at any timestep."""
        images = distort(batch.images.float(), draw.host.normal(4, len(batch.images), dim=1)).to(batch.images.dtype)
        level: tuple[torch.Tensor, ...] = ()
        if self.alpha_bars is not None:
            noise = draw.host.normal(*images.shape).to(images)
            level = (self.alpha_bars[draw.host.integers(len(self.alpha_bars))],)
            images = add_noise(images, noise, *level)
        loss = F.cross_entropy(self.classifier(images, *level), batch.labels)
        step("student", loss)
        step.log(loss=loss.detach())


def distort(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Small rotations, scalings and shifts, so that a few hundred images teach the classes and not themselves.

    Args:
        images: ``(N, C, S, S)`` float32.
        noise: ``(4, N)`` standard normal: angle, scale and two shifts of every image.
    """
    spread = torch.tensor([[0.12], [0.06], [0.06], [0.06]], dtype=torch.float32, device="cpu")
    angle, scale, dx, dy = noise * spread
    scale = 1 + scale
    rows = (scale * angle.cos(), -scale * angle.sin(), dx), (scale * angle.sin(), scale * angle.cos(), dy)
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
