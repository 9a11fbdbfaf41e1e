"""Numbers of classes, as samples take them in turn."""

from collections.abc import Sequence

import torch


def labels_in_turn(classes: Sequence[int] | torch.Tensor, start: int, n: int) -> torch.Tensor | None:
    """Classes of samples ``start .. start + n - 1``: sample i has ``classes[i mod K]``, a function of its index alone.

    Args:
        classes: K numbers of classes, a sequence or an int64 tensor.
        start: index of the first sample.
        n: number of samples.

    Returns:
        ``(n,)`` int64 on the device of ``classes`` (a sequence's: the CPU); None where ``classes`` is empty.
    """
    if not len(classes):
        return None
    if not isinstance(classes, torch.Tensor):
        classes = torch.tensor(classes, dtype=torch.int64, device="cpu")
    return classes[torch.arange(start, start + n, device=classes.device) % len(classes)]
