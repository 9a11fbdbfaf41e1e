"""The critic of one level: DCGAN-like strided convolutions, no batch norm (the gradient penalty is per sample)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .saving import PretrainedModule


@dataclass
class CriticConfig:
    """Shape of a critic.

    Attributes:
        image_size: side of the level's images in pixels, 4 * 2^k.
        image_channels: channels of the images, at least 1.
        channels: features after the first strided convolution; they double with each further one.
        max_channels: upper bound of the features.
        condition_channels: channels of the condition, 0 for an unconditional critic.
        condition_size: side of the condition in pixels. 4: it joins the 4x4 features. ``image_size``: it joins the image, and
            its area averages the 4x4 features.
        slope: of LeakyReLU, in [0, 1).

    Raises:
        InputError: a value out of its range.
    """

    image_size: int = 32
    image_channels: int = 1
    channels: int = 32
    max_channels: int = 128
    condition_channels: int = 0
    condition_size: int = 4
    slope: float = 0.2

    def __post_init__(self) -> None:
        if self.image_size < 4 or self.image_size & (self.image_size - 1):
            raise InputError(f"image_size must be 4 * 2^k, got {self.image_size}")
        if min(self.image_channels, self.channels, self.max_channels) < 1 or self.condition_channels < 0:
            raise InputError("image_channels, channels and max_channels must be positive, condition_channels not negative")
        if self.condition_size not in (4, self.image_size):
            raise InputError(f"condition_size must be 4 or the image_size {self.image_size}, got {self.condition_size}")
        if not 0 <= self.slope < 1:
            raise InputError(f"slope must be in [0, 1), got {self.slope}")


class Critic(PretrainedModule):
    """A network that scores images: ``critic(x)`` or ``critic(x, condition)`` -> ``(N,)`` scores (Wasserstein: unbounded).

    Strided 4x4 convolutions bring the image to 4x4, where a conditional critic joins the condition; a 3x3 convolution and
    a linear map follow. A condition of the image's own size joins the image, too. It is made of layers that
    :func:`advkd.ops.gradient_penalty` takes.

    Args:
        config: a :class:`CriticConfig`.

    Examples:
        >>> Critic(CriticConfig(image_size=8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    config_class = CriticConfig
    config: CriticConfig

    def __init__(self, config: CriticConfig):
        super().__init__()
        self.config = config
        self.joins_image = config.condition_channels > 0 and config.condition_size > 4
        layers, features, wider, side = [], config.image_channels, config.channels, config.image_size
        features += config.condition_channels if self.joins_image else 0
        while side > 4:
            layers += [nn.Conv2d(features, wider, 4, stride=2, padding=1), nn.LeakyReLU(config.slope)]
            features, wider, side = wider, min(2 * wider, config.max_channels), side // 2
        self.trunk = nn.Sequential(*layers)
        self.tail = nn.Sequential(
            nn.Conv2d(features + config.condition_channels, wider, 3, padding=1),
            nn.LeakyReLU(config.slope),
            nn.Flatten(),
            nn.Linear(16 * wider, 1),
        )

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of images.

        Args:
            x: ``(N, C, S, S)`` images in the critic's dtype, on its device.
            condition: ``(N, condition_channels, condition_size, condition_size)`` where the configuration has one, else None.

        Returns:
            ``(N,)`` in ``x``'s dtype, on its device, unbounded; differentiable any number of times.

        Raises:
            InputError: a condition that the critic does not take, or none where it takes one.
        """
        if (condition is None) != (self.config.condition_channels == 0):
            raise InputError(f"condition must have {self.config.condition_channels} channels, got {condition}")
        if condition is None:
            return self.tail(self.trunk(x)).squeeze(1)
        if self.joins_image:
            x, condition = torch.cat((x, condition), dim=1), F.avg_pool2d(condition, self.config.condition_size // 4)
        return self.tail(torch.cat((self.trunk(x), condition), dim=1)).squeeze(1)
