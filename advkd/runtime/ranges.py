"""Named stages for profilers; off by default, when each costs no more than a call.

``ADVKD_RANGES=nvtx`` names them for Nsight (the ``nvtx`` package, ``pip install 'advkd[profile]'``), ``ADVKD_RANGES=torch`` for
torch.profiler. ``ADVKD_RANGES=clock:FOLDER`` needs no profiler: every process sums the own seconds and the calls of its main
thread's ranges, and writes them to ``FOLDER/PID.json`` when it ends. Work captured in a CUDA graph is named when it is
captured, not when it is replayed.
"""

import atexit
import contextlib
import multiprocessing
import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter

from ..errors import InputError
from .files import write_json
from .folders import require_output_folder

_NOTHING = contextlib.nullcontext()
_open = None


def name_ranges(kind: str) -> None:
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


def named(name: str) -> AbstractContextManager:
    """A context manager whose body is part of stage ``name``."""
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
    if not folder:
        raise InputError("ADVKD_RANGES=clock needs a folder for its files: ADVKD_RANGES=clock:FOLDER")
    return Clock(folder)


class Clock:
    """Sums the time of every range less that of the ranges inside, by path: "distillation / critic update".

    Called with a name it returns a context manager, which does nothing outside the main thread. :meth:`stop`, at the latest
    when the process ends, writes ``folder/PID.json``.
    """

    def __init__(self, folder: str | Path):
        self._folder = require_output_folder(folder, "ADVKD_RANGES=clock:FOLDER")
        self._names: list[str] = []
        self._ranges: dict[str, dict[str, float]] = {}
        self._since = 0.0
        atexit.register(self.stop)

    def __call__(self, name: str) -> AbstractContextManager:
        return self._range(name) if threading.current_thread() is threading.main_thread() else _NOTHING

    @contextlib.contextmanager
    def _range(self, name):
        self._charge()
        self._names.append(name)
        self._innermost()["calls"] += 1
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def _charge(self):
        """Add the time since the last change to the innermost open range."""
        now = perf_counter()
        if self._names:
            self._innermost()["seconds"] += now - self._since
        self._since = now

    def _innermost(self):
        return self._ranges.setdefault(" / ".join(self._names), {"seconds": 0.0, "calls": 0})

    def stop(self) -> None:
        """Write the sums."""
        atexit.unregister(self.stop)
        found = {"process": multiprocessing.current_process().name, "ranges": self._ranges}
        write_json(self._folder / f"{os.getpid()}.json", found)


_KINDS = {"": lambda _: None, "nvtx": _nvtx, "torch": _torch, "clock": _clock}

if os.environ.get("ADVKD_RANGES"):
    name_ranges(os.environ["ADVKD_RANGES"])
