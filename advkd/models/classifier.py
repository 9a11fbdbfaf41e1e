"""A small image classifier; its features are what Frechet distances of small data sets are measured in."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data.images import normalize
from ..errors import InputError
from ..runtime.hub import PRETRAINED
from .saving import PretrainedModule

BATCH_PIXELS = 2**22
"""Pixels that are looked at together where all images of a data set are."""


@dataclass
class ClassifierConfig:
    """Shape of a classifier.

    Attributes:
        name: of the data it was trained on; a Frechet distance in its features is called ``FD-name``.
        image_size: side of the images in pixels, 4 * 2^k and at least 8.
        image_channels: channels of the images.
        classes: number of classes.
        channels: features of the strided stages, from the highest resolution to 4x4: one for each halving.
        num_features: features of an image.
        slope: of LeakyReLU, in [0, 1).

    Raises:
        InputError: a value out of its range, or ``channels`` that do not lead to 4x4.
    """

    name: str = "digits"
    image_size: int = 32
    image_channels: int = 1
    classes: int = 10
    channels: tuple[int, ...] = field(default=(32, 64, 64))
    num_features: int = 64
    slope: float = 0.2

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise InputError(f"image_size must be 4 * 2^k and at least 8, got {self.image_size}")
        if self.image_size >> len(self.channels) != 4:
            raise InputError(f"channels must have one entry per halving of {self.image_size} down to 4, got {self.channels}")
        sizes = (self.image_channels, self.classes, self.num_features, *self.channels)
        if not all(isinstance(size, int) for size in sizes):
            raise InputError(f"image_channels, classes, channels and num_features must be whole numbers, got {sizes}")
        if min(sizes) < 1:
            raise InputError("image_channels, classes, channels and num_features must be positive")
        if not 0 <= self.slope < 1:
            raise InputError(f"slope must be in [0, 1), got {self.slope}")


class Classifier(PretrainedModule):
    """Strided convolutions to 4x4, a linear map to ``num_features`` features, LeakyReLU, a linear map to the classes.

    Its weights are float32. ``Classifier.from_pretrained("digits")`` loads the embedded classifier of handwritten digits.

    Args:
        config: a :class:`ClassifierConfig`.

    Examples:
        >>> classifier = Classifier.from_pretrained("digits")
        >>> classifier(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    config_class = ClassifierConfig
    embedded = {"digits": PRETRAINED / "digits-classifier"}
    training_keys = ("accuracy",)
    config: ClassifierConfig
    scale: torch.Tensor

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        layers, features = [], config.image_channels
        for width in config.channels:
            layers += [
                nn.Conv2d(features, width, 3, padding=1, bias=False, dtype=torch.float32),
                nn.BatchNorm2d(width, dtype=torch.float32),
                nn.LeakyReLU(config.slope),
                nn.Conv2d(width, width, 4, stride=2, padding=1, dtype=torch.float32),
                nn.LeakyReLU(config.slope),
            ]
            features = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        embedding = nn.Linear(16 * features, config.num_features, dtype=torch.float32)
        self.embedding = nn.Sequential(embedding, nn.LeakyReLU(config.slope))
        self.head = nn.Linear(config.num_features, config.classes, dtype=torch.float32)
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            x: ``(N, C, S, S)`` float32 images in [-1, 1], on the classifier's device.

        Returns:
            ``(N, num_features)`` float32 on that device, of mean square 1 on the training images (:meth:`calibrate`).
        """
        return self.embedding(self.trunk(x)) / self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images.

        Args:
            x: ``(N, C, S, S)`` float32 images in [-1, 1], on the classifier's device.

        Returns:
            ``(N, classes)`` float32 on that device, unnormalised.
        """
        return self.head(self.embedding(self.trunk(x)))

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor) -> None:
        """Set the features' common scale, so that their mean square over ``images`` is 1; puts the classifier in eval mode.

        Args:
            images: as for :meth:`accuracy`.

        Raises:
            InputError: there are no images.
        """
        batches = self._batches(images)
        self.scale.fill_(1.0)
        squares: Any = sum(self.features(part).double().square().sum() for part in batches)
        self.scale.copy_((squares / (len(images) * self.config.num_features)).sqrt())

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of images whose class is found; puts the classifier in eval mode.

        Images may be in another device's memory than the classifier, which takes :data:`BATCH_PIXELS` at a time.

        Args:
            images: ``(N, C, S, S)``, float32 in [-1, 1] or uint8, and N at least 1.
            labels: ``(N,)`` numbers of their classes, on any device.

        Returns:
            Fraction of the images whose largest logit is that of their class, in [0, 1].

        Raises:
            InputError: there are no images.
        """
        found = torch.cat([self(part).argmax(dim=1).to(labels.device) for part in self._batches(images)])
        return (found == labels).double().mean().item()

    def _batches(self, images):
        """Batches of images in [-1, 1] on the classifier's device, which is in eval mode then."""
        if len(images) == 0:
            raise InputError("images: there is none")
        self.eval()
        batch = max(1, BATCH_PIXELS // images[0, 0].numel())
        return (normalize(part.to(self.scale.device)) for part in images.split(batch))
