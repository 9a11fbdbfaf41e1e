"""LeakyReLU's derivative from a one-bit mask: the factor between two layers of a backward or tangent pass.

Sample n of a mask is a row of bytes: bit i of byte j is set where the pre-activation of the sample's element 8 j + i, in the
order of memory, is positive. The bits behind a row's last element are zero.
"""

import math

import torch

from ..errors import InputError
from . import registry
from .arguments import finite, require_dense
from .declaration import declare
from .layout import (
    arithmetic_dtype,
    dense,
    has_memory,
    in_memory_order,
    require_apart,
    require_out,
    require_samples,
)


def mask_mul(
    x: torch.Tensor, mask: torch.Tensor, slope: float, *, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Product of ``x`` with LeakyReLU's derivative: ``x`` where the mask's bit is set, ``slope * x`` elsewhere.

    Args:
        x: ``(N, ...)``, float32, bfloat16 or float16 (float64: reference only), contiguous or channels_last (another layout is
            copied to a contiguous one): the layout that the mask was made in.
        mask: ``(N, mask_bytes(x))`` contiguous uint8 of :func:`conv_bias_act_mask`: a bit per element in the order of memory,
            a sample's row rounded up to whole bytes.
        slope: of LeakyReLU, 0 for ReLU.
        out: tensor that receives the result, like ``x``; may be ``x`` itself.
        backend: see :func:`advkd.ops.registry.choose`.

    Returns:
        ``out``, or a new tensor like ``x``.

    Raises:
        InputError: a mask or ``out`` that does not fit, an ``out`` that shares memory with the mask, or a slope that is no
            finite number or a tensor by which a derivative is wanted.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> mask_mul(torch.ones(1, 4), torch.tensor([[0b0101]], dtype=torch.uint8), 0.5).tolist()
        [[1.0, 0.5, 1.0, 0.5]]
    """
    require_samples("x", x)
    require_mask(mask, x)
    registry.require_known(backend)
    registry.refuse_order_0("mask_mul", x, out)
    x = dense(x)
    if out is None:
        out = torch.empty_like(x)
    else:
        require_out(out, "x", x)
        if has_memory(out):
            require_apart("out", out, "mask", mask)
    OP(x, mask, finite("slope", slope), backend, out)
    return out


def mask_bytes(x: torch.Tensor) -> int:
    """Bytes of a sample's mask."""
    return (math.prod(x.shape[1:]) + 7) // 8


def require_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    """Raise :class:`InputError` unless ``mask`` is one of ``x``."""
    require_dense("mask", mask)
    shape = (x.shape[0], mask_bytes(x))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != shape or mask.device != x.device or not mask.is_contiguous():
        found = f"{tuple(mask.shape)} {mask.dtype} on {mask.device}"
        raise InputError(f"mask must be contiguous uint8 {shape} on {x.device}, got {found}")


def mask_mul_reference(x: torch.Tensor, mask: torch.Tensor, slope: float, out: torch.Tensor) -> None:
    """The specification of :func:`mask_mul`: writes ``out``."""
    values = in_memory_order(x)
    scaled = (slope * values.to(arithmetic_dtype(x))).to(x.dtype)
    in_memory_order(out).copy_(torch.where(unpack(mask, values.shape[1]), values, scaled))


def pack(positive: torch.Tensor) -> torch.Tensor:
    """``(N, elements)`` booleans as ``(N, bytes)`` uint8."""
    n, count = positive.shape
    bits = torch.nn.functional.pad(positive, (0, -count % 8)).reshape(n, (count + 7) // 8, 8)
    places = 2 ** torch.arange(8, device=positive.device, dtype=torch.uint8)
    return (bits * places).sum(-1, dtype=torch.uint8)


def unpack(mask: torch.Tensor, count: int) -> torch.Tensor:
    """``(N, bytes)`` uint8 as ``(N, count)`` booleans."""
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask[:, :, None] >> places) & 1).flatten(1)[:, :count].bool()


OP = declare(
    "mask_mul(Tensor x, Tensor mask, float slope, Tensor(a!) out) -> ()",
    reference=mask_mul_reference,
    backends=("cpu", "triton", "cuda"),
)
