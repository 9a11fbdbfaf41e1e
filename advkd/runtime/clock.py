"""A clock for named ranges: the own seconds and the calls of each, written when the process ends (see :mod:`advkd.runtime.ranges`)."""

import atexit
import contextlib
import multiprocessing
import os
import threading
from time import perf_counter

from .files import require_output_folder, write_json

_NOTHING = contextlib.nullcontext()


class Clock:
    """Sums the time of every range less that of the ranges inside, by path: "distillation / critic update".

    It is called with a name and gives a context manager, which in other threads than the main one does nothing.
    :meth:`stop`, at the latest when the process ends, writes ``folder/PID.json``.
    """

    def __init__(self, folder):
        self._folder = require_output_folder(folder, "ADVKD_RANGES=clock:FOLDER")
        self._names, self._ranges, self._since = [], {}, 0.0
        atexit.register(self.stop)

    def __call__(self, name):
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
        """The time since the last change belongs to the innermost open range."""
        now = perf_counter()
        if self._names:
            self._innermost()["seconds"] += now - self._since
        self._since = now

    def _innermost(self):
        return self._ranges.setdefault(" / ".join(self._names), {"seconds": 0.0, "calls": 0})

    def stop(self):
        """Write what was summed."""
        atexit.unregister(self.stop)
        found = {"process": multiprocessing.current_process().name, "ranges": self._ranges}
        write_json(self._folder / f"{os.getpid()}.json", found)
