"""A small image classifier; its features are what Frechet distances of small data sets are measured in."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError
from ..hub import PRETRAINED
from .saving import PretrainedModule


@dataclass
class ClassifierConfig:
    """Shape of a classifier.

    Attributes:
        name: of the data it was trained on; a Frechet distance in its features is called ``FD-name``.
        image_size: side of the images, 4 * 2^k.
        image_channels: channels of the images.
        classes: number of classes.
        channels: features of the strided stages, from the highest resolution to 4x4.
        num_features: features of an image.
        slope: of LeakyReLU.
    """

    name: str = "digits"
    image_size: int = 32
    image_channels: int = 1
    classes: int = 10
    channels: tuple[int, ...] = field(default=(32, 64, 64))
    num_features: int = 64
    slope: float = 0.2

    def __post_init__(self):
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise InputError(f"image_size must be 4 * 2^k and at least 8, got {self.image_size}")
        if self.image_size >> len(self.channels) != 4:
            raise InputError(f"channels must have one entry per halving of {self.image_size} down to 4, got {self.channels}")
        if min(self.image_channels, self.classes, self.num_features, *self.channels) < 1:
            raise InputError("image_channels, classes, channels and num_features must be positive")
        if not 0 <= self.slope < 1:
            raise InputError(f"slope must be in [0, 1), got {self.slope}")


class Classifier(PretrainedModule, nn.Module):
    """Strided convolutions to 4x4, a linear map to ``num_features`` features, LeakyReLU, a linear map to the classes.

    Args:
        config: a :class:`ClassifierConfig`.
    """

    config_class = ClassifierConfig
    embedded = {"digits": PRETRAINED / "digits-classifier"}
    training_keys = ("accuracy",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        layers, features = [], config.image_channels
        for width in config.channels:
            layers += [
                nn.Conv2d(features, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(config.slope),
                nn.Conv2d(width, width, 4, stride=2, padding=1),
                nn.LeakyReLU(config.slope),
            ]
            features = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.embedding = nn.Sequential(nn.Linear(16 * features, config.num_features), nn.LeakyReLU(config.slope))
        self.head = nn.Linear(config.num_features, config.classes)
        self.register_buffer("scale", torch.ones(()))

    def features(self, x):
        """Features ``(N, num_features)`` of images ``(N, C, S, S)`` in [-1, 1], of mean square 1 on the training images."""
        return self.embedding(self.trunk(x)) / self.scale

    def forward(self, x):
        """Logits ``(N, classes)`` of images ``(N, C, S, S)`` in [-1, 1]."""
        return self.head(self.embedding(self.trunk(x)))

    @torch.no_grad()
    def calibrate(self, images):
        """Set the features' common scale, so that their mean square over ``images`` is 1."""
        self.scale.fill_(1.0)
        self.scale.copy_(self.eval().features(images).square().mean().sqrt())

    @torch.no_grad()
    def accuracy(self, images, labels):
        """Fraction of ``images`` in [-1, 1] whose class is found."""
        return (self.eval()(images).argmax(dim=1) == labels).double().mean().item()
