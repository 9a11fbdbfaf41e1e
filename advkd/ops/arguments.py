"""Checks of arguments that many functions share; each raises an :class:`InputError` that names the argument."""

import operator
from typing import Any

import torch

from ..errors import InputError
from .derivatives import wants_derivative

_LARGEST = torch.finfo(torch.float32).max


def real(name: str, value: Any, constant: bool = True) -> float:
    """``value`` as a float: Python's and numpy's numbers, and tensors of one number that can be read.

    ``constant``: refuse a tensor by which a derivative is wanted, which the float would silently drop.
    """
    if isinstance(value, float):
        return float(value)
    if constant and isinstance(value, torch.Tensor) and wants_derivative(value):
        raise InputError(f"{name} must be a plain number: no gradient flows through it; give float({name})")
    try:
        if not _is_text(value):
            return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise InputError(f"{name} must be a number, got {value!r}")


def _is_text(value):
    """True for a value that ``float`` would parse: text, a buffer of bytes, or numpy's array of either."""
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return True
    return getattr(getattr(value, "dtype", None), "kind", "") in ("S", "U")


def finite(name: str, value: Any, constant: bool = True) -> float:
    """:func:`real`, within the range of float32."""
    number = real(name, value, constant)
    if not abs(number) <= _LARGEST:
        raise InputError(f"{name} must be finite, got {value!r}")
    return number


def whole(name: str, value: Any, least: int = 0, below: int = 2**63) -> int:
    """``value`` as an int in [least, below)."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a whole number, got {value!r}") from None
    if not least <= number < below:
        limit = "" if below == 2**63 and number < least else f" and below {below}"
        raise InputError(f"{name} must be at least {least}{limit}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool, from a bool, 0 or 1 of Python, numpy or a tensor."""
    try:
        # numpy's bool is no index.
        number = value if isinstance(value, int) else operator.index(value.item())
    except (AttributeError, TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number not in (0, 1):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return bool(number)


def sizes(name: str, value: Any, length: int | None = None) -> tuple[int, ...]:
    """``value`` as a tuple of sizes, ``length`` of them if that is given."""
    try:
        found = tuple(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, (str, bytes, dict)) or length not in (None, len(found)):
        wanted = "sizes" if length is None else f"{length} sizes"
        raise InputError(f"{name} must be a sequence of {wanted}, got {value!r}")
    return tuple(whole(name, side) for side in found)


def device(name: str, value: Any) -> torch.device:
    """``value`` as a torch device that this torch knows."""
    try:
        return torch.device(value)
    except (TypeError, RuntimeError, ValueError):
        raise InputError(f"{name} must be a device, as 'cpu' or 'cuda:0', got {value!r}") from None


def require_dense(name: str, tensor: Any) -> None:
    """Raise :class:`InputError` unless ``tensor`` is a tensor with strides."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # Dynamo cannot trace these queries.
    if torch.compiler.is_compiling():
        return
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        raise InputError(f"{name} must be a dense tensor with values, got a {kind} one")
