"""Checks of arguments that many functions share: what is refused is an :class:`InputError` that names it."""

import operator

import torch

from .errors import InputError

_LARGEST = torch.finfo(torch.float32).max


def real(name, value):
    """``value`` as a float: Python's and numpy's numbers, and tensors of one number that can be read."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise InputError(f"{name} must be a number, got {value!r}")


def finite(name, value):
    """``value`` as a float that float32 holds."""
    number = real(name, value)
    if not abs(number) <= _LARGEST:
        raise InputError(f"{name} must be finite, got {value!r}")
    return number


def whole(name, value, least=0, below=2**63):
    """``value`` as an int in [least, below)."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a whole number, got {value!r}") from None
    if not least <= number < below:
        limit = "" if below == 2**63 else f" and below {below}"
        raise InputError(f"{name} must be at least {least}{limit}, got {number}")
    return number


def flag(name, value):
    """``value`` as a bool: it is one, or 0 or 1."""
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise InputError(f"{name} must be True or False, got {value!r}")


def sizes(name, value, length=None):
    """``value`` as a tuple of sizes, of ``length`` axes where that is given."""
    try:
        found = tuple(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, (str, bytes, dict)) or length not in (None, len(found)):
        wanted = "sizes" if length is None else f"{length} sizes"
        raise InputError(f"{name} must be a sequence of {wanted}, got {value!r}")
    return tuple(whole(name, side) for side in found)


def device(name, value):
    """``value`` as a torch device that this torch knows."""
    try:
        return torch.device(value)
    except (TypeError, RuntimeError, ValueError):
        raise InputError(f"{name} must be a device, as 'cpu' or 'cuda:0', got {value!r}") from None


def require_dense(name, tensor):
    """An :class:`InputError` unless ``tensor`` is a tensor with strides."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # Code that is compiled has no such tensors, and the compiler no such questions.
    if torch.compiler.is_compiling():
        return
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        raise InputError(f"{name} must be a dense tensor with values, got a {kind} one")
