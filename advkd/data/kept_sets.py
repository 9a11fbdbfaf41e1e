"""Sets of images, drawn in shards that the cache keeps: a killed run goes on, and a larger one draws what is missing."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..runtime.files import read_tensors, require_digest, with_digest, write_tensors
from .pictures import eight_bit

SHARD = 500
"""Images of a shard."""


@dataclass(frozen=True)
class KeptSet:
    """Images ``0 .. num - 1`` of one origin, kept in the cache.

    Attributes:
        kind: first word of the folder's name.
        depends: JSON values that determine every image; their hash names the folder.
        num: number of images.
        shape: of an image, ``(C, H, W)``.
        batch_size: images that are drawn together.
        draw: function of a batch's number of images and the index of its first one that gives them, ``(n, C, H, W)`` in
            [-1, 1] or uint8.
    """

    kind: str
    depends: list[Any]
    num: int
    shape: tuple[int, ...]
    batch_size: int
    draw: Callable[[int, int], torch.Tensor]

    @property
    def name(self) -> str:
        """Name of its folder, another one of other images."""
        key = hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{key[:32]}"

    def images(self, cache: Path | None, bar: Any) -> torch.Tensor:
        """The images, from the cache or drawn now.

        Args:
            cache: folder that the set's folder is in; None: nothing is kept.
            bar: progress bar, moved on by every image.

        Returns:
            ``(num, C, H, W)`` uint8 on the CPU.

        Raises:
            InputError: a kept file that is damaged; the message names it. Or a set that does not fit the memory.
        """
        images = self._room()
        for first in range(0, self.num, SHARD):
            part = images[first : first + SHARD]
            if cache is None:
                self._draw(part, first, bar)
            else:
                self._read_or_draw(part, first, cache / self.name, bar)
        return images

    def _room(self):
        """Memory for all images at once."""
        try:
            return torch.empty(self.num, *self.shape, dtype=torch.uint8, device="cpu")
        except (RuntimeError, MemoryError):
            needed, sides = self.num * math.prod(self.shape) / 2**30, "x".join(map(str, self.shape[1:]))
            raise InputError(
                f"{self.num:,} images of {sides} need {needed:,.1f} GiB of memory: lower their number (--images, --real-num or "
                "--num) or their --size"
            ) from None

    def _read_or_draw(self, part, first, folder, bar):
        path = folder / f"images-{first:07d}-{len(part):03d}.safetensors"
        if path.exists():
            part.copy_(_kept(path, part.shape))
            bar.update(len(part))
            return
        self._draw(part, first, bar)
        folder.mkdir(exist_ok=True)
        tensors = {"images": part}
        write_tensors(path, tensors, with_digest(tensors, {}))

    def _draw(self, part, first, bar):
        for start in range(0, len(part), self.batch_size):
            batch = part[start : start + self.batch_size]
            drawn = self.draw(len(batch), first + start)
            batch.copy_(drawn if drawn.dtype == torch.uint8 else eight_bit(drawn))
            bar.update(len(batch))


def _kept(path, shape):
    """Images of an earlier run, as they were written."""
    remedy = "delete it, and it is drawn again"
    tensors, metadata = read_tensors(path, "the cache's images", ("digest",), remedy)
    require_digest(path, tensors, metadata, remedy)
    if tensors["images"].shape != shape:
        raise InputError(f"{path} holds {tuple(tensors['images'].shape)}, expected {tuple(shape)}: {remedy}")
    return tensors["images"]
