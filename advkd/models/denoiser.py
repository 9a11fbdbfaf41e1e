"""Networks of denoiser students: a diffusers UNet told a timestep and, beside it, a class, a guidance weight and a latent.

Networks of super-resolution are told a noised low image, as further channels of the state, and the level of its noise.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .saving import PretrainedModule

if TYPE_CHECKING:
    from diffusers import UNet2DModel

FREQUENCIES = 32
"""Frequencies at which a guidance weight or a level is embedded."""

LEVEL_SCALE = 20.0
"""Steps of noise that are one unit of a level's embedding, so that levels of 1,000 timesteps have the range of weights."""


class LowImage(NamedTuple):
    """Conditions of a super-resolution network.

    Attributes:
        image: ``(N, C, h, w)`` low images with their noise.
        level: ``(N,)`` int64, how many steps of noise they have; 0 for none.
    """

    image: torch.Tensor
    level: torch.Tensor


@dataclass
class ConditionConfig:
    """Conditions of a network, each embedded and added to its time embedding.

    Attributes:
        width: numbers of the time embedding.
        classes: classes of the label's table, the null class among them (0: no label).
        guidance: largest guidance weight w that the network was trained with (0: it takes none).
        latent: numbers of the latent u (0: none).
        low_size: side of the low images that a super-resolution network is told (0: none).
        low_level: largest level of their noise that it was trained with, in timesteps (0: they had none).
    """

    width: int = 64
    classes: int = 0
    guidance: float = 0.0
    latent: int = 0
    low_size: int = 0
    low_level: int = 0


class ConditionEmbedding(PretrainedModule):
    """Sum of the embeddings of a class, a weight, a level and a latent, which takes the place of a UNet's class embedding.

    A condition is one float tensor, as :func:`pack` makes it, so that whatever hands labels on hands it on. All parts but the
    class's end in layers that are zero at first: a network begins as it was without them.

    Args:
        config: a :class:`ConditionConfig`.

    Raises:
        InputError: no condition at all, or negative numbers.
    """

    config_class = ConditionConfig
    config: ConditionConfig

    def __init__(self, config: ConditionConfig):
        super().__init__()
        limits = (config.classes, config.guidance, config.latent, config.low_size)
        least = min(*limits, config.low_level)
        if config.width < 1 or least < 0 or max(limits) <= 0 or not math.isfinite(config.guidance):
            raise InputError(f"width must be positive, the others not negative, and one but low_level positive, got {config}")
        self.config = config
        if config.classes:
            self.label = nn.Embedding(config.classes, config.width)
        if config.guidance:
            self.guidance = _ending_in_zero(2 * FREQUENCIES, config.width)
        if config.low_size:
            self.level = _ending_in_zero(2 * FREQUENCIES, config.width)
        if config.latent:
            self.latent = _ending_in_zero(config.latent, config.width)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """The embedding that is added to the time embedding.

        Args:
            condition: ``(N, k)`` floats of :func:`pack`: the class, the weight, the level and the latent, those that there are.

        Returns:
            ``(N, width)``.
        """
        dtype, config = next(self.parameters()).dtype, self.config
        found = condition.new_zeros((), dtype=dtype)
        if config.classes:
            found, condition = found + self.label(condition[:, 0].round().long()), condition[:, 1:]
        if config.guidance:
            found, condition = found + self.guidance(_waves(condition[:, 0]).to(dtype)), condition[:, 1:]
        if config.low_size:
            found, condition = found + self.level(_waves(condition[:, 0] / LEVEL_SCALE).to(dtype)), condition[:, 1:]
        return found + self.latent(condition.to(dtype)) if config.latent else found


def pack(
    labels: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    level: torch.Tensor | None = None,
) -> torch.Tensor:
    """Conditions as the one tensor that a :class:`ConditionEmbedding` takes.

    Args:
        labels: ``(N,)`` classes, or None.
        guidance: ``(N,)`` weights w, or None.
        latent: ``(N, d)`` latents, or None.
        level: ``(N,)`` levels of low images, or None.

    Returns:
        ``(N, k)`` float32, float64 where one of them is; classes below 2^24 are exact.
    """
    columns = [part.reshape(len(part), -1) for part in (labels, guidance, level, latent) if part is not None]
    wide = any(part.dtype == torch.float64 for part in columns)
    return torch.cat([part.to(torch.float64 if wide else torch.float32) for part in columns], dim=1)


