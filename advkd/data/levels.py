"""The map from the student's submodules to the teacher's states that supervise them, and their resolutions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import InputError

MOST_SUBMODULES = 256
"""Limit for configurations that come from elsewhere."""


def resolutions(image_size: int, depth: int) -> list[int]:
    """R_k = min(4 * 2^floor(k / 2), image_size) for submodules k = 1 .. depth.

    Raises:
        InputError: the size is not 4 * 2^k, or the depth is odd or too small to reach the size.
    """
    if not isinstance(image_size, int) or image_size < 8 or image_size & (image_size - 1):
        raise InputError(f"image_size must be 4 * 2^k and at least 8, got {image_size}")
    needed = max(4, 2 * (image_size.bit_length() - 3))
    if depth % 2 or not needed <= depth <= MOST_SUBMODULES:
        limits = f"even, at least {needed} for images of {image_size} pixels and at most {MOST_SUBMODULES}"
        raise InputError(f"depth must be {limits}, got {depth}")
    return [min(4 << (k // 2), image_size) for k in range(1, depth + 1)]


def supervising_timesteps(solver: str, depth: int, timesteps: Sequence[int], train_timesteps: int) -> list[int]:
    """Timesteps t_1 .. t_{depth - 1}: submodule k imitates the state after the step taken at t_k (the last one, x_0).

    All but DDPM: t(n) = 190 n - 10 n^2 + 80 at n = 11 - k for depth 12 (ADV-KD, section 3); for another depth, n spread evenly
    over [0, 10]. DDPM: the state after the first step for submodules 1 and 2, then 900, 800, ..., 100 for depth 12. Both are
    scaled by T / 1000 and snapped to the run's timesteps; those of solvers but the paper's two to steps that do not end at x_0.
    """
    scale = train_timesteps / 1000
    if solver not in ("ddim", "ddpm"):
        timesteps = timesteps[:-1] or timesteps
    if solver != "ddpm":
        n = [10 * (1 - k / (depth - 2)) for k in range(depth - 1)]
        wanted = [190 * value - 10 * value * value + 80 for value in n]
    else:
        spread = max(depth - 4, 1)
        wanted = [999, 999, *(900 - 800 * k / spread for k in range(depth - 3))]
    return [min(timesteps, key=lambda t: (abs(t - target * scale), t)) for target in wanted]


def downsample(x: torch.Tensor, side: int) -> torch.Tensor:
    """Psi: area average of ``(N, C, S, S)`` to ``(N, C, side, side)``."""
    factor = x.shape[-1] // side
    return F.avg_pool2d(x, factor) if factor > 1 else x
