"""Local processes of one thread each, which on CPUs beat one process of as many threads."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import BackendUnavailableError, InputError, TrainingError
from . import launcher
from .devices import keep_freed_memory, out_of_memory
from .folders import held
from .neighbours import unconfined


def run_in_processes(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], out: Path, what: str, kept: str) -> None:
    """Run ``work(*arguments[r])`` in process r, and wait for all; the first error, or an interrupt, ends them.

    The processes import the caller's script, which must call this under ``if __name__ == "__main__":``.

    Args:
        work: a function of a module.
        arguments: of the processes; they are pickled.
        out: the folder that is written to, which the caller has locked.
        what: word for such a process, in errors.
        kept: words for what is there already when one fails.

    Raises:
        InputError: that of a process, a script without that guard, or one that cannot be imported (standard input).
        TrainingError: that of a process, or one was killed, or failed by an error that it has shown itself.
        RuntimeError: a process has no memory left, or not the backend that was asked for.
    """
    launcher.hold_standard_streams()
    multiprocessing.resource_tracker.ensure_running()  # it unblocks interrupts, and must not among the workers' starts
    context = multiprocessing.get_context("spawn")
    workers, reports = [], []
    for given in arguments:
        # Pipes, since an interrupt that ends the process at once would leave the semaphores of queues and events.
        receiver, sender = context.Pipe(duplex=False)
        workers.append(context.Process(target=_run, args=(work, given, out, os.getpid(), sender), daemon=True))
        reports.append((receiver, sender))
    try:
        with launcher.deaf_to_interrupts(), unconfined():
            for worker in workers:
                worker.start()
        failed = _first_failure(workers)
    finally:  # a caller who handles an interrupt has no workers left
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    said = [message for report in reports for message in _received(*report)]
    for failure in filter(None, said):
        raise failure
    if failed:
        raise _unsaid(failed, bool(said), what, f"{kept} in {out}")


def _first_failure(workers):
    """Exit code of the first process that fails; 0 once all have ended well."""
    running = {worker.sentinel: worker for worker in workers}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            worker = running.pop(sentinel)
            worker.join()
            if worker.exitcode:
                return worker.exitcode
    return 0


def _received(receiver, sender):
    """What came through a pipe whose other process has ended."""
    sender.close()
    with contextlib.closing(receiver), contextlib.suppress(EOFError, OSError):
        while True:
            yield receiver.recv()


def _unsaid(code, started, what, kept):
    """The error for a process that has sent none: no process ever ``started``, it was killed, or it failed."""
    if not started and code > 0:
        return InputError(
            f"the {what} processes could not import the program that starts them: in a script, call this under "
            "if __name__ == '__main__':, and run it from a file, not from standard input"
        )
    how = "was killed" if code < 0 else "failed (its error is above)"
    return TrainingError(f"a {what} process {how}; {kept}: run the same command again")


def _run(work, given, out, parent, report):
    """Do one process' work in a folder that the ``parent`` holds; ``report`` that it started, and a failure."""
    report.send(None)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are removed on the way
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a terminated process leaves behind
    keep_freed_memory()
    try:
        with held(out):
            work(*given)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError):
            error = InputError(str(error))
        if not isinstance(error, (InputError, TrainingError, BackendUnavailableError)) and not out_of_memory(error):
            raise
        report.send(error)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to remove, and the end prints no traceback


def _end_with(parent):
    """End this process when its parent is gone (killed, say): nothing waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
