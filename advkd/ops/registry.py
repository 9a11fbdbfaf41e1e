"""The backends of each op, the choice among those that can run here, and the reason for each gap."""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.autograd.forward_ad as forward_ad

from ..errors import BackendUnavailableError, InputError
from ..runtime.extension import extension_gap
from . import cuda
from .derivatives import carries_tangent
from .layout import DTYPES

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Fastest first; ``auto`` takes the first one that an op has and that can run on the tensor's device."""

_NAMES = (*BACKENDS, "auto")

IMPLEMENTED = {}
"""Op name -> backends it is written for; each op's file adds its own."""

BY_NAME = {}
"""Op name -> backends that ``auto`` passes over: slower than the reference when the op is called alone."""


CAPABILITY = {}
"""Op name -> the least compute capability that its GPU kernels are written for."""

STORED = {}
"""Op name -> backend -> dtypes that its kernels store."""


def implement(
    name: str,
    *backends: str,
    by_name: tuple[str, ...] = (),
    capability: tuple[int, int] = (7, 0),
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType({}),
) -> None:
    """Declare that op ``name`` is written for ``backends`` (called once, where the op is registered).

    Args:
        name: of the op.
        backends: those that it is written for beside the reference.
        by_name: backends that ``auto`` passes over.
        capability: least compute capability of its GPU kernels.
        dtypes: backend -> dtypes that its kernels store, where those are not :data:`advkd.ops.layout.DTYPES`.
    """
    IMPLEMENTED[name] = ("reference", *backends)
    BY_NAME[name] = by_name
    CAPABILITY[name] = capability
    STORED[name] = {**dict.fromkeys(backends, DTYPES), **dtypes}


def refuse_order_0(name: str, *tensors: object) -> None:
    """Raise where a derivative through op ``name`` is asked for.

    An op with outputs among its arguments has no autograd formula that would. Public functions call this first: the transforms
    of ``torch.func`` can be seen only there. Inside the op their tensors are plain ones, and a derivative would silently be
    zero. The op calls it again for direct callers.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode(name, *tensors)
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise RuntimeError(f"{name} has no gradient (order of differentiability 0): call it under torch.no_grad()")


def refuse_forward_mode(name: str, *tensors: object) -> None:
    """Raise where a tensor carries a tangent, which op ``name`` would silently drop."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and carries_tangent(tensor):
            raise RuntimeError(f"{name} has no gradient in forward mode: call it with the primal (forward_ad.unpack_dual)")


def require_known(backend: object) -> None:
    """Raise :class:`InputError` unless ``backend`` is a backend's name or ``auto``."""
    if not isinstance(backend, str) or backend not in _NAMES:
        raise InputError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")


