"""Names for the stages of the work, for profilers: off by default, and then no more than a call.

``ADVKD_RANGES=nvtx`` names them for Nsight (the ``nvtx`` package, ``pip install 'advkd[profile]'``), ``ADVKD_RANGES=torch`` for
torch.profiler. What is captured in a CUDA graph is named when it is captured, and not when it is replayed.
"""

import contextlib
import os

from .errors import InputError

_NOTHING = contextlib.nullcontext()
_open = None


def name_ranges(kind):
    """Name ranges from now on: ``nvtx``, ``torch``, or ``""`` for no longer.

    Raises:
        InputError: another kind, or the ``nvtx`` package is missing.
    """
    global _open
    if kind not in _KINDS:
        raise InputError(f"ADVKD_RANGES must be one of {', '.join(repr(k) for k in _KINDS)}, got {kind!r}")
    _open = _KINDS[kind]()


def named(name):
    """A context manager: what runs inside is part of stage ``name``."""
    return _NOTHING if _open is None else _open(name)


def _nvtx():
    try:
        import nvtx
    except ImportError:
        raise InputError("ADVKD_RANGES=nvtx needs the nvtx package: pip install 'advkd[profile]'") from None
    return lambda name: nvtx.annotate(name, domain="advkd")


def _torch():
    import torch

    return lambda name: torch.profiler.record_function(f"advkd: {name}")


_KINDS = {"": lambda: None, "nvtx": _nvtx, "torch": _torch}

if os.environ.get("ADVKD_RANGES"):
    name_ranges(os.environ["ADVKD_RANGES"])
