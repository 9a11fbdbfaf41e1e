"""Gradient of a convolution by its input, where that is an image: the last step of a backward pass down to the image.

With one to four input channels oneDNN's backward-data pass reaches a sixth of the rate that it has elsewhere; the C++ kernel
makes dot products over the features instead. Elsewhere the convolution's own backward pass is taken.
"""

from collections.abc import Sequence

import torch

from ..errors import InputError
from . import registry
from .arguments import sizes, whole
from .declaration import declare
from .layout import memory_format, require_floating, windows, with_usual_strides

CHANNELS, TAPS = 4, 64
"""Limits of the kernel."""


def image_gradient(
    d: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Gradient dL/dx of ``y = conv2d(x, weight)`` from ``d`` = dL/dy.

    Args:
        d: ``(N, out, h, w)``, float32 (all backends), bfloat16, float16 or float64 (reference).
        weight: ``(out, C / groups, kh, kw)`` of ``d``'s dtype.
        shape: ``(N, C, H, W)`` of x.
        stride: the convolution's, an int or a pair (vertical, horizontal), as ``torch.nn.functional.conv2d`` takes it.
        padding: zeros that the convolution put around the image, an int or a pair.
        dilation: distance of the kernel's taps, an int or a pair.
        groups: number of groups that the channels were convolved in.
        backend: ``cpu`` takes channels_last ``d`` (another layout is copied to it), at most 4 channels and 64 taps, one group.

    Returns:
        ``(N, C, H, W)`` in ``d``'s dtype, in channels_last storage.

    Raises:
        InputError: tensors that do not fit each other, or that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here; the message gives the reason.
        RuntimeError: a tangent in forward mode comes in, or a backward pass reaches the result. Order of differentiability 0.

    Examples:
        >>> image_gradient(torch.ones(2, 16, 4, 4), torch.ones(16, 3, 4, 4), (2, 3, 8, 8), stride=2, padding=1).shape
        torch.Size([2, 3, 8, 8])
    """
    require_floating("d", d)
    require_floating("weight", weight)
    if weight.dtype != d.dtype or weight.device != d.device:
        raise InputError(f"weight must be {d.dtype} on {d.device} like d, got {weight.dtype} on {weight.device}")
    shape, groups = sizes("shape", shape, 4), whole("groups", groups, 1)
    registry.require_known(backend)
    registry.refuse_forward_mode("image_gradient", d, weight)
    if d.ndim != 4 or weight.ndim != 4 or d.shape[:2] != (shape[0], weight.shape[0]):
        raise InputError(f"d {tuple(d.shape)}, weight {tuple(weight.shape)} and shape {tuple(shape)} do not fit each other")
    if weight.shape[0] % groups:
        raise InputError(f"weight must have a multiple of groups, {groups}, of output channels, got {tuple(weight.shape)}")
    pairs, sides = windows(shape[2:], weight.shape[2:], stride, padding, dilation)
    if list(d.shape[2:]) != sides or shape[1] != weight.shape[1] * groups:
        raise InputError(f"d must be (N, out, {sides[0]}, {sides[1]}) for x of shape {tuple(shape)}, got {tuple(d.shape)}")
    thin = d.dtype == torch.float32 and groups == 1 and 1 <= shape[1] <= CHANNELS and weight.shape[2:].numel() <= TAPS
    if backend == "cpu" and not thin:
        raise InputError("backend 'cpu' of image_gradient takes float32, one group, at most 4 channels and 64 taps")
    wish = backend if thin or backend != "auto" else "reference"
    return OP(d, weight, list(shape), *pairs, groups, wish)


def image_gradient_reference(
    d: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The specification of :func:`image_gradient`."""
    x = torch.empty(shape, dtype=d.dtype, device=d.device, memory_format=memory_format(d))
    args = (stride, padding, dilation, False, [0, 0], groups, [True, False, False])
    found = torch.ops.aten.convolution_backward(d, x, with_usual_strides(weight, groups), None, *args)[0]
    return found.contiguous(memory_format=torch.channels_last)


def image_gradient_cpu(
    d: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The C++ kernel, on channels_last storage."""
    out = torch.empty((shape[0], *shape[2:], shape[1]), dtype=d.dtype, device=d.device)
    if out.numel():
        features, packed = d.permute(0, 2, 3, 1).contiguous(), weight.permute(2, 3, 1, 0).contiguous()
        torch.ops.advkd_cpu.image_gradient.default(features, packed, stride, padding, dilation, out)
    return out.permute(0, 3, 1, 2)


def _fake(d, weight, shape, stride, padding, dilation, groups, backend):
    return torch.empty(shape, dtype=d.dtype, device=d.device, memory_format=torch.channels_last)


OP = declare(
    "image_gradient(Tensor d, Tensor weight, int[] shape, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    reference=image_gradient_reference,
    backends=("cpu",),
    launchers={"cpu": image_gradient_cpu},
    fake=_fake,
    dtypes={"cpu": (torch.float32,)},
)
