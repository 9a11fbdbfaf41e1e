"""Image data sets for training a teacher: the embedded digits, glyphs, or any folder of pictures.

Rules for reading folders, everywhere in this module and in :mod:`advkd.data.decoding`, which has the two limits:

- Formats: PNG, JPEG, WebP, BMP, GIF and TIFF (of several frames the first), known by their first bytes; other files with such a
  suffix are refused.
- Pictures of at most ``PIXEL_LIMIT`` pixels, JPEGs of at most ``SCAN_LIMIT`` scans; others are refused before they are decoded.
- Orientation: a picture is turned as its EXIF (or XMP) data say.
- Transparency: a picture is blended over white.
- Gray or colour: gray is what the file stores as gray (1 to 16 bits, with or without transparency), and a palette picture that
  shows only grays; beside pictures in colour the latter counts as one of them. 16 bits are scaled to 8. Floating point, 32-bit
  integers and integers with a sign have no known range and are refused.
- Folders at any depth, also behind symbolic links; each real folder is read once. A folder that cannot be read and a link that
  leads nowhere are refused. Entries below the given folder whose names begin with a dot, and those of ``SYSTEM_NAMES``, are
  left out.
"""

import errno
import math
import os
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..ops.arguments import whole
from .decoding import in_mode, open_picture, pixels_of
from .glyph_sets import trained_glyphs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

LARGEST_SIDE = 2**14
"""Pixels that a side may be resized to."""

SYSTEM_NAMES = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
"""Folders that systems put among a user's, with thumbnails or remains of files."""


def load_images(
    source: str | os.PathLike,
    size: int | None = None,
    channels: int | None = None,
    classes: str = "",
    num: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """Load a whole image data set.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 handwritten digits), ``"glyphs"``, ``"glyphs-digits"`` or
            ``"glyphs-letters"`` (:mod:`advkd.data.glyphs`), or a folder that holds pictures at any depth (PNG, JPEG, WebP, BMP,
            GIF, TIFF), also behind symbolic links. Hidden entries (``.ipynb_checkpoints``) and systems' folders (``__MACOSX``)
            are left out.
        size: side in pixels; default 32 for digits and glyphs, else the first image's shorter side, rounded down to 4 * 2^k.
        channels: 1 (gray) or 3 (RGB); default 1 for the digits, else what the first image has (one with a palette of grays
            leaves it to the next). Glyphs have 3.
        classes: of ``"glyphs"``: ``digits``, ``letters`` or ``all``, the default.
        num: number of glyphs, 0 for 32,768; sets of 1,000 and more, up to 2 GiB, are kept in the cache.
        progress: show a bar while glyphs are drawn.

    Returns:
        ``(N, channels, size, size)``, sorted by path, turned as EXIF says, transparency blended over white, bicubically resized
        (after a centre crop to a square): float32 in [-1, 1] for the digits, uint8 for a folder (a quarter of the memory, and
        little more than the result while it is read) and glyphs; :func:`normalize` takes both.

    Raises:
        InputError: no such folder, no image in it, a folder that cannot be read, or an image that cannot: damaged, of another
            format, of more than ``PIXEL_LIMIT`` (2^27) pixels, or of values without a known range (it is named).
    """
    size, glyphs = _checked_size(source, size, channels), trained_glyphs(source, classes, num)
    if glyphs is not None:
        return glyphs.images(size or 32, channels, progress)
    if str(source) == "digits":
        return _digits(size or 32, channels or 1)
    if not os.path.isdir(source):
        raise InputError(f"--data {source} is neither 'digits' nor 'glyphs' nor a folder of images")
    return _squares(_image_paths(Path(source), "--data"), size, channels)


def _checked_size(source, size, channels):
    """``size`` as an int or None; an :class:`InputError` for arguments that no images can have."""
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"source must be 'digits', 'glyphs' or a folder of images, got {source!r}")
    if channels is not None and whole("channels", channels) not in (1, 3):
        raise InputError(f"channels must be 1 or 3, got {channels}")
    size = size if size is None else whole("size", size, 1)
    if size is not None and size > LARGEST_SIDE:
        raise InputError(f"size must be at most {LARGEST_SIDE}, got {size}")
    return size


def _digits(size, channels):
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images.expand(-1, channels, -1, -1).contiguous()


def _squares(paths, size, channels):
    """Pictures cropped and resized, uint8 ``(N, C, S, S)``."""
    channels, images = channels or _channels(paths), None
    mode = "L" if channels == 1 else "RGB"
    for i, path in enumerate(paths):
        image, _ = open_picture(path)
        size = size or _largest_size(min(image.size))
        if images is None:
            images = _room(len(paths), (channels, size, size))
        images[i] = pixels_of(_square(in_mode(image, mode), size))
    return torch.from_numpy(images)


def _channels(paths):
    """1 or 3, as the first picture has; one with a palette of grays leaves it to the next, and if all do it is 1."""
    for path in paths:
        image, has_palette = open_picture(path)
        if image.mode == "RGB" or not has_palette:
            return len(image.getbands())
    return 1


def _room(count, shape):
    """Memory for all pictures at once, so that nothing is held twice."""
    try:
        return np.empty((count, *shape), dtype=np.uint8)
    except MemoryError:
        needed = count * math.prod(shape) / 2**30
        raise InputError(f"{count:,} {describe_shape(shape)} images need {needed:,.1f} GiB of memory") from None


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images of :func:`load_images` as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _largest_size(side):
    """The largest 4 * 2^k that is at most ``side``, and at least 8."""
    return max(8, 1 << (side.bit_length() - 1))


