"""Which backends an op has, which can run here, and the reason for each gap."""

import functools
import importlib.util
import os

import torch
import torch.autograd.forward_ad as forward_ad

from ..errors import BackendUnavailableError, InputError
from ..runtime.extension import extension_gap
from .derivatives import carries_tangent

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Fastest first; ``auto`` takes the first one that an op has and that can run on the tensor's device."""

IMPLEMENTED = {}
"""Op name -> backends it is written for; each op's file adds its own line."""

BY_NAME = {}
"""Op name -> backends that ``auto`` passes over: slower than the reference when the op is called alone."""


CAPABILITY = {}
"""Op name -> the least compute capability that its GPU kernels are written for."""


def implement(name, *backends, by_name=(), capability=(7, 0)):
    """Declare that op ``name`` is written for ``backends`` (called once, where the op is registered)."""
    IMPLEMENTED[name] = ("reference", *backends)
    BY_NAME[name] = by_name
    CAPABILITY[name] = capability


def refuse_gradients(library, name):
    """Declare op ``name`` of order 0: a gradient through it raises instead of being silently wrong."""

    def backward(ctx, *gradients):
        raise RuntimeError(f"{name} has no gradient (order of differentiability 0)")

    torch.library.register_autograd(f"advkd::{name}", backward, lib=library)


def refuse_order_0(name, *tensors):
    """Raise where a derivative through op ``name`` is asked for: an op with outputs among its arguments can have no autograd
    formula that would.

    Public functions call it first: only there can the transforms of ``torch.func`` be seen, inside of the op their tensors are
    plain ones, and a derivative would be zero without a word. The op calls it for whoever calls that.
    """
    refuse_forward_mode(name, *tensors)
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise RuntimeError(f"{name} has no gradient (order of differentiability 0): call it under torch.no_grad()")


def refuse_forward_mode(name, *tensors):
    """Raise where a tensor carries a tangent, which op ``name`` would leave behind without a word."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and carries_tangent(tensor):
            raise RuntimeError(f"{name} has no gradient in forward mode: call it with the primal (forward_ad.unpack_dual)")


def require_known(backend):
    """An :class:`InputError` unless ``backend`` is the name of one, or ``auto``."""
    if not isinstance(backend, str) or backend not in (*BACKENDS, "auto"):
        raise InputError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")


def gap(name, backend, device):
    """The reason why ``backend`` cannot run op ``name`` on ``device`` (a ``torch.device``), or None if it can."""
    if backend not in IMPLEMENTED[name]:
        return "not written for this op yet"
    return _MISSING[backend](device) or (_capability_gap(name, device) if backend in ("cuda", "triton") else None)


def _capability_gap(name, device):
    if device.type != "cuda":
        return None
    has, needs = torch.cuda.get_device_capability(device), CAPABILITY[name]
    return None if has >= needs else f"needs compute capability {needs[0]}.{needs[1]}, this GPU has {has[0]}.{has[1]}"


def choose(name, backend, device):
    """The backend that runs op ``name``: the one asked for, or for ``auto`` the fastest that can.

    The environment variable ``ADVKD_BACKEND`` steers ``auto`` (where it cannot run, the next best does).

    Raises:
        InputError: ``backend`` is not a backend's name.
        BackendUnavailableError: the backend asked for cannot run; the message gives the reason.
    """
    require_known(backend)
    return _choose(name, backend, device, os.environ.get("ADVKD_BACKEND", "auto"))


@functools.cache
def _choose(name, backend, device, preferred):
    """:func:`choose`, remembered: an op of a few microseconds asks on every call."""
    if backend != "auto":
        if reason := gap(name, backend, device):
            raise BackendUnavailableError(f"backend {backend!r} cannot run {name} on {device}: {reason}")
        return backend
    if preferred not in (*BACKENDS, "auto"):
        raise InputError(f"ADVKD_BACKEND must be one of {', '.join(('auto', *BACKENDS))}, got {preferred!r}")
    order = BACKENDS if preferred == "auto" else (preferred, *BACKENDS)
    order = [b for b in order if b not in BY_NAME[name] or b == preferred]
    # Triton's interpreter runs when asked for by name, never by itself.
    order = [b for b in order if not (b == "triton" and device.type == "cpu" and preferred != "triton")]
    return next(candidate for candidate in order if gap(name, candidate, device) is None)


@functools.cache
def _triton_installed():
    return importlib.util.find_spec("triton") is not None


def _cpu_gap(device):
    return f"runs on CPU tensors, not on {device}" if device.type != "cpu" else extension_gap("cpu")


def _cuda_gap(device):
    return cuda_gap() or (f"runs on CUDA tensors, not on {device}" if device.type != "cuda" else None)


@functools.cache
def cuda_gap():
    """None if the CUDA kernels can run, from the extension or compiled by CuPy; else the reasons."""
    missing = extension_gap("cuda")
    if missing is None or not torch.cuda.is_available():
        return missing
    from . import cupy_kernels

    also = cupy_kernels.gap()
    return also and f"{missing}; {also}"


def cuda_launcher(name):
    """Launcher ``name`` of the CUDA kernels: the extension's, or CuPy's where that is not built."""
    if extension_gap("cuda") is None:
        return getattr(torch.ops.advkd_cuda, name).default
    from . import cupy_kernels

    return getattr(cupy_kernels, name)


def _triton_gap(device):
    if not _triton_installed():
        return "Triton is not installed (pip install 'advkd[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if device.type == "cuda" else f"runs on CUDA tensors, not on {device} (TRITON_INTERPRET=1 interprets)"


_MISSING = {"reference": lambda device: None, "cpu": _cpu_gap, "triton": _triton_gap, "cuda": _cuda_gap}
