"""Decoding of picture files: one file as a picture of mode L or RGB, by the rules of :mod:`advkd.data.images`."""

import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runtime.files import require_regular, why_unreadable

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
"""Pillow's names of the formats that are read."""

PIXEL_LIMIT = 2**27
"""Pixels that a picture may have, whatever Pillow's own limit is set to (Pillow warns of two thirds of that)."""

SCAN_LIMIT = 100
"""Scans that a JPEG may have, as libtiff limits those within a TIFF; encoders write up to twenty."""

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE, _WITHOUT_LENGTH = b"\xff\xda", b"\xff\xd9", (b"\xff\x01", b"\xff\xd8")
_ORIENTATION, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 262, 339
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def open_picture(path: Path) -> tuple["Image.Image", bool]:
    """A decoded picture in its right orientation, mode L or RGB, and whether it has a palette.

    Every error names the file: Pillow's readers raise nearly any exception on damaged ones.
    """
    from PIL import Image, UnidentifiedImageError

    require_regular(path, "image")
    try:
        # These formats alone: others are known by their first bytes, too, and EPS would run Ghostscript.
        with Image.open(path, formats=FORMATS) as image:
            _require_readable(image)
            _require_few_scans(image, path)
            raw = _raw_mode(image)
            image.load()
            return _upright(_plain(image, raw), image), image.mode in ("P", "PA")
    except MemoryError as error:
        raise InputError(f"image {path} cannot be read (there is not enough memory for what it says it holds)") from error
    except Exception as error:
        foreign = ValueError("it is no PNG, JPEG, WebP, BMP, GIF or TIFF file")
        why = why_unreadable(path, foreign if isinstance(error, UnidentifiedImageError) else error)
        raise InputError(f"image {path} cannot be read ({why})") from error


def _require_readable(image):
    """Refuse a picture that is too large, or whose values have no known range."""
    if image.width * image.height > PIXEL_LIMIT:
        size = f"{image.width:,} x {image.height:,} pixels"
        raise ValueError(f"it has {size}, more than the {PIXEL_LIMIT:,} that a picture may have")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "F":
        raise ValueError("floating point has no known range: convert it to 8 or 16 bits")
    if (image.mode == "I" and image.format != "PNG") or set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:
        raise ValueError("32-bit integers and those with a sign have no known range: convert it to 8 or 16 bits without one")
    if image.format == "TIFF" and image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC, 0) == 0:
        raise ValueError("16-bit values of which 0 is white are not supported: convert it to 0 for black")


def _require_few_scans(image, path):
    """Refuse a JPEG that has its pixels decoded again and again: every scan takes the time of a whole picture."""
    if image.format not in ("JPEG", "MPO"):
        return
    # Mapped: films of any length may stand behind a photograph.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as jpeg:
        if (scans := _scans(jpeg)) > SCAN_LIMIT:
            raise ValueError(f"it has {scans:,} scans, more than the {SCAN_LIMIT} that a picture may have")


def _scans(jpeg):
    """Number of scans of the first picture in a JPEG file, from marker to marker up to that of its end."""
    scans, place = 0, 0
    while (marker := _MARKER.search(jpeg, place)) and marker[0] != _END_OF_IMAGE:
        scans += marker[0] == _START_OF_SCAN
        place = marker.end()
        if marker[0] not in _WITHOUT_LENGTH:
            place += int.from_bytes(jpeg[place : place + 2], "big")
    return scans


def _raw_mode(image):
    """Pillow's name for the way in which the file stores a pixel (known until it is decoded), or an empty string."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments if isinstance(arguments, str) else (*(arguments or ()), "")[0]
    return first if isinstance(first, str) else ""


def _upright(picture, image):
    """``picture`` turned as the metadata of its file, ``image``, say.

    ``ImageOps.exif_transpose`` also writes the metadata anew, and fails where it cannot.
    """
    from PIL import Image

    if image.format == "TIFF":  # turned when it was decoded, and not in every version without the tag since
        return picture
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    return picture.transpose(Image.Transpose[turn]) if turn else picture


def _plain(image, raw):
    """A decoded picture in 8 bits over white: mode L if it is gray, else RGB."""
    plain = _blended(_sixteen_to_eight(image, raw), raw)
    if plain.mode == "L":
        return plain
    # Pillow reads 16-bit gray with alpha as colour.
    if raw.startswith("LA;") or (image.mode in ("P", "PA") and _only_grays(plain)):
        return plain.getchannel(0)
    return plain


def _only_grays(image):
    red, green, blue = pixels_of(image)
    return bool((red == green).all() and (green == blue).all())


def _sixteen_to_eight(image, raw):
    """16-bit gray scaled to 8 bits, mode L or LA (Pillow's own conversion clips it to white); others as they are."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values, bits = np.asarray(image).astype(np.uint32), 12 if raw.startswith("I;12") else 16
    # The upper eight bits, as Pillow takes them of 16-bit colours and of gray with alpha.
    gray = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if "transparency" not in image.info:
        return gray
    opaque = values != image.info["transparency"]
    return Image.merge("LA", (gray, Image.fromarray(opaque.astype(np.uint8) * 255)))


def _blended(image, raw):
    """An 8-bit picture over white, in mode L or RGB; opaque pixels keep their values."""
    from PIL import Image

    gray = image.mode in ("1", "L", "LA", "La")
    mode, with_alpha = ("L", "LA") if gray else ("RGB", "RGBA")
    if "transparency" in image.info:
        image = _with_alpha(image, raw, with_alpha)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return in_mode(image, mode)
    image = in_mode(image, with_alpha)
    white = Image.new(mode, image.size, "white")
    white.paste(image.convert(mode), mask=image.getchannel("A"))
    return white


def _with_alpha(image, raw, mode):
    """A picture with a transparent colour or transparent entries of its palette, with an alpha channel instead."""
    clear = image.info["transparency"]
    if image.mode == "RGB" and raw.startswith("RGB;16"):
        raise ValueError("a transparent colour of 16 bits is not supported: convert it to 8 bits, or to an alpha channel")
    if image.mode == "1":
        image, clear = image.convert("L"), 255 if clear else 0
    elif most := {"L;2": 3, "L;4": 15}.get(raw):
        # The colour is in the file's own bits, whereas the pixels are scaled to 8 bits.
        clear = clear * (255 // most) if clear <= most else clear
    image.info["transparency"] = clear
    return image.convert(mode)


def in_mode(image: "Image.Image", mode: str) -> "Image.Image":
    """A picture converted to a mode of Pillow, or itself where it has that mode."""
    return image if image.mode == mode else image.convert(mode)


def pixels_of(image: "Image.Image") -> np.ndarray:
    """A picture of mode L or RGB as ``(C, H, W)``."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
