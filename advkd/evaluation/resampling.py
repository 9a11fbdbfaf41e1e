"""Draws of rows for bootstraps and subsets, and intervals of what they give."""

import torch

from ..ops.arguments import whole


def recentred_interval(resampled: list[float], measured: float, level: float) -> list[float]:
    """The central ``level`` of resampled values, shifted so that their mean is the measured value.

    Args:
        resampled: values of the resamples.
        measured: value of the set itself.
        level: share of the resampled values that the interval holds, in (0, 1).

    Returns:
        ``[low, high]``.
    """
    values = torch.tensor(resampled, dtype=torch.float64, device="cpu")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")
    return torch.quantile(values + measured - values.mean(), tails).tolist()


def rows_generator(seed: int) -> torch.Generator:
    """Generator on the CPU of the draws of rows.

    Args:
        seed: in [0, 2^64).

    Returns:
        A new generator.
    """
    return torch.Generator(device="cpu").manual_seed(whole("seed", seed, 0, 2**64))


def resample(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows drawn with replacement, as many as there are."""
    return features[torch.randint(len(features), (len(features),), generator=generator, dtype=torch.int64, device="cpu")]


def thin(features: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random subset of ``size`` rows."""
    return features[torch.randperm(len(features), generator=generator, dtype=torch.int64, device="cpu")[:size]]
