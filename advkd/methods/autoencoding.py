"""Training of an autoencoder, in whose latents a teacher is trained (Rombach et al. 2022, section 3.1)."""

import math
from dataclasses import dataclass

from torch import nn

from ..data.draws import Draw
from ..data.glyph_sets import trained_glyphs
from ..data.sources import Batch
from ..errors import InputError
from ..models.autoencoder import KINDS
from .base import Method, Needs, Settings, Stage, Step, Trained, warmed_cosine

GROUPS = 8
"""Groups of channels that group normalisation takes together."""


@dataclass
class AutoencoderTrainingConfig:
    """How ``advkd autoencoder train`` trains.

    Attributes:
        data: ``digits``, ``glyphs``, or a folder of images.
        size: side of the images in pixels (0: from the data).
        classes: of glyphs ``digits``, ``letters`` or ``all``, the default.
        images: number of glyphs that are trained on (0: 32,768).
        image_channels: 1 or 3 (0: from the data).
        regularisation: ``kl`` draws latents of a Gaussian for each image and keeps it near N(0, I); ``vq`` replaces each vector
            of the latents by the nearest one of a learned codebook.
        latent_channels: channels of the latents.
        codes: vectors of the codebook, with ``vq``.
        channels: of the network, from the highest to the lowest resolution; the side halves between every two of them.
        kl: weight of the Kullback-Leibler divergence, a sum over the latent's numbers, against the sum of the pixels' errors.
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule (after ``warmup`` linear steps).
        warmup: steps of linear warm-up.
        ema: decay of the exponential moving average that is saved.
        seed: of weights, data order and noise.
        checkpoint_every: steps between checkpoints.
        device: torch device.
    """

    data: str = "digits"
    size: int = 0
    classes: str = ""
    images: int = 0
    image_channels: int = 0
    regularisation: str = "kl"
    latent_channels: int = 4
    codes: int = 256
    channels: tuple[int, ...] = (16, 32, 32)
    kl: float = 1e-6
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.99
    seed: int = 0
    checkpoint_every: int = 200
    device: str = "cpu"

    def validate(self) -> None:
        """Raise :class:`InputError` that names the field that cannot work."""
        for name, least in (("steps", 1), ("batch_size", 1), ("checkpoint_every", 1), ("codes", 2), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.regularisation not in KINDS:
            raise InputError(f"regularisation must be one of {', '.join(KINDS)}, got {self.regularisation!r}")
        if not 1 <= self.latent_channels <= 4:
            raise InputError(f"latent_channels must be 1 to 4, got {self.latent_channels}")
        if not self.channels or any(c < GROUPS or c % GROUPS for c in self.channels):
            raise InputError(f"channels must be positive multiples of {GROUPS}, got {self.channels}")
        for name, kind in (("codes", "vq"), ("kl", "kl")):
            if getattr(self, name) != getattr(type(self), name) and self.regularisation != kind:
                raise InputError(f"{name} does nothing without regularisation {kind}: choose that, or leave {name} out")
        if not 0 <= self.kl < math.inf:
            raise InputError(f"kl must not be negative or infinite, got {self.kl}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if self.size and (self.size < 8 or self.size & (self.size - 1)):
            raise InputError(f"size must be 4 * 2^k and at least 8, got {self.size}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in [0, 2^63), got {self.seed}")
        glyphs = trained_glyphs(self.data, self.classes, self.images)
        if glyphs is not None:
            glyphs.require(self.size or 32, self.image_channels or None)

    def require_size(self, size: int) -> None:
        """Refuse images that the channels leave no latents of which a teacher can be trained.

        Args:
            size: side of the images in pixels.

        Raises:
            InputError: latents of a side below 8.
        """
        halved = size >> (len(self.channels) - 1)
        if halved < 8:
            entries = f"channels has {len(self.channels)} entries, which make latents of {halved} x {halved}"
            raise InputError(f"{entries} of images of {size} pixels: a teacher needs 8 x 8 at least, give fewer")


class Autoencoding(Method):
    """Absolute errors of the pixels, with the latents kept near N(0, I) or near a codebook.

    Args:
        config: an :class:`AutoencoderTrainingConfig`.
        network: diffusers' ``AutoencoderKL`` or ``VQModel``, as ``config.regularisation`` says.
    """

    name = "autoencoding"
    reference = "Rombach et al. 2022, High-resolution image synthesis with latent diffusion models, section 3.1"
    Config = AutoencoderTrainingConfig
    columns = ()
    distils = False
    requires = "images (advkd autoencoder train)"

    def __init__(self, config: AutoencoderTrainingConfig, network: nn.Module):
        self.config, self.network = config, network

    def needs(self) -> Needs:
        """Images."""
        return Needs("images", student="autoencoder")

    def settings(self) -> Settings:
        """The trainer's part of the configuration."""
        return Settings(self.config.seed, self.config.checkpoint_every, free=("checkpoint_every", "device"))

    def stages(self) -> list[Stage]:
        """One stage."""
        return [Stage(1, self.config.steps, self.config.batch_size)]

    def build(self, stage: Stage) -> dict[str, Trained]:
        """The network, its gradients clipped to norm 1."""
        config, network = self.config, self.network.train()
        return {"student": Trained(network, config.learning_rate, schedule=self._schedule, clip=1.0, average=config.ema)}

    def _schedule(self, update):
        return warmed_cosine(update, self.config.steps, self.config.warmup)

    def update(self, step: Step, batch: Batch, draw: Draw) -> None:
        """|x - D(z)| at z drawn of the posterior, or at the nearest vectors of the codebook, and the regularisation."""
        x = batch.images
        decoded, penalty = (self._drawn if self.config.regularisation == "kl" else self._quantised)(x, draw)
        error = (decoded - x).abs().mean()
        loss = error + penalty
        step("student", loss)
        step.log(loss=loss.detach(), error=error.detach())

    def _drawn(self, x, draw):
        """Images of latents drawn of each posterior N(mean, std^2), and its divergence from N(0, I) for each pixel."""
        posterior = self.network.encode(x).latent_dist
        z = posterior.mean + posterior.std * draw.normal("z", *posterior.mean.shape[1:])
        return self.network.decode(z).sample, self.config.kl * posterior.kl().mean() / x[0].numel()

    def _quantised(self, x, draw):
        """Images of the nearest vectors of the codebook, with the distances that move these and the encoder together."""
        output = self.network.decode(self.network.encode(x).latents)
        return output.sample, output.commit_loss.mean()
