"""The shape of a student: its configuration, its convolutions, and how many images it draws at a time."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ..data.levels import resolutions
from ..errors import InputError
from ..ops.arguments import flag, real, whole
from ..ops.conv_layer import ConvLayer
from ..ops.latents import check_latent, latent_parts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class StudentConfig:
    """Shape of a student.

    Attributes:
        image_size: side S of the images in pixels, 4 * 2^k, at least 8 and at most 2^20.
        image_channels: channels C of the images, 1 to 4.
        channels: features of each submodule, at most 2^16; their number is the depth: even, at least 4 and 2 log2(S / 4), at
            most 256.
        latent_size: m, the latent is ``(C m m, 4, 4)``; 1 to S / 4.
        detail_noise: feed the Haar detail bands of the noise before each up-sampling (latent_size must be 1).
        slope: of LeakyReLU, in [0, 1).
        classes: names of the classes that the student is told, unique and at most 2^16; empty: it takes none.
        class_channels: features of a class's learned embedding at 4x4, 1 to 2^16; without classes they have no effect.

    Raises:
        InputError: a value out of its range or of another type; it is named.

    Examples:
        >>> StudentConfig(image_size=32, image_channels=1, channels=(32,) * 6, latent_size=8).image_size
        32
    """

    image_size: int = 256
    image_channels: int = 3
    channels: tuple[int, ...] = field(default=(16, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128))
    latent_size: int = 4
    detail_noise: bool = False
    slope: float = 0.2
    classes: tuple[str, ...] = ()
    class_channels: int = 8

    @property
    def class_features(self) -> int:
        """Input channels of the first convolution that belong to the class; 0 without classes."""
        return self.class_channels if self.classes else 0

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels", "latent_size", "class_channels"):
            setattr(self, name, _integer(name, getattr(self, name)))
        # Products of larger ones are no sizes of tensors.
        if not isinstance(self.channels, (tuple, list)) or any(
            type(c) is not int or not 1 <= c <= 2**16 for c in self.channels
        ):
            raise InputError(f"channels must be positive integers of at most 2^16, got {self.channels!r}")
        self.detail_noise = flag("detail_noise", self.detail_noise)
        if isinstance(self.slope, bool):
            raise InputError(f"slope must be a number, got {self.slope}")
        self.slope = real("slope", self.slope)
        resolutions(self.image_size, len(self.channels))
        check_latent(self.image_size, self.latent_size, self.detail_noise)
        if not 1 <= self.image_channels <= 4:
            raise InputError(f"image_channels must be 1 to 4, got {self.image_channels}")
        if self.image_size > 2**20:
            raise InputError(f"image_size must be at most 2^20, got {self.image_size}")
        if not 0 <= self.slope < 1:
            raise InputError(f"slope must be in [0, 1), got {self.slope}")
        self.classes = _names(self.classes)
        if not 1 <= self.class_channels <= 2**16:
            raise InputError(f"class_channels must be 1 to 2^16, got {self.class_channels}")


def _integer(name, value):
    """``value`` as an int of any size; a flag in its place is a mistake."""
    if isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, got {value}")
    return whole(name, value, -math.inf, math.inf)


def _names(classes):
    """Names of classes as a tuple."""
    if not isinstance(classes, (tuple, list)) or not all(isinstance(name, str) and name for name in classes):
        raise InputError(f"classes must be names, texts that are not empty, got {classes!r}")
    if len(classes) > 2**16:
        raise InputError(f"classes must be at most 2^16 names, got {len(classes)}")
    if len(set(classes)) < len(classes):
        raise InputError(f"classes must have names of their own, got {Counter(classes).most_common(1)[0][0]!r} twice")
    return tuple(classes)


PRESETS = {
    "paper-256": StudentConfig(),
    "pyramid-256": StudentConfig(channels=(144, 144, 144, 144, 128, 128, 64, 64, 48, 48, 32, 32)),
    "digits": StudentConfig(
        image_size=32, image_channels=1, channels=(96, 96, 96, 64, 64, 32, 32, 24, 24, 24, 16, 16), latent_size=8
    ),
    # For latents of a latent teacher of digits, 4x8x8.
    "latent": StudentConfig(
        image_size=8, image_channels=4, channels=(64, 64, 64, 64, 64, 64, 48, 48, 48, 32, 32, 32), latent_size=2
    ),
    # Its classes are those of a run's trajectories.
    "glyphs": StudentConfig(
        image_size=32, channels=(96, 96, 96, 64, 64, 32, 32, 24, 24, 24, 16, 16), latent_size=1, detail_noise=True
    ),
}


@dataclass
class FusedStudentConfig(StudentConfig):
    """A student's shape (the fields of :class:`StudentConfig`) and how it is computed.

    Attributes:
        dtype: name of the dtype of activations and images: float32, bfloat16, float16 or float64.
        algorithms: one of :data:`advkd.ops.conv_layer.ALGORITHMS` per convolution for the ``cpu`` backend; empty: the defaults.

    Raises:
        InputError: a value out of its range or of another type, or algorithms that do not fit the convolutions.
    """

    dtype: str = "float32"
    algorithms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        layers = convolutions(self)
        if self.algorithms and len(self.algorithms) != len(layers):
            raise InputError(f"algorithms must name one for each of the {len(layers)} convolutions, got {len(self.algorithms)}")
        for i, (layer, algorithm) in enumerate(zip(layers, self.algorithms)):
            if algorithm not in layer.algorithms():
                raise InputError(f"algorithms: convolution {i} takes {', '.join(layer.algorithms())}, not {algorithm!r}")


def convolutions(config: StudentConfig) -> list[ConvLayer]:
    """The :class:`ConvLayer` of every convolution of a student, in order."""
    parts = latent_parts(config.image_channels, config.image_size, config.latent_size, config.detail_noise)
    details = {side: channels for channels, side in parts[1:]}
    layers, features, previous = [], parts[0][0] + config.class_features, 4
    for channels, side in zip(config.channels, resolutions(config.image_size, len(config.channels)), strict=True):
        upsample = side > previous
        detail = details.get(previous, 0) if upsample else 0
        layers.append(ConvLayer(features + detail, channels, previous, previous, upsample, detail=detail))
        layers.append(ConvLayer(channels, channels, side, side))
        features, previous = channels, side
    return [*layers, ConvLayer(features, config.image_channels, previous, previous, activation="tanh")]


def batches(n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """A generator of ``(first, count)``, the batches that make ``n`` images; wrong numbers are refused at the call."""
    n, batch_size = whole("n", n), whole("batch_size", batch_size, 1)
    return ((first, min(batch_size, n - first)) for first in range(0, n, batch_size))


def gather(pieces: Iterable[torch.Tensor], n: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Batches of images of one shape ``(C, S, S)`` as one float32 tensor ``(n, C, S, S)`` on the CPU."""
    images, first = torch.empty((int(n), *shape), dtype=torch.float32, device="cpu"), 0
    for piece in pieces:
        images[first : first + len(piece)] = piece
        first += len(piece)
    return images
