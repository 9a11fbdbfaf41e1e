"""Glyphs: a procedural, labelled, unlimited data set in colour, letters and digits in the fonts that matplotlib brings.

An image is a function of (seed, index), drawn by Philox's counters: the same scene at every size. FreeType, which Pillow
brings, draws the outlines, so that pixels are equal for equal versions of both and alike for others (:func:`versions`).
"""

import colorsys
import importlib.metadata
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..ops import philox_words
from ..ops.arguments import whole
from ..runtime.files import digest

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
"""Fonts of the data set, files of matplotlib."""

HELD_OUT_FONTS = ("DejaVuSerif-BoldItalic", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "STIXGeneralBolIta")
"""Fonts that no image of the data set is in: a model that reads them has learned letters, not files."""

DIGITS = "0123456789"
"""Characters of the digits, in the order of their labels."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijmnqrty"
"""Letters, without the lower-case ones that differ from capitals by size alone, or from a capital I by nothing."""

CLASSES = {"digits": DIGITS, "letters": LETTERS, "all": LETTERS + DIGITS}
"""Characters by the name of their set; a label is a place in its set."""

TRAINED = 2**15
"""Images of the training range, the indices from 0 on; a data set of more begins with these."""

HELD_OUT = 2**40
"""First index of the held-out range, which no training reaches."""

LARGEST = 512
"""Pixels that a side may have."""

_NUMBERS = 16
"""Random words of an image."""

_STEP = zlib.crc32(b"glyphs") % 2**24
"""Keeps these counters apart from those of training's draws."""

_CANVAS = 128
"""Least side that outlines are drawn at before they are averaged down: small images are sharp, too."""


def draw_glyphs(
    indices: range | Sequence[int],
    size: int = 32,
    classes: str = "all",
    seed: int = 0,
    fonts: Sequence[str] = FONTS,
    labels: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of glyphs, each a letter or digit on a gradient with its shadow, in some font, colour, size, place and angle.

    Args:
        indices: numbers of the images, in [0, 2^62).
        size: side in pixels, 4 * 2^k, from 8 to 512.
        classes: ``digits``, ``letters`` or ``all``.
        seed: int in [0, 2^64).
        fonts: names of :data:`FONTS` or :data:`HELD_OUT_FONTS`, which images take at random.
        labels: class of every image instead of a random one.

    Returns:
        ``(images, labels)``: uint8 ``(N, 3, size, size)`` and int64 ``(N,)``, on the CPU.

    Raises:
        InputError: an argument out of its range, or a font that is not there.

    Examples:
        >>> images, labels = draw_glyphs(range(4), size=32, classes="digits")
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """
    size, paths, names = require_glyphs(size, classes), _font_paths(fonts), CLASSES[classes]
    numbers = _numbers(indices, seed)
    chosen = _labels(numbers, names) if labels is None else _given(labels, len(numbers), names)
    images = np.empty((len(numbers), size, size, 3), dtype=np.uint8)
    for image, u, label in zip(images, numbers, chosen):
        image[:] = _picture(names[label], paths[int(u[1] * len(paths))], u[2:], size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(chosen)


def glyph_labels(indices: range | Sequence[int], classes: str = "all", seed: int = 0) -> torch.Tensor:
    """Classes of images that :func:`draw_glyphs` chooses, without the drawing.

    Args:
        indices: numbers of the images, in [0, 2^62).
        classes: ``digits``, ``letters`` or ``all``.
        seed: int in [0, 2^64).

    Returns:
        int64 ``(N,)`` on the CPU, places in :data:`CLASSES`.

    Raises:
        InputError: an argument out of its range.
    """
    require_glyphs(LARGEST, classes)
    return torch.from_numpy(_labels(_numbers(indices, seed, 1), CLASSES[classes]))


def require_glyphs(size: int, classes: str) -> int:
    """Check a size and a set of classes.

    Args:
        size: side in pixels.
        classes: name of a set.

    Returns:
        The size as an int.

    Raises:
        InputError: a size that is not 4 * 2^k from 8 to 512, or a set that is none.
    """
    size = whole("size", size)
    if not 8 <= size <= LARGEST or size & (size - 1):
        raise InputError(f"size of glyphs must be 4 * 2^k from 8 to {LARGEST}, got {size}")
    if not isinstance(classes, str) or classes not in CLASSES:
        raise InputError(f"classes of glyphs must be one of {', '.join(CLASSES)}, got {classes!r}")
    return size


def versions() -> dict[str, Any]:
    """Versions that pixels depend on beside (seed, index): two data sets with equal ones are equal bit for bit.

    Returns:
        ``matplotlib``, ``pillow`` and ``freetype``, versions, and ``digest``, the SHA-256 of 51 images of 32x32.
    """
    from PIL import features

    images, labels = draw_glyphs(range(51), labels=range(51))
    named = {name: importlib.metadata.version(name) for name in ("matplotlib", "pillow")}
    return {**named, "freetype": features.version("freetype2"), "digest": digest({"images": images, "labels": labels})}


def _numbers(indices, seed, count=_NUMBERS):
    """Random numbers in [0, 1) of every image, float64 ``(N, count)``."""
    places = [*indices[:1], *indices[-1:]] if isinstance(indices, range) else _values("indices", indices)
    places = [whole("indices", index, 0, 2**62) for index in places]
    if not isinstance(indices, range):
        indices = torch.tensor(places, dtype=torch.int64, device="cpu")
    return philox_words(seed, indices, count, stream="draw", step=_STEP).numpy() / 2.0**32


def _labels(numbers, names):
    return (numbers[:, 0] * len(names)).astype(np.int64)


def _given(labels, count, names):
    """Classes that the caller has chosen."""
    found = np.array([whole("labels", label, 0, len(names)) for label in _values("labels", labels)], dtype=np.int64)
    if len(found) != count:
        raise InputError(f"labels must be one of each image: there are {count} images and {len(found)} labels")
    return found


def _values(name, values):
    """A sequence's values as a list."""
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name} must be a sequence of whole numbers, got {values!r}") from None


