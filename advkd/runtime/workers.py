"""Local processes of one thread each, which on CPUs beat one process of as many threads."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import InputError, TrainingError
from . import launcher
from .devices import keep_freed_memory
from .folders import held
from .neighbours import unconfined


def run_in_processes(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], out: Path, what: str, kept: str) -> None:
    """Run ``work(*arguments[r])`` in process r, and wait for all; at an error or an interrupt none is left.

    The processes import the caller's script, which must call this under ``if __name__ == "__main__":``.

    Args:
        work: a function of a module.
        arguments: of the processes; they are pickled.
        out: the folder that is written to, which the caller has locked.
        what: word for such a process, in errors.
        kept: words for what is there already when one fails.

    Raises:
        InputError: that of a process, a script without that guard, or one that cannot be imported (standard input).
        TrainingError: that of a process, or one failed or was killed.
    """
    launcher.hold_standard_streams()
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
        for worker in workers:
            worker.join()
    finally:  # a caller who handles an interrupt has no workers left
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    said = [message for report in reports for message in _received(*report)]
    for failure in filter(None, said):
        raise failure
    _require_success(workers, bool(said), what, f"{kept} in {out}")


def _received(receiver, sender):
    """What came through a pipe whose other process has ended."""
    sender.close()
    with contextlib.closing(receiver), contextlib.suppress(EOFError, OSError):
        while True:
            yield receiver.recv()


def _require_success(workers, started, what, kept):
    """Say why processes ended early: never ``started``, by an error of their own, or killed."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return
    if not started and min(codes) > 0:
        raise InputError(
            f"the {what} processes could not import the program that starts them: in a script, call this under "
            "if __name__ == '__main__':, and run it from a file, not from standard input"
        )
    how = "was killed" if min(codes) < 0 else "failed (its error is above)"
    raise TrainingError(f"a {what} process {how}; {kept}: run the same command again")


def _run(work, given, out, parent, report):
    """Do one process' work in a folder that the ``parent`` holds; ``report`` that it started, and a failure."""
    report.send(None)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a terminated process leaves behind
    keep_freed_memory()
    try:
        with held(out):
            work(*given)
    except (InputError, TrainingError) as error:
        report.send(error)
    except OSError as error:
        report.send(InputError(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(parent):
    """End this process when its parent is gone (killed, say): nothing waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
