"""Training's random draws, each keyed by its global number: no draw depends on processes, restarts or batch splits."""

import torch

from .ops import philox_uniform, philox_words


class DataOrder:
    """An endless sequence of data-set rows: one random permutation per epoch.

    Args:
        num: rows of the data set.
        seed: seed of the permutations.
    """

    def __init__(self, num, seed):
        self.num = num
        self.seed = seed
        self._epoch = None
        self._permutation = None

    def rows(self, start, count):
        """Rows number ``start .. start + count - 1`` of the sequence, a list."""
        return [self._row(start + i) for i in range(count)]

    def _row(self, position):
        epoch, offset = divmod(position, self.num)
        if epoch != self._epoch:
            words = philox_words(self.seed, range(self.num), 1, stream="order", step=epoch % 2**24)
            self._permutation = torch.argsort(words[:, 0], stable=True).tolist()
            self._epoch = epoch
        return self._permutation[offset]


def interpolate(real, fake, seed, start, level):
    """x_hat = a real + (1 - a) fake with one uniform a per sample, keyed by (seed, global draw, level)."""
    indices = torch.arange(start, start + len(real), device=real.device)
    a = philox_uniform(seed, indices, stream="interpolation", step=level).to(real.dtype)
    a = a[:, None, None, None]
    return a * real + (1 - a) * fake
