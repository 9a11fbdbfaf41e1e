"""Image data sets for training a teacher: the embedded digits, or any folder of images."""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_images(source, size=None, channels=None):
    """Load a whole image data set.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 handwritten digits) or a folder that holds images at any depth.
        size: side in pixels; default 32 for the digits, else the first image's shorter side, rounded down to 4 * 2^k.
        channels: 1 (gray) or 3 (RGB); default 1 for the digits, else what the first image has.

    Returns:
        ``(N, channels, size, size)``, bicubically resized (after a centre crop to a square): float32 in [-1, 1] for the
        digits, uint8 for a folder (a quarter of the memory); :func:`normalize` takes both.

    Raises:
        InputError: no such folder, no image in it, or an image that cannot be read (it is named).
    """
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 or 3, got {channels}")
    if str(source) == "digits":
        return _digits(size or 32, channels or 1)
    return _folder(Path(source), size, channels)


def _digits(size, channels):
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images.expand(-1, channels, -1, -1).contiguous()


def _folder(folder, size, channels):
    if not folder.is_dir():
        raise InputError(f"--data {folder} is neither 'digits' nor a folder of images")
    images = []
    for path in _image_paths(folder, "--data"):
        with _opened(path) as image:
            channels = channels or (1 if _is_gray(image) else 3)
            size = size or _largest_size(min(image.size))
            images.append(_square(_eight_bit(image).convert("L" if channels == 1 else "RGB"), size))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _image_paths(folder, option):
    """The images of a folder at any depth, by name; none is an :class:`InputError`."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{option} {folder} holds no image (looked for {', '.join(IMAGE_SUFFIXES)})")
    return paths


@contextlib.contextmanager
def _opened(path):
    """An image of Pillow's; what goes wrong while it is read names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read ({error})") from error


def _is_gray(image):
    return image.mode in ("1", "L", "I", "I;16")


def normalize(images):
    """Images of :func:`load_images` as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _eight_bit(image):
    """16-bit gray pictures scaled to 8 bits (Pillow's own conversion clips them to white)."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))


def _largest_size(side):
    """The largest 4 * 2^k that is at most ``side``, and at least 8."""
    return max(8, 1 << (side.bit_length() - 1))


def _square(image, size):
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, -1)


def load_labelled(source, size=None):
    """Images with classes: ``(images, labels, names)`` of ``"digits"`` or of a folder that holds one folder per class.

    ``images`` are as :func:`load_images` gives them, ``labels`` int64 ``(N,)``, ``names`` the classes' names.
    """
    if str(source) == "digits":
        from sklearn.datasets import load_digits

        return _digits(size or 32, 1), torch.from_numpy(load_digits().target).long(), [str(i) for i in range(10)]
    folders = sorted(path for path in Path(source).iterdir() if path.is_dir()) if Path(source).is_dir() else []
    if len(folders) < 2:
        raise InputError(f"--data {source} is neither 'digits' nor a folder that holds one folder of images per class")
    parts, channels = [], None
    for folder in folders:
        parts.append(_folder(folder, size, channels))
        size, channels = parts[0].shape[-1], parts[0].shape[1]
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    return torch.cat(parts), labels, [folder.name for folder in folders]


def read_pictures(folder, option):
    """All pictures of a folder as they are, for measuring: uint8 ``(N, 1 or 3, H, W)``.

    Raises:
        InputError: no folder, no picture, one that cannot be read, of another size, or gray among colour ones (it is named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{option} {folder} is not a folder of images")
    paths, pictures = _image_paths(folder, option), []
    for path in paths:
        with _opened(path) as image:
            pictures.append(np.atleast_3d(np.asarray(_eight_bit(image).convert("L" if _is_gray(image) else "RGB"))))
        if pictures[-1].shape != pictures[0].shape:
            first, other = (describe_shape(p.transpose(2, 0, 1).shape) for p in (pictures[0], pictures[-1]))
            raise InputError(f"{option} {folder} mixes images: {paths[0].name} is {first}, {path.name} is {other}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def describe_shape(shape):
    """``(C, H, W)`` in words."""
    kind = {1: "gray", 3: "colour"}.get(shape[0], f"of {shape[0]} channels")
    return f"{kind} {shape[-1]}x{shape[-2]}"
