"""Local processes that share a folder: their errors, and those of processes that cannot say one."""

import os
import signal
import time

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError, TrainingError
from advkd.runtime.files import replacing
from advkd.runtime.folders import locked
from advkd.runtime.workers import run_in_processes


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


def test_all_processes_are_waited_for(tmp_path):
    with locked(tmp_path):
        run_in_processes(work, [("one", tmp_path), ("two", tmp_path)], tmp_path, "drawing", "pictures are kept")
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["1 thread", "1 thread"]