def gap(name: str, backend: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run an op on a device, or None if it can.

    Args:
        name: an op of the package, such as ``sampler_step``.
        backend: one of :data:`BACKENDS`.
        device: the tensors' ``torch.device``.

    Returns:
        The reason as text, ready to be shown, or None.

    Examples:
        >>> gap("sampler_step", "cpu", torch.device("cuda"))
        'runs on CPU tensors, not on cuda'
    """
    if backend not in IMPLEMENTED[name]:
        return "not written for this op yet"
    return _MISSING[backend](device) or (_capability_gap(name, device) if backend in ("cuda", "triton") else None)


def _capability_gap(name, device):
    if device.type != "cuda":
        return None
    has, needs = torch.cuda.get_device_capability(device), CAPABILITY[name]
    return None if has >= needs else f"needs compute capability {needs[0]}.{needs[1]}, this GPU has {has[0]}.{has[1]}"


def choose(name: str, backend: str, device: torch.device) -> str:
    """The backend that runs op ``name``: the one asked for, or for ``auto`` the fastest that can.

    The environment variable ``ADVKD_BACKEND`` steers ``auto`` (where it cannot run, the next best does). Unless it names them,
    ``auto`` passes over backends that are slower than the reference when the op is called alone, and Triton's interpreter.

    Args:
        name: an op of the package, such as ``sampler_step``.
        backend: ``cuda``, ``triton``, ``cpu``, ``reference``, or ``auto`` for the first of them that can run.
        device: the tensors' ``torch.device``.

    Returns:
        The name of one of :data:`BACKENDS`. The op itself goes on to the reference where ``auto`` has chosen kernels that do
        not store the tensors' dtype.

    Raises:
        InputError: ``backend`` or ``ADVKD_BACKEND`` is not a backend's name.
        BackendUnavailableError: the backend asked for cannot run; the message gives the reason.

    Examples:
        >>> choose("sampler_step", "reference", torch.device("cpu"))
        'reference'
    """
    require_known(backend)
    return _choose(name, backend, device, os.environ.get("ADVKD_BACKEND", "auto") if backend == "auto" else "")


@functools.cache
def _choose(name, backend, device, preferred):
    """:func:`choose`, cached: an op of a few microseconds calls it every time."""
    if backend != "auto":
        if reason := gap(name, backend, device):
            raise BackendUnavailableError(f"backend {backend!r} cannot run {name} on {device}: {reason}")
        return backend
    if preferred not in _NAMES:
        raise InputError(f"ADVKD_BACKEND must be one of {', '.join(('auto', *BACKENDS))}, got {preferred!r}")
    order = BACKENDS if preferred == "auto" else (preferred, *BACKENDS)
    order = [b for b in order if b not in BY_NAME[name] or b == preferred]
    # Triton's interpreter runs when asked for by name, never by itself.
    order = [b for b in order if not (b == "triton" and device.type == "cpu" and preferred != "triton")]
    return next(candidate for candidate in order if gap(name, candidate, device) is None)


def choose_for(name: str, x: torch.Tensor, backend: str) -> str:
    """:func:`choose` for op ``name`` on tensor ``x``; under ``auto`` the reference takes dtypes that kernels do not store."""
    chosen = choose(name, backend, x.device)
    if chosen == "reference" or x.dtype in STORED[name][chosen]:
        return chosen
    if backend != "auto":
        *others, last = _stored(name, chosen)
        names = f"{', '.join(others)} and {last}" if others else last
        raise InputError(f"backend {backend!r} of {name} takes {names}, got {x.dtype}")
    return "reference"


def _stored(name, backend):
    """Names of the dtypes that a backend stores."""
    return [str(dtype).removeprefix("torch.") for dtype in STORED[name][backend]]


def choose_for_dtype(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> str:
    """:func:`choose` for op ``name``, asked for results of ``dtype``; as :func:`choose_for`, and ``dtype`` may be anything."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point dtype, got {dtype!r}")
    chosen = choose(name, backend, device)
    if chosen == "reference" or dtype in STORED[name][chosen]:
        return chosen
    if backend != "auto":
        raise InputError(f"the dtype must be {' or '.join(_stored(name, chosen))} for backend {backend!r}, got {dtype}")
    return "reference"


@functools.cache
def _triton_installed():
    return importlib.util.find_spec("triton") is not None


def _cpu_gap(device):
    return f"runs on CPU tensors, not on {device}" if device.type != "cpu" else extension_gap("cpu")


def _cuda_gap(device):
    return cuda_gap() or (f"runs on CUDA tensors, not on {device}" if device.type != "cuda" else None)


@functools.cache
def cuda_gap() -> str | None:
    """None if the CUDA kernels can run, from the extension or compiled by CuPy; else the reasons."""
    missing = extension_gap("cuda")
    if missing is None or not torch.cuda.is_available():
        return missing
    also = cuda.gap()
    return also and f"{missing}; {also}"


def cuda_launcher(name: str) -> Callable:
    """Launcher ``name`` of the CUDA kernels: the extension's, or CuPy's where that is not built."""
    return getattr(torch.ops.advkd_cuda, name).default if extension_gap("cuda") is None else cuda.launcher(name)


def cuda_query(name: str) -> Callable:
    """Question ``name`` about the CUDA kernels' plans (``csrc/cuda/host/ops.h``), by either extension.

    Raises:
        BackendUnavailableError: neither is built.
    """
    if extension_gap("cuda") is None:
        return getattr(torch.ops.advkd_cuda, name).default
    if reason := extension_gap("cpu"):
        raise BackendUnavailableError(f"plans of CUDA kernels need an extension: {reason}")
    return getattr(torch.ops.advkd_cpu, f"cuda_{name}").default


def _triton_gap(device):
    if not _triton_installed():
        return "Triton is not installed (pip install 'advkd[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if device.type == "cuda" else f"runs on CUDA tensors, not on {device} (TRITON_INTERPRET=1 interprets)"


_MISSING = {"reference": lambda device: None, "cpu": _cpu_gap, "triton": _triton_gap, "cuda": _cuda_gap}
