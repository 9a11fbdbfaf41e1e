"""Local processes that share a folder: their errors, and those of processes that cannot say one."""

import atexit
import os
import signal
import time

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError, TrainingError
from advkd.runtime.files import replacing
from advkd.runtime.folders import locked
from advkd.runtime.workers import run_in_processes

from ..conftest import start


def work(kind, folder):
    if kind == "input":
        raise InputError("the data are missing")
    if kind == "training":
        raise TrainingError("the loss is not finite")
    if kind == "backend":
        raise BackendUnavailableError("no compiler")
    if kind == "disk":
        raise OSError(28, "No space left on device")
    if kind == "memory":
        torch.empty(2**60)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "else":
        raise KeyError(kind)
    if kind == "ends":
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)
    if kind == "waits":
        with replacing(folder / kind):
            time.sleep(600)
    (folder / kind).write_text(f"{torch.get_num_threads()} thread")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "^the data are missing$"),
        ("training", TrainingError, "^the loss is not finite$"),
        ("backend", BackendUnavailableError, "^no compiler$"),
        ("disk", InputError, "No space left on device"),
        ("memory", RuntimeError, "can't allocate memory"),
        ("killed", TrainingError, "^a drawing process was killed; pictures are kept in .*: run the same command again$"),
        ("else", TrainingError, r"^a drawing process failed \(its error is above\); pictures are kept"),
    ],
)
def test_a_processes_error_is_the_callers_at_once(kind, error, message, tmp_path):
    """The other one, which would wait for ever, is ended, and removes its temporary file."""
    with locked(tmp_path), pytest.raises(error, match=message):
        run_in_processes(work, [(kind, tmp_path), ("waits", tmp_path)], tmp_path, "drawing", "pictures are kept")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_signal_at_the_end_of_a_process_prints_nothing(tmp_path, capfd):
    with locked(tmp_path), pytest.raises(TrainingError, match="^a drawing process was killed"):
        run_in_processes(work, [("ends", tmp_path)], tmp_path, "drawing", "pictures are kept")
    assert (tmp_path / "ends").exists() and "Traceback" not in capfd.readouterr().err


def test_all_processes_are_waited_for(tmp_path):
    with locked(tmp_path):
        run_in_processes(work, [("one", tmp_path), ("two", tmp_path)], tmp_path, "drawing", "pictures are kept")
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["1 thread", "1 thread"]


DEAF = """
import signal, sys
from pathlib import Path
from advkd.runtime.folders import locked
from advkd.runtime.workers import run_in_processes
def work(folder, number):
    (folder / number).write_text(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))
if __name__ == "__main__":
    with locked(folder := Path(sys.argv[1])):
        run_in_processes(work, [(folder, "0"), (folder, "1")], folder, "drawing", "pictures are kept")
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_processes_are_deaf_to_interrupts(tmp_path):
    """In a fresh interpreter, where the first process starts the tracker of resources, which unblocks interrupts."""
    (tmp_path / "script.py").write_text(DEAF)
    done = start(tmp_path / "script.py", tmp_path).finish(120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert [(tmp_path / number).read_text() for number in "01"] == ["True", "True"]
