"""Images of a stream in batches that fit a device's memory."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from ..data.pictures import to_uint8
from ..errors import InputError

STREAMED = {torch.float32: torch.Tensor.float, torch.uint8: to_uint8}
"""How images are handed out in a dtype."""


def form_of(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that brings images to the form of a stream.

    Args:
        dtype: float32 or uint8.

    Returns:
        A function of :data:`STREAMED`.

    Raises:
        InputError: another dtype.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in STREAMED:
        raise InputError(f"dtype must be one of {', '.join(map(str, STREAMED))}, got {dtype}")
    return STREAMED[dtype]


def fitting(
    draw: Callable[[int, int], torch.Tensor], parts: Iterable[tuple[int, int]], forget: Callable[[], None], what: str
) -> Iterator[torch.Tensor]:
    """Batches of images; where one does not fit the memory, it and those after it are halved, once.

    Args:
        draw: function of the first image's index and the number of images.
        parts: pairs of these, taken one by one.
        forget: gives memory back before half a batch is drawn.
        what: the images and their device, for the error.

    Yields:
        Images of one part, or of a piece of a part that was halved.

    Raises:
        torch.OutOfMemoryError: half a batch does not fit either.
    """
    most = math.inf
    for first, count in parts:
        last = first + count
        while True:
            taken = int(min(last - first, most))
            images = _attempt(draw, first, taken)
            if images is None:
                most = _halved(taken, most, what)
                forget()
                continue
            yield images
            first += taken
            if first == last:
                break


def _attempt(draw, first, count):
    """Images, or None where they do not fit: then nothing of the attempt keeps memory, its traceback neither."""
    try:
        return draw(first, count)
    except torch.OutOfMemoryError:
        return None


def _halved(count, most, what):
    """How many images a batch may have, as ``count`` do not fit; an error where they have been halved (``most``) before."""
    if most < math.inf or count == 1:
        raise torch.OutOfMemoryError(f"out of memory: {count} {what}: lower batch_size")
    half = -(-count // 2)
    warnings.warn(f"out of memory with batches of {count} images: going on with {half}", stacklevel=3)
    return half
