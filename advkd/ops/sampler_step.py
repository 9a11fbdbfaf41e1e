"""One step of any first-order diffusion sampler, as a linear combination with clipping.

x0 = clamp(k_x x + k_m m, -clip, clip);  x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_z z

with m the network's output, x0_prev the previous step's x0 and z a standard normal tensor. A sampler is a table of
coefficients: see :mod:`advkd.teacher` for DDIM (Song et al. 2020) and DDPM (Ho et al. 2020).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError
from . import backends


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one step (float64 values; the kernels round them to float32).

    Attributes:
        k_x, k_m: x0 from the state and the network's output.
        c_0, c_x, c_m, c_h, c_z: weights of x0, state, network output, previous x0 and noise in the next state.
        clip: x0 is clamped to [-clip, clip]; infinity for no clipping.
    """

    k_x: float
    k_m: float
    c_0: float
    c_x: float = 0.0
    c_m: float = 0.0
    c_h: float = 0.0
    c_z: float = 0.0
    clip: float = math.inf


def sampler_step(x, model_output, coefficients, *, previous_x0=None, noise=None, pool=None, return_x0=True, backend="auto"):
    """One sampler step in one pass.

    Args:
        x: state ``(N, C, H, W)``, float32, bfloat16 or float16.
        model_output: the network's output, same shape and dtype.
        coefficients: :class:`StepCoefficients`.
        previous_x0: x0 of the previous step, needed where ``c_h`` is not 0.
        noise: standard normal tensor like ``x``, needed where ``c_z`` is not 0.
        pool: integer r that divides H and W: also return the r x r area average of the next state.
        return_x0: False leaves x0 out (None in its place).
        backend: see :func:`advkd.ops.backends.choose`.

    Returns:
        ``(x_next, x0 or None, pooled or None)``, in ``x``'s dtype; arithmetic is float32 (float64 for float64 input).

    Raises:
        InputError: shapes or dtypes that differ, or a tensor that the coefficients need and that is missing.
        RuntimeError: a gradient is asked for. Order of differentiability 0.
    """
    tensors = {"x": x, "model_output": model_output, "previous_x0": previous_x0, "noise": noise}
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            expected = f"{tuple(x.shape)} {x.dtype}"
            raise InputError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected} as x")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"sampler_step has no gradient, and {name} requires one: call it under torch.no_grad()")
    for name, weight in (("previous_x0", coefficients.c_h), ("noise", coefficients.c_z)):
        if weight != 0 and tensors[name] is None:
            raise InputError(f"{name} is needed: its coefficient is {weight}")
    if pool is not None and (pool < 1 or x.shape[-1] % pool or x.shape[-2] % pool):
        raise InputError(f"pool must divide the height and width {tuple(x.shape[-2:])}, got {pool}")
    backends.choose("sampler_step", backend, x.device)
    return sampler_step_reference(x, model_output, coefficients, previous_x0, noise, pool, return_x0)


def sampler_step_reference(x, model_output, c, previous_x0=None, noise=None, pool=None, return_x0=True):
    """The specification of :func:`sampler_step`."""
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    state, m = x.to(arithmetic), model_output.to(arithmetic)
    x0 = (c.k_x * state + c.k_m * m).clamp(-c.clip, c.clip)
    x_next = c.c_0 * x0 + c.c_x * state + c.c_m * m
    if c.c_h:
        x_next = x_next + c.c_h * previous_x0.to(arithmetic)
    if c.c_z:
        x_next = x_next + c.c_z * noise.to(arithmetic)
    pooled = F.avg_pool2d(x_next, pool).to(x.dtype) if pool else None
    return x_next.to(x.dtype), x0.to(x.dtype) if return_x0 else None, pooled


backends.implement("sampler_step")
