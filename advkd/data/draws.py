"""Training's random draws, each keyed by its global number: no draw depends on processes, restarts or batch splits."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F

from ..ops import philox_normal, philox_uniform, philox_words


class DataOrder:
    """An endless sequence of data-set rows: one random permutation per epoch.

    Args:
        num: rows of the data set.
        seed: seed of the permutations.
    """

    def __init__(self, num: int, seed: int):
        self.num = num
        self.seed = seed
        self._epoch = None
        self._permutation = None

    def rows(self, start: int, count: int) -> list[int]:
        """Rows number ``start .. start + count - 1`` of the sequence."""
        return [self._row(start + i) for i in range(count)]

    def _row(self, position):
        epoch, offset = divmod(position, self.num)
        if epoch != self._epoch:
            words = philox_words(self.seed, range(self.num), 1, stream="order", step=epoch % 2**24)
            self._permutation = torch.argsort(words[:, 0], stable=True).tolist()
            self._epoch = epoch
        return self._permutation[offset]


def training_latents(seed: int, start: int, count: int, numel: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """z of the global draws ``start ..``: ``(count, numel)``. Another step of Philox keeps them apart from sampled latents."""
    indices = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return philox_normal(seed, indices, (numel,), stream="z", step=1)


def shift(images: torch.Tensor, seed: int, start: int, level: int, kind: int) -> torch.Tensor:
    """Each image moved by up to an eighth of its side in both directions, its border repeated; differentiable in ``images``.

    The moves are keyed by (seed, global draw, level, kind); real images are of kind 1, generated ones of kind 2.
    """
    n, channels, side, _ = images.shape
    reach = max(1, side // 8)
    words = philox_words(seed, range(start, start + n), 2, stream="interpolation", step=level + 2**8 * kind)
    corners = (words % (2 * reach + 1)).to(images.device)
    rows, columns = (corners[:, i, None] + _count(side, images.device) for i in range(2))
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    batch, channel = _count(n, images.device)[:, None, None, None], _count(channels, images.device)[None, :, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _count(stop, device):
    return torch.arange(stop, dtype=torch.int64, device=device)


class HostDraws:
    """Rows of a global batch out of a torch generator on the CPU.

    Every process draws the whole batch and takes its own rows, so that their number changes nothing.

    Args:
        generator: torch's generator of the update.
        total: samples of the global batch.
        first: place of this process's first sample within the global batch.
        count: samples of this process.
    """

    def __init__(self, generator: torch.Generator, total: int, first: int, count: int):
        self._options: dict[str, Any] = {"generator": generator, "device": "cpu"}
        self._total, self._first, self._count = total, first, count

    def integers(self, below: int) -> torch.Tensor:
        """``(count,)`` int64 in [0, below)."""
        return torch.randint(below, (self._total,), **self._options).narrow(0, self._first, self._count)

    def uniform(self) -> torch.Tensor:
        """``(count,)`` float32 in [0, 1)."""
        return torch.rand(self._total, dtype=torch.float32, **self._options).narrow(0, self._first, self._count)

    def normal(self, *shape: int, dim: int = 0) -> torch.Tensor:
        """Standard normal float32 of ``shape``, whose axis ``dim`` is the batch's."""
        whole = [*shape[:dim], self._total, *shape[dim + 1 :]]
        return torch.randn(whole, dtype=torch.float32, **self._options).narrow(dim, self._first, self._count)


class Draw:
    """Random numbers of a batch: functions of (seed, global draw, purpose) alone, on the run's device and in its dtype.

    A purpose is a name of the method's choice; a draw that is added under another name changes no other one.

    Attributes:
        seed: of the run.
        start: number of this process's first global draw.
        indices: ``(count,)`` int64, numbers of its global draws.
    """

    def __init__(
        self, seed: int, start: int, count: int, device: str | torch.device, dtype: torch.dtype, host: HostDraws | None = None
    ):
        self.seed, self.start, self._host = seed, start, host
        self.indices = torch.arange(start, start + count, dtype=torch.int64, device=device)
        self._dtype = dtype

    @property
    def host(self) -> HostDraws:
        """Draws from torch's generator, for a method that has one."""
        assert self._host is not None, "the method has no generator"
        return self._host

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Standard normal numbers ``(count, *shape)``."""
        return philox_normal(self.seed, self.indices, shape, stream="draw", step=_code(purpose)).to(self._dtype)

    def uniform(self, purpose: str) -> torch.Tensor:
        """Numbers in [0, 1), multiples of 2^-24: ``(count,)``."""
        return philox_uniform(self.seed, self.indices, stream="draw", step=_code(purpose)).to(self._dtype)

    def integers(self, purpose: str, below: int) -> torch.Tensor:
        """Integers in [0, below): ``(count,)`` int64."""
        return philox_words(self.seed, self.indices, 1, stream="draw", step=_code(purpose))[:, 0] % below


def _code(purpose):
    """A purpose as the 24 bits of a counter's step."""
    return zlib.crc32(purpose.encode()) % 2**24
