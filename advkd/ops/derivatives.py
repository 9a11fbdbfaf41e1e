"""Tests whether a derivative through a tensor is asked for, under any nesting of the transforms of ``torch.func``."""

import contextlib

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C._functorch import TransformType, get_unwrapped, maybe_get_level, peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def wants_derivative(tensor: torch.Tensor) -> bool:
    """True if a gradient by ``tensor`` may be asked for later, or if it carries a tangent."""
    return (tensor.requires_grad and torch.is_grad_enabled()) or carries_tangent(tensor)


def carries_tangent(tensor: torch.Tensor) -> bool:
    """True if ``tensor`` has a tangent in forward mode, at any level of nested transforms."""
    if forward_ad._current_level < 0:
        return False
    # Dynamo cannot trace the walk through the levels.
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return _carries_at_any_level(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def _carries_at_any_level(tensor):
    """A transform's tangent is visible at its own level only, once the inner ones are left."""
    with contextlib.ExitStack() as left:
        while (innermost := peek_interpreter_stack()) is not None:
            if maybe_get_level(tensor) == innermost.level():
                if innermost.key() == TransformType.Jvp and forward_ad.unpack_dual(tensor).tangent is not None:
                    return True
                tensor = get_unwrapped(tensor)
            left.enter_context(temporarily_pop_interpreter_stack())
        return forward_ad.unpack_dual(tensor).tangent is not None