def beside(x: torch.Tensor, low: LowImage) -> tuple[torch.Tensor, torch.Tensor]:
    """State and condition as a super-resolution network takes them.

    Args:
        x: ``(N, C, H, W)`` states.
        low: low images whose sides divide H and W.

    Returns:
        ``(N, 2 C, H, W)``, the states and the low images, each of whose pixels is repeated, in the dtype of ``x``; and
        :func:`pack` of the levels.
    """
    return torch.cat((x, F.interpolate(low.image.to(x.dtype), x.shape[2:])), dim=1), pack(level=low.level)


def evaluate(
    unet: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | LowImage | None = None
) -> torch.Tensor:
    """The output of a UNet.

    Args:
        unet: ``UNet2DModel``.
        x: ``(N, C, H, W)`` variance-preserving states, which are converted to the dtype of its weights.
        t: ``(N,)`` or ``(1,)`` timesteps, float32 between whole ones.
        condition: ``(N,)`` classes, ``(N, k)`` of :func:`pack`, low images, or None.

    Returns:
        ``(N, C, H, W)``; gradients flow.
    """
    x = x.to(next(unet.parameters()).dtype)
    if isinstance(condition, LowImage):
        x, condition = beside(x, condition)
    told = {} if condition is None else {"class_labels": condition}
    return unet(x, t, **told, return_dict=False)[0]


class DenoiserNetwork(nn.Module):
    """A diffusers UNet as the network of :class:`advkd.diffusion.denoiser.Denoiser`.

    Args:
        unet: ``UNet2DModel``.
    """

    def __init__(self, unet: "UNet2DModel"):
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | LowImage | None = None) -> torch.Tensor:
        """The network's output; arguments and result as of :func:`evaluate`.

        Args:
            x: ``(N, C, H, W)`` variance-preserving states.
            t: ``(N,)`` timesteps, float32 between whole ones.
            condition: ``(N,)`` classes, ``(N, k)`` of :func:`pack`, low images, or None.

        Returns:
            ``(N, C, H, W)``.
        """
        return evaluate(self.unet, x, t, condition)


def embedding_of(unet: nn.Module) -> ConditionEmbedding | None:
    """The conditions that a UNet takes beside classes of its own table.

    Args:
        unet: ``UNet2DModel``.

    Returns:
        Its :class:`ConditionEmbedding`, or None.
    """
    found = getattr(unet, "class_embedding", None)
    return found if isinstance(found, ConditionEmbedding) else None


def with_condition(
    unet: "UNet2DModel", guidance: float = 0.0, latent: int = 0, low_size: int = 0, low_level: int = 0
) -> "UNet2DModel":
    """A copy of a UNet that takes a guidance weight, a latent or a low image, too, and at first gives what it gave.

    Args:
        unet: ``UNet2DModel``, unconditional or with a table of classes.
        guidance: largest weight w (0: none).
        latent: numbers of the latent (0: none).
        low_size: side of the low images, which are further channels of its input (0: none).
        low_level: largest level of their noise.

    Returns:
        ``UNet2DModel`` whose ``class_embedding`` is a :class:`ConditionEmbedding`.
    """
    from diffusers import UNet2DModel

    table = unet.class_embedding
    classes = table.num_embeddings if isinstance(table, nn.Embedding) else 0
    width = unet.time_embedding.linear_2.out_features
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    channels = unet.config.in_channels * (1 + bool(low_size))
    changed = UNet2DModel(**{**config, "class_embed_type": "identity", "num_class_embeds": None, "in_channels": channels})
    weights = {name: tensor for name, tensor in unet.state_dict().items() if not name.startswith("class_embedding.")}
    if low_size:
        first = weights["conv_in.weight"]
        weights["conv_in.weight"] = torch.cat((first, torch.zeros_like(first)), dim=1)
    changed.load_state_dict(copy.deepcopy(weights))
    embedding = ConditionEmbedding(ConditionConfig(width, classes, guidance, latent, low_size, low_level))
    if classes:
        embedding.label.load_state_dict(table.state_dict())
    changed.class_embedding = embedding
    parameter = next(unet.parameters())
    changed = changed.to(parameter.device)
    return changed if parameter.dtype == torch.float32 else changed.to(parameter.dtype)


def _ending_in_zero(inputs, outputs):
    layers = nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


def _waves(weight):
    """Cosines and sines of weights at periods from 1/2 to about 60, before they are rounded to half precision."""
    steps = torch.arange(FREQUENCIES, dtype=weight.dtype, device=weight.device) / (FREQUENCIES - 1)
    angles = weight[:, None] * (0.1 * 120.0**steps)
    return torch.cat((angles.cos(), angles.sin()), dim=1)
