"""Devices by name."""

import contextlib

import torch

from ..errors import InputError
from .hub import reason


def require_device(name):
    """A torch device that computes and can be read back.

    Raises:
        InputError: ``name`` is no device, or one that is not there or holds no values (``meta``).
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device raises errors of its own where it is missing
        why = "it holds no values" if str(name).startswith("meta") else reason(error).partition(". ")[0]
        raise InputError(f"--device {str(name)!r} is not available ({why}); use cpu, or cuda where there is a GPU") from error
    # There is one CPU: to torch's comparisons "cpu:1" would be another.
    return torch.device("cpu") if device.type == "cpu" else device


AUTOCAST = ("cpu", "cuda")
"""Devices whose autocast is heeded."""


def without_autocast(x):
    """A context manager: what is computed on ``x``'s device inside has the dtypes of its tensors, wherever it is called."""
    kind = x.device.type
    on = kind in AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


@contextlib.contextmanager
def plain_defaults():
    """torch's own defaults within: float32 on the CPU, whatever the caller has set. Also a decorator.

    For whole runs, whose libraries make tensors and weights without a dtype: a weight drawn in float64 is another number. The
    default dtype belongs to the process, so it is touched only where it is another one.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
