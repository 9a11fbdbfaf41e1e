"""Other processes on the same cores: what torch's threads do while others use the machine.

The barriers of OpenMP spin for threads that do not run. While others take more than this process' threads leave, its threads
keep to as many processors as the others leave, so that one that waits makes room for the next, and sleep where they would spin.
The number of threads, and with it every bit of a result, stays. Our own kernels do the like by themselves
(``csrc/cpu/threads.h``).
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from .ops.backends import extension_gap

LOOK_EVERY = 0.1
"""Seconds between two looks at the load."""

COMPANION = "advkd companion"
"""Name of the threads that the C++ extension binds by itself."""


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Share the processors with other processes while torch computes on the CPU; the command line does.

    A thread looks at the load of the processors that this process may use. While others take more than torch's threads leave,
    all threads of this process keep to the processors that remain, and GNU's OpenMP runtime (that of torch's wheels) sleeps in
    its barriers. It is undone when the others are gone, and at the end. Threads that something else bound to processors
    (``OMP_PROC_BIND``) are left alone; child processes inherit the processors of the thread that starts them.

    Nothing happens without Linux or the C++ extension, with one thread, on a GPU, inside another ``sharing()``, and where the
    environment variable ``ADVKD_SHARE`` is 0.
    """
    usable = hasattr(os, "sched_setaffinity") and os.environ.get("ADVKD_SHARE") != "0" and extension_gap("cpu") is None
    if not usable or not _watching.acquire(blocking=False):
        yield
        return
    try:
        with _Watch():
            yield
    finally:
        _watching.release()


@contextlib.contextmanager
def unconfined() -> Iterator[None]:
    """Let the calling thread use all processors meanwhile: child processes inherit those of the thread that starts them."""
    if not _watching.locked():
        yield
        return
    with _looking:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, _Watch.allowed)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


_looking = threading.Lock()
_watching = threading.Lock()


class _Watch:
    """Context manager: a thread that confines the process while its processors are crowded."""

    allowed = frozenset()

    def __enter__(self):
        _Watch.allowed = self._kept = os.sched_getaffinity(0)
        self._sleepers = contextlib.ExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="advkd neighbours", daemon=True)
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(LOOK_EVERY):
            crowded = [] if torch.cuda.is_initialized() else torch.ops.advkd_cpu.crowded()
            with _looking:
                self._keep_to(set(crowded) or self.allowed)
        self._keep_to(self.allowed)

    def _keep_to(self, processors):
        if processors == self.allowed:
            self._sleepers.close()
        elif self._kept == self.allowed:
            for _ in range(_teams(torch.get_num_threads(), len(self.allowed))):
                self._sleepers.enter_context(_idle_team())
        if processors != self.allowed or self._kept != self.allowed:
            _bind(processors, (self.allowed, self._kept))
        self._kept = processors


def _bind(processors, before):
    """Bind to ``processors`` the threads that are bound as one of ``before``; new threads inherit their creator's."""
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):  # it has ended
            if os.sched_getaffinity(thread) in before and _name(thread) != COMPANION:
                os.sched_setaffinity(thread, processors)


def _name(thread):
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read().strip()


def _teams(threads, processors):
    """Idle teams that make GNU's runtime sleep: it does not spin while it manages more threads than there are processors."""
    return 0 if threads < 2 else max(1, -(-(processors + 1 - threads) // (threads - 1)))


@contextlib.contextmanager
def _idle_team():
    """A thread that has an OpenMP team of its own, which is there until the end."""
    begun, stop = threading.Event(), threading.Event()

    def hold():
        torch.zeros(2**20, dtype=torch.float32, device="cpu").add_(1)
        begun.set()
        stop.wait()

    thread = threading.Thread(target=hold, name="advkd idle team", daemon=True)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
