"""Local processes that share a folder: their errors, and those of processes that cannot say one."""

import os
import signal

import pytest

from advkd.errors import InputError, TrainingError
from advkd.runtime.folders import locked
from advkd.runtime.workers import run_in_processes


def work(kind, path):
    if kind == "input":
        raise InputError("the data are missing")
    if kind == "training":
        raise TrainingError("the loss is not finite")
    if kind == "disk":
        raise OSError(28, "No space left on device")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text(kind)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "^the data are missing$"),
        ("training", TrainingError, "^the loss is not finite$"),
        ("disk", InputError, "No space left on device"),
        ("killed", TrainingError, "^a drawing process was killed; pictures are kept in .*: run the same command again$"),
    ],
)
def test_a_processes_error_is_the_callers_and_the_others_finish(kind, error, message, tmp_path):
    with locked(tmp_path), pytest.raises(error, match=message):
        run_in_processes(work, [(kind, tmp_path / "a"), ("done", tmp_path / "b")], tmp_path, "drawing", "pictures are kept")
    assert not (tmp_path / "a").exists() and (tmp_path / "b").read_text() == "done"
