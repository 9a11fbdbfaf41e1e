"""Training's random draws, each keyed by its global number: no draw depends on processes, restarts or batch splits."""

import torch
import torch.nn.functional as F

from ..ops import philox_normal, philox_words


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
