"""Checks of features ``(N, D)`` that distances are measured on."""

from numbers import Integral

import torch

from ..errors import InputError
from ..ops.arguments import real, require_dense

NEIGHBOUR = 3
"""k of the manifolds behind precision and recall."""

LARGEST = 1e25
"""Largest magnitude of a feature: its twelfth power, which the deviation of KID takes, must be a float64."""


def fewest(dimension: int) -> int:
    """The fewest samples that covariances and neighbours need.

    Args:
        dimension: D, numbers of a feature.

    Returns:
        max(2 D, 5).
    """
    return max(2 * dimension, NEIGHBOUR + 2)


def require_enough(features: torch.Tensor, name: str) -> None:
    """Refuse features of too few samples.

    Args:
        features: ``(N, D)``.
        name: of the features in the error.

    Raises:
        InputError: N is below :func:`fewest`.
    """
    samples, dimension = features.shape
    if samples < fewest(dimension):
        needed = f"{fewest(dimension)} or more are needed"
        raise InputError(f"{name}: {samples} images are too few for {dimension} features; {needed}")


def both(generated: torch.Tensor, reference: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as :func:`checked` gives them, of one dimension."""
    return alike(checked(generated, "generated", least), checked(reference, "reference", least), ("generated", "reference"))


def checked(features: torch.Tensor, name: str, least: int) -> torch.Tensor:
    """Features as float64 on the CPU, finite and of ``least`` samples or more; anything else is refused by name."""
    if isinstance(features, torch.Tensor):
        require_dense(name, features)
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or not features.is_floating_point():
        found = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, torch.Tensor) else type(features).__name__
        raise InputError(f"{name} must be a floating-point tensor (N, D), got {found}")
    if features.is_meta:
        raise InputError(f"{name} must be a dense tensor with values, got one on {features.device}")
    if features.shape[1] == 0:
        raise InputError(f"{name} must have a feature or more, got {tuple(features.shape)}")
    require_samples(features, name, least)
    features = features.detach().cpu().to(torch.float64)
    low, high = torch.aminmax(features)
    # Neither comparison holds for NaN.
    if not (low >= -LARGEST and high <= LARGEST):
        raise InputError(f"{name} must be finite, of at most {LARGEST:g}, got values from {low.item():g} to {high.item():g}")
    return features


def require_samples(features: torch.Tensor, name: str, least: int) -> None:
    """Refuse fewer than ``least`` samples by the features' name."""
    if len(features) < least:
        found = f"{len(features)} samples of {features.shape[1]} features"
        raise InputError(f"{name}: {found} are too few, {least} or more are needed")


def alike(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets, if their features have one dimension."""
    if a.shape[1] != b.shape[1]:
        found = " and ".join(f"{name} has {x.shape[1]}" for name, x in zip(names, (a, b), strict=True))
        raise InputError(f"both sets must have the same number of features, {found}")
    return a, b


def require_bootstrap(resamples: int, level: float) -> None:
    """Refuse numbers of resamples and levels of intervals that cannot be."""
    require_least(1, resamples=resamples)
    if not 0 < real("level", level) < 1:
        raise InputError(f"level must be between 0 and 1, got {level}")


def require_least(least: int, **values: int) -> None:
    """Refuse values that are no whole numbers of at least ``least``, by name."""
    for name, value in values.items():
        if not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} must be a whole number, {least} or more, got {value!r}")
        if value >= 2**31:
            raise InputError(f"{name} must be below 2^31, got {value}")