def _square(image, size):
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def load_labelled(
    source: str | os.PathLike,
    size: int | None = None,
    channels: int | None = None,
    classes: str = "",
    num: int = 0,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images with classes.

    Links to folders are classes; hidden and systems' folders are not. The walk of a class does not enter another class or
    ``source``.

    Args:
        source: ``"digits"``, a data set of glyphs, or a folder that holds one folder of images per class.
        size: side in pixels, as for :func:`load_images`.
        channels: 1 (gray) or 3 (RGB), as for :func:`load_images`.
        classes: of ``"glyphs"``, as for :func:`load_images`.
        num: number of glyphs, as for :func:`load_images`.
        progress: show a bar while glyphs are drawn.

    Returns:
        ``(images, labels, names)``: images as :func:`load_images` gives them, labels int64 ``(N,)``, the classes' names.

    Raises:
        InputError: fewer than two classes, one without a picture, or what :func:`load_images` refuses.
    """
    size, glyphs = _checked_size(source, size, channels), trained_glyphs(source, classes, num)
    if glyphs is not None:
        return glyphs.images(size or 32, channels, progress), glyphs.labels(), glyphs.class_names
    if str(source) == "digits":
        from sklearn.datasets import load_digits

        return _digits(size or 32, channels or 1), torch.from_numpy(load_digits().target).long(), [str(i) for i in range(10)]
    found = _entries(Path(source), "--data") if os.path.isdir(source) else []
    folders = [path for path, is_folder, _ in found if is_folder]
    if len(folders) < 2:
        raise InputError(
            f"--data {source} is neither 'digits' nor 'glyphs' nor a folder that holds one folder of images per class"
        )
    places: dict[str, Path] = {}
    for path in folders:
        first = places.setdefault(os.path.realpath(path), path)
        if first != path:
            raise InputError(
                f"--data {source}: the classes {first.name} and {path.name} are one folder: remove one of the links"
            )
    others = frozenset((os.path.realpath(source), *places))
    parts = [_image_paths(folder, "--data", others) for folder in folders]
    labels = np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts])
    images = _squares([path for part in parts for path in part], size, channels)
    return images, torch.from_numpy(labels), [folder.name for folder in folders]


def read_pictures(folder: str | os.PathLike, option: str) -> torch.Tensor:
    """All pictures of a folder in their own size, for measuring: uint8 ``(N, 1 or 3, H, W)``, sorted by path.

    The rules are those of :func:`load_images`: formats, ``PIXEL_LIMIT``, orientation, transparency over white, links, hidden
    entries.

    Raises:
        InputError: no folder, no picture, one that cannot be read, of another size, or gray among colour ones (it is named).
    """
    if not os.path.isdir(folder):
        raise InputError(f"{option} {folder} is not a folder of images")
    paths, pictures = _image_paths(Path(folder), option), None
    channels = _channels(paths)
    for i, path in enumerate(paths):
        image, has_palette = open_picture(path)
        picture = pixels_of(in_mode(image, "RGB") if has_palette and channels == 3 else image)
        if pictures is None:
            pictures = _room(len(paths), picture.shape)
        if picture.shape != pictures.shape[1:]:
            first, other = describe_shape(pictures.shape[1:]), describe_shape(picture.shape)
            raise InputError(f"{option} {folder} mixes images: {paths[0].name} is {first}, {path.name} is {other}")
        pictures[i] = picture
    return torch.from_numpy(pictures)


def describe_shape(shape: Sequence[int]) -> str:
    """``(C, H, W)`` in words."""
    kind = {1: "gray", 3: "colour"}.get(shape[0], f"of {shape[0]} channels")
    return f"{kind} {shape[-1]}x{shape[-2]}"


def _image_paths(folder, option, others=frozenset()):
    """The pictures of a folder at any depth, by path; none is an :class:`InputError`. ``others``: real paths not to enter."""
    paths = sorted(path for path in _files(folder, option, others) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{option} {folder} holds no image (looked for {', '.join(IMAGE_SUFFIXES)})")
    return paths


def _files(folder, option, others):
    """Every file below a folder; its own files come before those that links lead to, so that they keep their own paths."""
    folders, links = deque([folder]), deque()
    seen = set(others - {os.path.realpath(folder)})
    while folders or links:
        here = (folders or links).popleft()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        for path, is_folder, is_link in _entries(here, option):
            if is_folder:
                (links if is_link else folders).append(path)
            else:
                yield path


def _entries(folder, option):
    """``(path, is a folder, is a link)`` of what lies in a folder, by path, without hidden and systems' entries."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in SYSTEM_NAMES]
            return sorted((Path(entry.path), _is_folder(entry, option), entry.is_symlink()) for entry in shown)
    except OSError as error:
        raise InputError(f"{option}: the folder {folder} cannot be read ({error.strerror})") from error


def _is_folder(entry, option):
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except OSError as error:
        # A link to itself hides nothing, whereas a disk that is not mounted does.
        if error.errno == errno.ELOOP:
            return False
        raise InputError(f"{option}: the link {entry.path} leads nowhere ({error.strerror}): mend or remove it") from error
