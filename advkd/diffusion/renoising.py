"""Samplers that denoise and add noise again, on the fused step: a whole iteration is one network evaluation and one pass.

Both take a denoiser, a function of the state ``(N, C, H, W)`` and the noise level sigma (a float) that predicts x_0: a DPDM, a
consistency model, or the posterior mean that a diffusion model knows. Noise is a function of (seed, sample index, step). Order
of differentiability 0: everything runs under ``torch.no_grad()``.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import InputError
from ..ops import StepCoefficients, philox_normal, sampler_step
from ..ops.arguments import finite, require_dense, sizes
from ..ops.philox import indices_of

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
"""Function of the state ``(N, C, H, W)``, float32, and its noise level sigma that gives x_0 in the state's shape.

The state's memory is written to after the call: a denoiser that keeps the tensor must copy it.
"""


@torch.no_grad()
def sample_dpdm(
    denoiser: Denoiser,
    sigmas: Iterable[float],
    shape: Sequence[int],
    seed: int = 0,
    start: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """DPDM's sampler (Data Prediction Denoising Models, algorithm 2): x = x_0 + sigma_k z, then x_0 = denoiser(x, sigma_k).

    Args:
        denoiser: function of the state and sigma that gives x_0, ``(N, C, H, W)``, in float32, bfloat16, float16 or float64.
        sigmas: noise levels sigma_1 > ... > sigma_K > 0, any sequence of numbers.
        shape: ``(N, C, H, W)`` of the samples.
        seed: key of the noise, in [0, 2^64).
        start: index of the first sample; the samples are those of indices ``start .. start + N - 1`` of the seed.
        device: torch device on which states and samples lie.

    Returns:
        x_0 after K evaluations, ``(N, C, H, W)`` float32 on ``device``.

    Raises:
        InputError: sigmas that are not finite, positive and descending, or a denoiser, a shape, a seed, an index or a device
            that cannot be.

    Examples:
        >>> images = sample_dpdm(model, [80.0, 5.0, 0.5], (16, 3, 64, 64), seed=0, device="cuda")
    """
    sigmas = _numbers(sigmas)
    return _denoise_again(denoiser, sigmas, sigmas, shape, seed, start, device)


@torch.no_grad()
def sample_consistency(
    denoiser: Denoiser,
    sigmas: Iterable[float],
    shape: Sequence[int],
    seed: int = 0,
    start: int = 0,
    device: str | torch.device = "cpu",
    sigma_min: float = 0.002,
) -> torch.Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): noise of deviation sqrt(sigma_k^2 - sigma_min^2).

    The first state is sigma_1 z. As in :func:`sample_dpdm`, whose arguments these are but for ``sigma_min``, the result is the
    denoiser's last.

    Args:
        denoiser: function of the state and sigma that gives x_0, ``(N, C, H, W)``, in float32, bfloat16, float16 or float64.
        sigmas: noise levels sigma_1 > ... > sigma_K > ``sigma_min``, any sequence of numbers.
        shape: ``(N, C, H, W)`` of the samples.
        seed: key of the noise, in [0, 2^64).
        start: index of the first sample; the samples are those of indices ``start .. start + N - 1`` of the seed.
        device: torch device on which states and samples lie.
        sigma_min: level at which the model is the identity, at least 0 and below all sigmas.

    Returns:
        x_0 after K evaluations, ``(N, C, H, W)`` float32 on ``device``.

    Raises:
        InputError: as in :func:`sample_dpdm`, or a ``sigma_min`` that is negative or not below all sigmas.

    Examples:
        >>> images = sample_consistency(model, [80.0, 0.8], (16, 3, 64, 64), device="cuda")
    """
    levels, sigma_min = _numbers(sigmas), finite("sigma_min", sigma_min)
    if not 0 <= sigma_min < min(levels, default=math.inf):
        raise InputError(f"sigma_min must be at least 0 and below all sigmas, got {sigma_min}")
    weights = [math.sqrt(sigma**2 - sigma_min**2) for sigma in levels]
    return _denoise_again(denoiser, levels, [*levels[:1], *weights[1:]], shape, seed, start, device)


def _numbers(sigmas):
    try:
        sigmas = list(sigmas)
    except TypeError:
        raise InputError(f"sigmas must be a sequence of numbers, got {sigmas!r}") from None
    return [finite("sigmas", sigma) for sigma in sigmas]


def _denoise_again(denoiser, sigmas, weights, shape, seed, start, device):
    shape = sizes("shape", shape)
    if not callable(denoiser) or not shape:
        raise InputError(f"denoiser must be a function and shape (N, ...), got {denoiser!r} and {shape}")
    if not sigmas or any(not a > b for a, b in zip([math.inf, *sigmas], [*sigmas, 0.0])):
        raise InputError(f"sigmas must be finite, positive and descending, got {list(sigmas)}")
    indices = indices_of(shape[0], start, device)
    x = weights[0] * philox_normal(seed, indices, shape[1:], stream="x_T")
    # Add noise to the denoiser's result m: x_next = m + c_z z.
    for k, (sigma, weight) in enumerate(zip(sigmas[:-1], weights[1:]), 1):
        renoise = StepCoefficients(k_x=0.0, k_m=1.0, c_0=1.0, c_z=weight)
        x_0 = _denoised(denoiser, x, sigma)
        # Half-precision results need no conversion: the step reads them.
        x_0 = x_0.float() if x_0.dtype == torch.float64 else x_0
        x, _, _ = sampler_step(x, x_0, renoise, noise=(seed, indices, k), out=x)
    return _denoised(denoiser, x, sigmas[-1]).float()


def _denoised(denoiser, x, sigma):
    x_0 = denoiser(x, sigma)
    require_dense("denoiser's result", x_0)
    return x_0
