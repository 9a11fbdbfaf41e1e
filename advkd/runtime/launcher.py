"""The start and end of a process: variables of ``torchrun`` and its like, standard streams, interrupts."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ACCELERATE_READS = (
    *VARIABLES,
    "LOCAL_WORLD_SIZE",
    *(
        f"{mpi}_{name}"
        for mpi in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
        for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Variables of other launchers from which accelerate reads numbers."""

TEMPORARY: set[Path] = set()
"""Paths of the temporary files that this process is writing; an interrupt removes them."""

INTERRUPTED = "interrupted; run the same command again (with --resume where it has one) to go on"


def processes() -> tuple[int, int]:
    """``(rank, world size)`` of this process; (0, 1) without a launcher.

    Raises:
        InputError: a variable that is not a number, or a rank outside the world. One that is set but empty counts as unset.
    """
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise InputError(f"RANK must be in [0, WORLD_SIZE), got {rank} of {world}: unset both for a single process")
    return rank, world


def local_device(name: str) -> str:
    """The device ``name``; under a launcher ``cuda`` is the process's own GPU."""
    rank = _number("LOCAL_RANK", None)
    return name if rank is None or str(name) != "cuda" else f"cuda:{rank}"


@contextlib.contextmanager
def without_empty_variables() -> Iterator[None]:
    """Remove variables that are set but empty from the environment meanwhile: libraries would read a number from them.

    A LOCAL_RANK beside an empty RANK, which no launcher sets, is removed with them.
    """
    empty = {name: os.environ.pop(name) for name in ACCELERATE_READS if os.environ.get(name, "?").strip() == ""}
    if "RANK" in empty and "LOCAL_RANK" in os.environ:
        empty["LOCAL_RANK"] = os.environ.pop("LOCAL_RANK")
    try:
        yield
    finally:
        os.environ.update(empty)


def hold_standard_streams() -> None:
    """Open the null device in the place of closed standard streams.

    Otherwise the next files or pipes to be opened would get their numbers: libraries would write messages there, and child
    processes would take them for streams.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened <= 2:
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)


def end_at_interrupt() -> None:
    """End the process at Ctrl-C with one line and exit code 130, at any point of its work.

    A KeyboardInterrupt could come in the middle of imports and destructors, which print a traceback or lose it. Files are whole
    at any moment, and the next run removes temporary ones. Ignored interrupts (``nohup``) stay ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Make child processes started within ignore Ctrl-C, which a terminal sends to all.

    Those that watch their parent end when it has ended; others go on. An interrupt that comes meanwhile reaches this
    process at the end; where another program installed the handler, another thread may take it before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came, handler = [], signal.getsignal(signal.SIGINT)
    if handler is not None:
        signal.signal(signal.SIGINT, lambda *_: came.append(True))
    # Inherited, unlike handlers. Another thread may take the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        try:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)


def writer_of(path: Path) -> int | None:
    """The process that a temporary file belongs to, by its name (older names have no thread); None for other names."""
    process = path.name.split(".")[-2].partition("-")[0]
    return int(process) if process.isdecimal() else None


def _end(number, frame):
    # No import, and no lock: the interrupted thread may hold it.
    with contextlib.suppress(Exception):
        children = sys.modules["multiprocessing.process"].active_children()
        for child in children:
            child.terminate()
        for child in children:
            child.join(1)
    for path in list(TEMPORARY):
        if writer_of(path) == os.getpid():  # not those of the process that this one was forked from
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        os.write(2, f"\nadvkd: {INTERRUPTED}\n".encode())
    os._exit(128 + number)


def _number(name, default):
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise InputError(f"the environment variable {name} must be a whole number, got {text!r}: correct or unset it") from None
