"""Dtypes, layouts and checks of tensors that the ops share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError
from .arguments import require_dense, whole

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Storage of the kernels; the references also take float64."""


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The layout of an op: channels_last where ``x`` is that and not contiguous, else contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where it is contiguous or channels_last, else a contiguous copy."""
    return x.contiguous(memory_format=memory_format(x))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` in channels_last storage, with such strides even where it has one channel: convolutions look at them."""
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """``(N, elements)``: each sample's elements of a dense tensor in the order of memory; a view."""
    if memory_format(x) == torch.channels_last:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(x.shape[0], -1)


def arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pair(value: Any) -> tuple:
    """An option of a convolution or a window as a pair: ``(value, value)`` for a number or a list of one."""
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return value * 2 if len(value) == 1 else value


def windows(
    size: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> tuple[list[list[int]], list[int]]:
    """The options of a convolution as pairs, and the sides of its result, which are at least 1.

    Raises:
        InputError: options other than numbers or pairs of them, or a kernel that does not fit into ``size``, (H, W).
    """
    pairs = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        value = pair(value)
        if len(value) != 2:
            raise InputError(f"{name} must be a whole number or a pair of them, got {value}")
        pairs.append([whole(name, n, least, 2**31) for n in value])
    # The dilation of a kernel of one pixel has no meaning, and in float16 it ends the process within oneDNN.
    pairs[2] = [q if k > 1 else 1 for q, k in zip(pairs[2], kernel)]
    sides = [(n + 2 * p - q * (k - 1) - 1) // s + 1 for n, k, s, p, q in zip(size, kernel, *pairs)]
    if min(*size, *kernel, *sides) < 1:
        found = f"stride {stride}, padding {padding} and dilation {dilation}"
        raise InputError(f"weight's kernel {tuple(kernel)} does not fit into {tuple(size)} pixels with {found}")
    return pairs, sides


def with_usual_strides(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``weight``, copied where an axis of one pixel may have any stride: torch's grouped convolutions misread some of those."""
    if groups == 1 or 1 not in weight.shape[2:]:
        return weight
    return torch.empty_like(weight, memory_format=memory_format(weight)).copy_(weight)


def require_floating(name: str, tensor: Any) -> None:
    """Raise :class:`InputError` unless ``tensor`` has a dtype that the ops take."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (*DTYPES, torch.float64):
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise InputError(f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {kind}")
    require_dense(name, tensor)


def require_samples(name: str, tensor: Any) -> None:
    """:func:`require_floating`, and an axis of samples."""
    require_floating(name, tensor)
    if tensor.ndim < 1:
        raise InputError(f"{name} must have shape (N, ...), got ()")


def require_like(name: str, tensor: Any, other_name: str, other: torch.Tensor) -> None:
    """Raise :class:`InputError` unless ``tensor`` has ``other``'s shape, dtype, device and layout."""
    require_floating(name, tensor)
    found, expected = ((tuple(t.shape), t.dtype, t.device) for t in (tensor, other))
    if found != expected:
        raise InputError(f"{name} must be like {other_name}, {expected}, got {found}")
    if not tensor.is_contiguous(memory_format=memory_format(other)):
        raise InputError(f"{name} must be laid out like {other_name} ({memory_format(other)}), got strides {tensor.stride()}")


def require_out(out: Any, name: str, x: torch.Tensor) -> None:
    """Raise :class:`InputError` unless ``out`` is like ``x``, and is ``x`` itself or shares no memory with it."""
    require_like("out", out, name, x)
    require_writable("out", out)
    if has_memory(out):
        require_no_partial_overlap("out", out, name, x)


def has_values(tensor: torch.Tensor) -> bool:
    """False for tensors without numbers to read: those on meta and those of a ``FakeTensorMode``."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def has_memory(tensor: torch.Tensor) -> bool:
    """True if ``tensor`` has an address: not in compiled code, nor where tensors have no values."""
    return not torch.compiler.is_compiling() and has_values(tensor)


def require_writable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a lazily negated view, whose memory has other numbers, and a tensor made in inference mode."""
    if torch.compiler.is_compiling():
        return
    if tensor.is_neg():
        raise InputError(f"{name} must not be a lazily negated view; give its resolve_neg()")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise InputError(f"{name} was made in inference mode, and can be written in that mode only; give a clone of it")


def require_no_partial_overlap(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Refuse a tensor to write that overlaps one to read without being the same tensor."""
    if tensor is other:
        return
    if overlap(tensor, other) and not _same(tensor, other):
        raise InputError(f"{name} overlaps {other_name} without being the same tensor")


def _same(tensor, other):
    return tensor.data_ptr() == other.data_ptr() and tensor.dtype == other.dtype and tensor.stride() == other.stride()


def require_apart(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Refuse a tensor to write that shares memory with one that is read in another order."""
    if overlap(tensor, other):
        raise InputError(f"{name} overlaps {other_name}, which is read while it is written; give it memory of its own")


def overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors may share memory."""
    (first, last), (begin, end) = span(tensor), span(other)
    return begin < last and first < end


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one past the last address that a tensor may touch."""
    first = tensor.data_ptr()
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    return first, first + tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
