"""Training of a diffusion teacher by DDPM's simple objective (Ho et al. 2020, eq. 14)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.draws import Draw
from ..data.glyph_sets import trained_glyphs
from ..data.sources import Batch
from ..diffusion.low_images import LowImages, require_divides
from ..diffusion.schedule import Schedule
from ..diffusion.training_schedules import TIMESTEPS, require_schedule
from ..errors import InputError
from ..models.denoiser import beside
from .base import Method, Needs, Settings, Stage, Step, Trained, warmed_cosine


@dataclass
class TeacherTrainingConfig:
    """How ``advkd teacher train`` trains.

    Attributes:
        data: ``digits``, ``glyphs``, or a folder of images; with ``conditional`` one that holds one folder of images per class.
        size: side of the images in pixels (0: from the data).
        classes: of glyphs ``digits``, ``letters`` or ``all``, the default.
        images: number of glyphs that are trained on (0: 32,768).
        image_channels: 1 or 3 (0: from the data).
        channels: UNet channels from the highest to the lowest resolution (empty: those of ``init``, or 16, 32, 64, 64, ... down
            to 4x4).
        autoencoder: folder of ``advkd autoencoder train``, in whose latents the teacher is trained (empty: of the pixels).
        init: teacher whose weights the run begins with: ``digits``, ``digits-conditional``, ``glyphs``, a folder or a hub id
            (empty: a fresh network).
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule (after ``warmup`` linear steps).
        warmup: steps of linear warm-up.
        ema: decay of the exponential moving average that is saved.
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        conditional: the network is told the image's class, or none.
        drop: probability, in [0, 1), with which a conditional network is told no class; at 0 it learns no null class, which
            guidance of either kind needs.
        super_resolution: side of the low images, area averages with noise, that the network is told (0: none).
        truncation: largest level of the low images' noise, in timesteps; 0 for none.
        schedule: noise schedule, ``linear`` (DDPM's), ``cosine`` or ``edm`` (levels from 0.002 to 80).
        seed: of weights, data order, timesteps and noise; a run that goes on from one of the same seed repeats its draws.
        checkpoint_every: steps between checkpoints.
        device: torch device.
    """

    data: str = "digits"
    size: int = 0
    classes: str = ""
    images: int = 0
    image_channels: int = 0
    channels: tuple[int, ...] = ()
    autoencoder: str = ""
    init: str = ""
    steps: int = 5400
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.999
    prediction: str = "epsilon"
    conditional: bool = False
    drop: float = 0.15
    super_resolution: int = 0
    truncation: int = TIMESTEPS
    schedule: str = "linear"
    seed: int = 0
    checkpoint_every: int = 200
    device: str = "cpu"

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), got {self.ema}")
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"prediction must be epsilon, v_prediction or sample, got {self.prediction!r}")
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be in [0, 1), got {self.drop}")
        if self.drop != type(self).drop and not self.conditional:
            raise InputError("drop is the share of labels that a conditional teacher is not told: give --conditional, too")
        self._require_super_resolution()
        require_schedule(self.schedule)
        if any(c < 8 or c % 8 for c in self.channels):
            raise InputError(f"channels must be positive multiples of 8 (group norm has 8 groups), got {self.channels}")
        if not self.learning_rate > 0 or self.warmup < 0:
            raise InputError(f"learning_rate must be positive and warmup not negative, got {self.learning_rate}, {self.warmup}")
        if self.size and (self.size < 8 or self.size & (self.size - 1)):
            raise InputError(f"size must be 4 * 2^k and at least 8, got {self.size}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")
        glyphs = trained_glyphs(self.data, self.classes, self.images)
        if glyphs is not None:
            glyphs.require(self.size or 32, self.image_channels or None)

    def _require_super_resolution(self):
        if self.super_resolution and self.autoencoder:
            raise InputError("super_resolution is of pictures, and a teacher of latents has none: leave --autoencoder out")
        if not 0 <= self.truncation <= TIMESTEPS:
            raise InputError(f"truncation must be in [0, {TIMESTEPS}], got {self.truncation}")
        if not self.super_resolution and self.truncation != type(self).truncation:
            raise InputError("truncation is of the low images' noise: give --super-resolution, too")
        if self.super_resolution < 0:
            raise InputError(f"super_resolution must be the side of the low images, got {self.super_resolution}")
        if self.super_resolution and self.size:
            require_divides(self.super_resolution, self.size, "super_resolution")
        if self.super_resolution and self.conditional:
            raise InputError("super_resolution: the low image has the class: leave --conditional out")


class Denoising(Method):
    """A network learns to predict noise, image or velocity from noisy images.

    Args:
        config: a :class:`TeacherTrainingConfig`.
        network: ``network(x_t, t)``, or ``network(x_t, t, labels)`` of a conditional run, gives a tensor like x_t, or an output
            of diffusers with one in ``.sample``.
        scheduler: a diffusers scheduler with ``add_noise`` and ``get_velocity``.
        null: number of the class that stands for no class, or None: no label is dropped.
        low: low images of a super-resolution run, which the network is given as further channels of x_t, with the levels of
            their noise, ``(N, 1)``, in the place of labels.
    """

    name = "denoising"
    reference = "Ho et al. 2020, Denoising diffusion probabilistic models, eq. 14"
    Config = TeacherTrainingConfig
    columns = ()
    distils = False
    requires = "images (advkd teacher train)"

    def __init__(
        self,
        config: TeacherTrainingConfig,
        network: nn.Module,
        scheduler: Any,
        null: int | None = None,
        low: LowImages | None = None,
    ):
        self.config, self.network, self.scheduler, self.null, self.low = config, network, scheduler, null, low
        self.schedule = Schedule(scheduler.alphas_cumprod)

    def needs(self) -> Needs:
        """Images, and their classes in a conditional run."""
        return Needs("images", labels=self.config.conditional, student="denoiser")

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        return Settings(
            self.config.seed, self.config.checkpoint_every, free=("checkpoint_every", "device", "init", "autoencoder")
        )

    def stages(self) -> list[Stage]:
        """One stage."""
        return [Stage(1, self.config.steps, self.config.batch_size)]

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The network, its gradients clipped to norm 1."""
        config, network = self.config, self.network.train()
        return {"student": Trained(network, config.learning_rate, schedule=self._schedule, clip=1.0, average=config.ema)}

    def _schedule(self, update):
        return warmed_cosine(update, self.config.steps, self.config.warmup)

    def generator(self, update: int) -> torch.Generator:
        """Generator keyed by (seed, update): rows, noise, timesteps, and dropped labels or low images come from it in order."""
        # torch's generator keeps 32 bits of its seed: the factor spreads the run's seed over all of them.
        return torch.Generator("cpu").manual_seed((self.config.seed * 2654435761 + update) % 2**32)

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """Output of the network against its target at x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
        x0 = batch.images
        noise = draw.host.normal(*x0.shape).to(x0)
        t = draw.host.integers(self.scheduler.config.num_train_timesteps).to(x0.device)
        x_t = self.scheduler.add_noise(x0, noise, t)
        condition: Sequence[Any] = (self._some_dropped(batch.labels, draw),) if self.config.conditional else ()
        if self.low is not None:
            x_t, *condition = beside(x_t, self._low_image(x0, draw))
        with step.autocast():
            output = self.network(x_t, t, *condition)
        loss = F.mse_loss(getattr(output, "sample", output), self._target(x0, noise, t))
        step("student", loss)
        step.log(loss=loss.detach())

    def _some_dropped(self, labels, draw):
        """Labels, some replaced by the null class: one network learns both scores (Ho and Salimans 2022, algorithm 1)."""
        if self.null is None:
            return labels
        return labels.masked_fill((draw.host.uniform() < self.config.drop).to(labels.device), self.null)

    def _low_image(self, x0, draw):
        level = draw.host.integers(self.low.level + 1).to(x0.device)
        noise = draw.host.normal(len(x0), x0.shape[1], self.low.size, self.low.size).to(x0)
        return self.low.trained(x0, level, noise, self.schedule)

    def _target(self, x0, noise, t):
        kind = self.config.prediction
        return noise if kind == "epsilon" else x0 if kind == "sample" else self.scheduler.get_velocity(x0, noise, t)
