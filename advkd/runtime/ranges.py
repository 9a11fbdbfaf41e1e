"""Names for the stages of the work, for profilers: off by default, and then no more than a call.

``ADVKD_RANGES=nvtx`` names them for Nsight (the ``nvtx`` package, ``pip install 'advkd[profile]'``), ``ADVKD_RANGES=torch`` for
torch.profiler. ``ADVKD_RANGES=clock:FOLDER`` needs no profiler: every process sums the own seconds and the calls of its main
thread's ranges, and writes them to ``FOLDER/PID.json`` when it ends. What is captured in a CUDA graph is named when it is
captured, and not when it is replayed.
"""

import contextlib
import os

from ..errors import InputError

_NOTHING = contextlib.nullcontext()
_open = None


def name_ranges(kind):
    """Name ranges from now on: ``nvtx``, ``torch``, ``clock:FOLDER``, or ``""`` for no longer (a clock then writes its file).

    Raises:
        InputError: another kind, the ``nvtx`` package is missing, or a ``clock`` has no folder that can be written to.
    """
    global _open
    name, _, folder = kind.partition(":")
    if name not in _KINDS or (folder and name != "clock"):
        raise InputError(f"ADVKD_RANGES must be one of '', 'nvtx', 'torch', 'clock:FOLDER', got {kind!r}")
    before, _open = _open, _KINDS[name](folder)
    if hasattr(before, "stop"):
        before.stop()


def named(name):
    """A context manager: what runs inside is part of stage ``name``."""
    return _NOTHING if _open is None else _open(name)


def _nvtx(_):
    try:
        import nvtx
    except ImportError:
        raise InputError("ADVKD_RANGES=nvtx needs the nvtx package: pip install 'advkd[profile]'") from None
    return lambda name: nvtx.annotate(name, domain="advkd")


def _torch(_):
    import torch

    return lambda name: torch.profiler.record_function(f"advkd: {name}")


def _clock(folder):
    from .clock import Clock

    if not folder:
        raise InputError("ADVKD_RANGES=clock needs a folder for its files: ADVKD_RANGES=clock:FOLDER")
    return Clock(folder)


_KINDS = {"": lambda _: None, "nvtx": _nvtx, "torch": _torch, "clock": _clock}

if os.environ.get("ADVKD_RANGES"):
    name_ranges(os.environ["ADVKD_RANGES"])
