"""A small image classifier. Frechet distances of small data sets are measured in its features; one of noisy images guides."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.images import normalize
from ..errors import InputError
from ..ops import philox_normal
from ..ops.arguments import finite
from ..runtime.hub import PRETRAINED
from .saving import PretrainedModule

BATCH_PIXELS = 2**22
"""Pixels that are looked at together where all images of a data set are."""

NEAREST = 2.0**-30
"""Distance from 0 and 1 within which a classifier of noisy images is told the same alpha_bar, as c_noise is infinite there."""

Level = float | torch.Tensor
"""alpha_bar in [0, 1]: a number for all images, or a tensor ``(N,)`` of any floating-point dtype."""


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
        noisy: True for a classifier of noisy images, which is told their alpha_bar.

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
    noisy: bool = False

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

    One of noisy images is told their level by a further, constant channel, c_noise = log(sigma) / 4 with
    sigma = sqrt((1 - alpha_bar) / alpha_bar) (Karras et al. 2022, table 1). Its weights are float32.
    ``Classifier.from_pretrained("digits")`` loads the embedded classifier of handwritten digits, ``"glyphs"`` that of glyphs.

    Args:
        config: a :class:`ClassifierConfig`.

    Examples:
        >>> classifier = Classifier.from_pretrained("digits")
        >>> classifier(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    config_class = ClassifierConfig
    embedded = {name: PRETRAINED / f"{name}-classifier" for name in ("digits", "glyphs")}
    training_keys = ("accuracy",)
    config: ClassifierConfig
    scale: torch.Tensor

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        layers, features = [], config.image_channels + config.noisy
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

        Raises:
            InputError: the classifier is of noisy images.
        """
        return self.embedding(self.trunk(self._with_level(x, None))) / self.scale

    def forward(self, x: torch.Tensor, alpha_bar: Level | None = None) -> torch.Tensor:
        """Logits of images.

        Args:
            x: ``(N, C, S, S)`` images in [-1, 1], or x_t for a classifier of noisy images; of the classifier's dtype (float32)
                and on its device.
            alpha_bar: of x_t, a number or ``(N,)``, in [0, 1]; None for clean images.

        Returns:
            ``(N, classes)`` like ``x``, unnormalised.

        Raises:
            InputError: an alpha_bar that cannot be, one for a classifier of clean images, or none for one of noisy images.
        """
        return self.head(self.embedding(self.trunk(self._with_level(x, alpha_bar))))

    def log_probability(self, x_t: torch.Tensor, alpha_bar: Level, labels: torch.Tensor) -> torch.Tensor:
        """log p(y | x_t) of a classifier of noisy images; puts it in eval mode.

        Args:
            x_t: ``(N, C, S, S)``, of the classifier's dtype (float32) and on its device.
            alpha_bar: of x_t, a number or ``(N,)``, in [0, 1].
            labels: ``(N,)`` int64 classes, on that device.

        Returns:
            ``(N,)`` like ``x_t``, differentiable in it.

        Raises:
            InputError: a classifier of clean images, an alpha_bar that cannot be, or labels of another shape.
        """
        if labels.shape != x_t.shape[:1]:
            raise InputError(f"labels must have shape {tuple(x_t.shape[:1])}, got {tuple(labels.shape)}")
        return -F.cross_entropy(self.eval()(x_t, alpha_bar), labels, reduction="none")

    def log_probability_gradient(self, x_t: torch.Tensor, alpha_bar: Level, labels: torch.Tensor) -> torch.Tensor:
        """Gradient of log p(y | x_t) in x_t, which guides a sampler (Dhariwal and Nichol 2021, algorithm 1).

        Args:
            x_t: as for :meth:`log_probability`.
            alpha_bar: as for :meth:`log_probability`.
            labels: as for :meth:`log_probability`.

        Returns:
            A tensor like ``x_t``, without a graph.

        Raises:
            InputError: as :meth:`log_probability` does.
        """
        # Samplers run without gradients, or in inference mode, whose tensors autograd does not take.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_probability(x, alpha_bar, labels.clone()).sum(), x)
        return gradient

    def _with_level(self, x, alpha_bar):
        """Images with the channel of their level, where the classifier takes one."""
        if not self.config.noisy:
            if alpha_bar is not None:
                raise InputError("alpha_bar: the classifier is of clean images; train one with --noisy")
            return x
        if alpha_bar is None:
            raise InputError("alpha_bar is missing: the classifier is of noisy images")
        level = _checked_level(alpha_bar, x).clamp(NEAREST, 1 - NEAREST)
        c_noise = ((1 - level) / level).log() / 8
        return torch.cat([x, c_noise.to(x.dtype).expand(len(x), 1, *x.shape[2:])], dim=1)

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
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor, alpha_bar: float | None = None) -> float:
        """Share of images whose class is found; puts the classifier in eval mode.

        Images may be in another device's memory than the classifier, which takes :data:`BATCH_PIXELS` at a time.

        Args:
            images: ``(N, C, S, S)``, float32 in [-1, 1] or uint8, and N at least 1.
            labels: ``(N,)`` numbers of their classes, on any device.
            alpha_bar: level, in [0, 1], at which a classifier of noisy images sees them, with noise that depends on their row
                alone; None for clean images.

        Returns:
            Fraction of the images whose largest logit is that of their class, in [0, 1].

        Raises:
            InputError: there are no images, or an alpha_bar that cannot be.
        """
        found, start = [], 0
        for part in self._batches(images):
            if alpha_bar is not None:
                rows = torch.arange(start, start + len(part), dtype=torch.int64, device=part.device)
                part = add_noise(part, philox_normal(0, rows, part.shape[1:], stream="x_T"), alpha_bar)
            found.append(self(part, alpha_bar).argmax(dim=1).to(labels.device))
            start += len(part)
        return (torch.cat(found) == labels).double().mean().item()

    def _batches(self, images):
        """Batches of images in [-1, 1] on the classifier's device, which is in eval mode then."""
        if len(images) == 0:
            raise InputError("images: there is none")
        self.eval()
        batch = max(1, BATCH_PIXELS // images[0, 0].numel())
        return (normalize(part.to(self.scale.device)) for part in images.split(batch))


def add_noise(images: torch.Tensor, noise: torch.Tensor, alpha_bar: Level) -> torch.Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.

    Args:
        images: x_0, ``(N, C, S, S)``.
        noise: eps, like ``images``.
        alpha_bar: a number or ``(N,)``, in [0, 1].

    Returns:
        x_t, like ``images``.

    Raises:
        InputError: an alpha_bar that cannot be.
    """
    level = _checked_level(alpha_bar, images)
    return level.sqrt().to(images.dtype) * images + (1 - level).sqrt().to(images.dtype) * noise


def _checked_level(alpha_bar, images):
    """alpha_bar as float64 that broadcasts over images."""
    given = alpha_bar.double() if isinstance(alpha_bar, torch.Tensor) else _on_host(finite("alpha_bar", alpha_bar))
    if given.shape not in ((), images.shape[:1]):
        raise InputError(f"alpha_bar must be a number or have shape {tuple(images.shape[:1])}, got shape {tuple(given.shape)}")
    # A GPU's values are not waited for: a sampler's step may be captured as a graph.
    if given.device.type == "cpu" and not ((given >= 0) & (given <= 1)).all():
        raise InputError(f"alpha_bar must be in [0, 1], got {alpha_bar}")
    return given.to(images.device).reshape(-1, *[1] * (images.ndim - 1))


def _on_host(number):
    return torch.tensor(number, dtype=torch.float64, device="cpu")
