"""Room for other processes on the same cores: torch's threads give way while others use the machine.

The barriers of OpenMP spin for threads that do not run. While other processes need the processors, the threads of this one
keep to as many as the others leave, so that a waiting thread makes room for the next, and sleep instead of spinning. The number
of threads stays, and with it every bit of a result. The package's own kernels do the same by themselves
(``csrc/cpu/threads.h``).
"""

import contextlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator

import torch

from ..errors import InputError
from .extension import extension_gap

LOOK_EVERY = 0.1
"""Seconds between two readings of the load."""

MOST_TEAMS = 64
"""Largest number of idle teams: where more are needed, confined threads would still spin, so nothing is done."""

COMPANION = "advkd companion"
"""Name of the threads that the C++ extension binds itself."""

SETTINGS = ("0", "1", "auto", "")


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Share the processors with other processes while torch computes on the CPU; the command line does.

    A thread looks at the load of the processors that this process may use. While others leave less than three quarters of one
    to each of torch's threads, all threads of this process keep to the processors that remain, and GNU's OpenMP runtime (that
    of torch's wheels) sleeps in its barriers. It is undone when the others are gone, and at the end. Threads that something
    else had bound to processors when it began (``OMP_PROC_BIND``) are left alone; child processes inherit the processors of
    the thread that starts them.

    Nothing happens without Linux or the C++ extension, with one thread, with very few threads on a very large machine, on a
    GPU, inside another ``sharing()``, where no thread can be started, and where the environment variable ``ADVKD_SHARE`` is 0;
    where it is 1, the machine counts as busy.

    Yields:
        None, once; also where nothing happens.

    Raises:
        InputError: ``ADVKD_SHARE`` has another value than 0, 1 or auto.

    Examples:
        >>> with sharing():
        ...     images = student.sample(10_000)
    """
    setting = os.environ.get("ADVKD_SHARE", "auto")
    if setting not in SETTINGS:
        raise InputError(f"the environment variable ADVKD_SHARE must be 0, 1 or auto, got {setting!r}")
    usable = hasattr(os, "sched_setaffinity") and setting != "0" and extension_gap("cpu") is None
    lock = _only_one  # a forked child has another
    if not usable or torch.get_num_threads() < 2 or not lock.acquire(blocking=False):
        yield
        return
    try:
        with _Watch():
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def unconfined() -> Iterator[None]:
    """Let the calling thread use all processors meanwhile: child processes inherit those of the thread that starts them."""
    with _Watch.current.exempt(threading.get_native_id()) if _Watch.current else contextlib.nullcontext():
        yield


_only_one = threading.Lock()
"""Held by the one ``sharing()`` of the process that watches."""


class _Watch:
    """Context manager: a thread that confines the process while its processors are crowded."""

    current = None

    def __init__(self):
        self.allowed = self._kept = os.sched_getaffinity(0)
        self._threads = torch.get_num_threads()
        self._teams = _teams_needed(self._threads, len(self.allowed))
        self._foreign = {thread for thread in _thread_ids() if _processors_of(thread) != self.allowed}
        self._lock = threading.Lock()
        self._exempt = Counter()
        self._idle_teams, self._crowded = contextlib.ExitStack(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="advkd neighbours", daemon=True)

    def __enter__(self):
        if self._teams > MOST_TEAMS:
            return
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit on threads: the work goes on without this one
            warnings.warn(f"the processors are not shared with others ({error})", stacklevel=4)
        else:
            _Watch.current = self

    def __exit__(self, *_):
        if _Watch.current is not self:  # it did not start, or this is a forked child
            return
        try:
            self._stop.set()
            self._thread.join()
        finally:
            _Watch.current = None

    @contextlib.contextmanager
    def exempt(self, thread):
        with self._lock:
            self._exempt[thread] += 1
            os.sched_setaffinity(thread, self.allowed)
        try:
            yield
        finally:
            with self._lock:
                self._exempt -= Counter([thread])
                if thread not in self._exempt:
                    os.sched_setaffinity(thread, self._kept)

    def _run(self):
        try:
            while not self._stop.wait(LOOK_EVERY):
                self._look()
        except Exception as error:  # the work goes on without it
            warnings.warn(f"the processors are shared no longer ({error})", stacklevel=1)
        finally:
            self._idle_teams.close()
            try:
                self._keep_to(self.allowed)
            except OSError as error:
                warnings.warn(f"threads stay on the processors {sorted(self._kept)} ({error})", stacklevel=1)

    def _look(self):
        crowded = []
        if not torch.cuda.is_initialized():
            crowded = torch.ops.advkd_cpu.crowded(self._threads, sorted(self.allowed), sorted(self._kept))
        if crowded and not self._crowded:
            for _ in range(self._teams):
                self._idle_teams.enter_context(_idle_team(self._threads))
        elif not crowded:
            self._idle_teams.close()
        self._crowded = bool(crowded)
        self._keep_to(set(crowded) or self.allowed)

    def _keep_to(self, processors):
        """Bind to ``processors`` the threads that are bound as they were before; new threads inherit their creator's."""
        if processors == self._kept == self.allowed:
            return
        with self._lock:
            for thread in _thread_ids():
                ours = (
                    _processors_of(thread) in (self.allowed, self._kept) and thread not in self._foreign | self._exempt.keys()
                )
                if ours and _name(thread) != COMPANION:
                    with contextlib.suppress(OSError):  # it has ended, or processors were taken from the whole process
                        os.sched_setaffinity(thread, processors)
            self._kept = processors


def _thread_ids():
    return list(map(int, os.listdir("/proc/self/task")))


def _processors_of(thread):
    """Processors that a thread is bound to; None if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getaffinity(thread)


def _name(thread):
    with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/comm") as file:
        return file.read().strip()


def _teams_needed(threads, processors):
    """Number of idle teams that make GNU's runtime sleep: it does not spin while it has more threads than processors."""
    return max(1, -(-(processors + 1 - threads) // (threads - 1)))


@contextlib.contextmanager
def _idle_team(threads):
    """A thread with its own OpenMP team, which lives until the end."""
    begun, stop = threading.Event(), threading.Event()

    def hold():
        try:
            # torch gives every thread of a team 32,768 elements at least.
            torch.zeros(threads * 2**15, dtype=torch.uint8, device="cpu").add_(1)
        finally:
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


def _begin_anew():
    """A forked child has the watch's locks and confinement, but not its thread."""
    global _only_one
    _only_one = threading.Lock()
    if _Watch.current:
        os.sched_setaffinity(0, _Watch.current.allowed)
        _Watch.current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