def _font_paths(fonts):
    known = (*FONTS, *HELD_OUT_FONTS)
    if not isinstance(fonts, (list, tuple)) or not fonts or any(name not in known for name in fonts):
        raise InputError(f"fonts must be some of {', '.join(known)}; got {fonts!r}")
    return [_font_path(name) for name in fonts]


def _font_path(name):
    from matplotlib import get_data_path

    path = Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")
    if not path.exists():
        raise InputError(f"the font {name} is not among matplotlib's files: install matplotlib from its wheel")
    return str(path)


@lru_cache(maxsize=4096)
def _font(path, pixels):
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ImportError) as error:
        raise InputError(
            f"the font {path} cannot be read ({error}): install matplotlib and Pillow from their wheels"
        ) from error


def _picture(character, path, u, size):
    """``(size, size, 3)`` in 0 .. 255 of random numbers u in [0, 1)."""
    mask = _mask(character, path, u[:4], size)
    reach = round(0.05 * len(mask))
    shadow = np.zeros_like(mask)
    shadow[reach:, reach:] = mask[:-reach, :-reach]
    ink = np.array(colorsys.hsv_to_rgb(u[4], 0.6 + 0.4 * u[5], 0.2 + 0.5 * u[6]))
    image = _background((u[4] + 0.3 + 0.4 * u[7]) % 1, u[8:12], size)
    image *= 1 - 0.35 * _averaged(shadow, size)
    cover = _averaged(mask, size)
    return np.rint(255 * (image * (1 - cover) + ink * cover))


def _mask(character, path, u, size):
    """The character's coverage in [0, 1], in the middle of a canvas, then turned and moved."""
    from PIL import Image, ImageDraw

    side = max(_CANVAS, 2 * size)
    font = _font(path, int(side * (0.7 + 0.2 * u[0])))
    layer = Image.new("L", (side, side))
    draw = ImageDraw.Draw(layer)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
    draw.text(((side - left - right) / 2, (side - top - bottom) / 2), character, fill=255, font=font)
    angle = math.radians(30 * u[1] - 15)
    cosine, sine, middle = math.cos(angle), math.sin(angle), side / 2
    x, y = (middle + 0.16 * side * (v - 0.5) for v in u[2:4])
    rows = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
    turned = layer.transform((side, side), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)
    return np.asarray(turned, dtype=np.float32) / 255


def _background(hue, u, size):
    """A light gradient from one colour to its neighbour, in any direction."""
    first = np.array(colorsys.hsv_to_rgb(hue, 0.1 + 0.3 * u[0], 0.85 + 0.15 * u[1]))
    second = np.array(colorsys.hsv_to_rgb((hue + 0.08) % 1, 0.3, 0.65 + 0.3 * u[2]))
    angle, places = 2 * math.pi * u[3], (np.arange(size) + 0.5) / size - 0.5
    ramp = 0.5 + (places[:, None] * math.sin(angle) + places * math.cos(angle)) / math.sqrt(2)
    return first + (second - first) * ramp[..., None]


def _averaged(mask, size):
    """Means of a canvas's squares, ``(size, size, 1)``."""
    factor = len(mask) // size
    return mask.reshape(size, factor, size, factor).mean((1, 3), dtype=np.float32)[..., None]
