"""A convolution of the student with everything around it: y = act(conv3x3(up(x)) + bias), batch norm already folded."""

import torch
import torch.nn.functional as F

from ..errors import InputError
from . import backends

ACTIVATIONS = ("leaky_relu", "tanh", "none")


def conv_block(x, weight, bias, *, slope=0.2, upsample=False, activation="leaky_relu", backend="auto"):
    """3x3 convolution (padding 1) of the nearest-neighbour up-sampled input, bias and activation.

    Args:
        x: ``(N, C_in, H, W)``, float32, bfloat16 or float16.
        weight: ``(C_out, C_in, 3, 3)``, same dtype.
        bias: ``(C_out,)``, same dtype.
        slope: LeakyReLU's slope for negative values.
        upsample: double height and width of ``x`` before the convolution.
        activation: ``leaky_relu``, ``tanh`` (the last layer) or ``none``.
        backend: see :func:`advkd.ops.backends.choose`.

    Returns:
        ``(N, C_out, H, W)``, or ``(N, C_out, 2H, 2W)`` with ``upsample``, in ``x``'s dtype.

    Raises:
        InputError: shapes, dtypes or names that do not fit.
        RuntimeError: a gradient is asked for. Order of differentiability 0.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[1] != x.shape[1]:
        expected = f"(C_out, {x.shape[1] if x.ndim == 4 else 'C_in'}, 3, 3)"
        raise InputError(f"weight must be {expected} for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not x.dtype == weight.dtype == bias.dtype:
        raise InputError(f"x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError("conv_block has no gradient, and an argument requires one: call it under torch.no_grad()")
    backends.choose("conv_block", backend, x.device)
    return conv_block_reference(x, weight, bias, slope, upsample, activation)


def conv_block_reference(x, weight, bias, slope, upsample, activation):
    """The specification of :func:`conv_block`."""
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(x, weight, bias, padding=1)
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.tanh(y) if activation == "tanh" else y


backends.implement("conv_block")
