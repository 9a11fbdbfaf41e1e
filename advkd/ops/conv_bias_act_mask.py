"""Convolution, bias and LeakyReLU with one kept bit per element, all that backward and tangent passes need of an activation."""

from collections.abc import Sequence

import torch

from ..errors import InputError
from . import registry
from .arguments import finite, require_dense, whole
from .declaration import declare
from .layout import (
    arithmetic_dtype,
    dense,
    in_memory_order,
    memory_format,
    require_floating,
    require_out,
    windows,
    with_usual_strides,
)
from .mask_mul import mask_bytes, pack


def conv_bias_act_mask(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    slope: float = 0.01,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """LeakyReLU of a convolution, and one bit per element: the sign of its pre-activation.

    Args:
        x: ``(N, C, H, W)``, float32, bfloat16 or float16 (float64: reference only).
        weight: ``(out, C / groups, kh, kw)``, ``x``'s dtype.
        bias: ``(out,)`` or None.
        stride: an int or a pair (vertical, horizontal), as ``torch.nn.functional.conv2d`` takes it.
        padding: zeros around the image, an int or a pair.
        dilation: distance of the kernel's taps, an int or a pair.
        groups: number of groups that the channels are convolved in.
        slope: of LeakyReLU, 0 for ReLU.
        backend: of the epilogue, see :func:`advkd.ops.registry.choose`; the convolution itself is oneDNN's or cuDNN's.

    Returns:
        The pair ``(a, mask)``. ``a`` is the activation ``(N, out, h, w)`` in ``x``'s dtype and the convolution's layout;
        ``mask`` is ``(N, bytes)`` uint8 with ceil(out h w / 8) bytes per sample, whose bit i of byte j belongs to the sample's
        element 8 j + i in the order of memory (:mod:`advkd.ops.mask_mul`).

    Raises:
        InputError: tensors that do not fit each other, or a slope that is no finite number or a tensor by which a derivative is
            wanted.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a gradient is asked for, or a tangent in forward mode comes in. Order of differentiability 0.

    Examples:
        >>> a, mask = conv_bias_act_mask(torch.ones(2, 3, 8, 8), torch.ones(16, 3, 3, 3), padding=1, slope=0.2)
        >>> a.shape, mask.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 128]))
    """
    require_floating("x", x)
    for name, tensor in (("weight", weight), *([] if bias is None else [("bias", bias)])):
        require_dense(name, tensor)
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}")
    groups = whole("groups", groups, 1)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] * groups:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise InputError(f"x must be (N, C, H, W) and weight (out, C / groups, kh, kw), got {shapes} with groups {groups}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias must be ({weight.shape[0]},), one number per output channel, got {tuple(bias.shape)}")
    if weight.shape[0] < 1 or weight.shape[0] % groups or x.shape[1] < 1:
        raise InputError(f"weight must have a multiple of groups, {groups}, of output channels, got {tuple(weight.shape)}")
    pairs, _ = windows(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    registry.require_known(backend)
    registry.refuse_order_0("conv_bias_act_mask", x, weight, bias)
    slope = finite("slope", slope)
    # oneDNN adds the bias in its own epilogue; for cuDNN that is a pass of its own, so it moves into ours.
    inside = bias if x.device.type == "cpu" else None
    p = torch.ops.aten.convolution(x, with_usual_strides(weight, groups), inside, *pairs, False, [0, 0], groups)
    return bias_act_mask(p, None if inside is not None else bias, slope, fresh=True, backend=backend)


def bias_act_mask(
    p: torch.Tensor,
    bias: torch.Tensor | None,
    slope: float,
    *,
    fresh: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """LeakyReLU(p + bias) and its mask: the epilogue of :func:`conv_bias_act_mask`, for any ``(N, C, ...)``.

    ``fresh``: ``p`` has no other reader and receives the result. ``out``: a tensor like ``p`` that receives it.
    """
    p = dense(p)
    if out is None:
        out = p if fresh else torch.empty_like(p)
    elif out is not p:
        require_out(out, "p", p)
    mask = torch.empty((p.shape[0], mask_bytes(p)), dtype=torch.uint8, device=p.device)
    OP(p, bias, float(slope), backend, out, mask)
    return out, mask


def conv_bias_act_mask_reference(
    p: torch.Tensor, bias: torch.Tensor | None, slope: float, out: torch.Tensor, mask: torch.Tensor
) -> None:
    """The specification of :func:`bias_act_mask`: writes ``out`` and ``mask``."""
    values = p.to(arithmetic_dtype(p))
    if bias is not None:
        values = values + bias.to(values.dtype).reshape(-1, *[1] * (p.ndim - 2))
    positive = values > 0
    out.copy_(torch.where(positive, values, slope * values))
    mask.copy_(pack(in_memory_order(positive.contiguous(memory_format=memory_format(p)))))


OP = declare(
    "conv_bias_act_mask(Tensor p, Tensor? bias, float slope, Tensor(a!) out, Tensor(b!) mask) -> ()",
    reference=conv_bias_act_mask_reference,
    backends=("cpu", "triton", "cuda"),
)
