"""Processes, devices and streams as a launcher, a job's template or a daemon leaves them."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from advkd import FusedStudent, Student
from advkd.cli.demo import run_demo
from advkd.cli.sample import sample
from advkd.cli.warmup import warmup
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError, TrainingError
from advkd.evaluation import evaluate
from advkd.methods.denoising import TeacherTrainingConfig
from advkd.runtime import launcher
from advkd.runtime.devices import plain_defaults, require_device
from advkd.runtime.progress import can_be_shown, progress_bar
from advkd.training.teacher import train_teacher

from ..conftest import fork, fork_cli, other_default, process_environment, start, tiny_recording, tiny_teacher


def set_variables(monkeypatch, **values):
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": " ", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({"WORLD_SIZE": "2"}, (0, 2)),
    ],
)
def test_variables_that_are_empty_count_as_unset(monkeypatch, values, expected):
    set_variables(monkeypatch, **values)
    assert launcher.processes() == expected


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK must be in"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be in"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK must be in"),
    ],
)
def test_variables_that_cannot_be_are_named(monkeypatch, tmp_path, teacher, values, word):
    set_variables(monkeypatch, **values)
    for work in (
        lambda: sample("digits", 2, 0, tmp_path / "a.png"),
        lambda: record_trajectories(teacher, tiny_recording(), tmp_path / "t", progress=False),
    ):
        with pytest.raises(InputError, match=word):
            work()
    assert not list(tmp_path.iterdir())


def test_a_processs_own_device(monkeypatch):
    set_variables(monkeypatch, LOCAL_RANK="3")
    assert launcher.local_device("cuda") == "cuda:3" and launcher.local_device("cpu") == "cpu"
    assert launcher.local_device("cuda:1") == "cuda:1"
    set_variables(monkeypatch, LOCAL_RANK="")
    assert launcher.local_device("cuda") == "cuda"
    set_variables(monkeypatch, LOCAL_RANK="one")
    with pytest.raises(InputError, match="LOCAL_RANK"):
        launcher.local_device("cuda")


def test_every_command_runs_with_empty_variables(tmp_path, teacher_folder):
    """The variables of every launcher that a library reads are empty, and a local rank is left over."""
    empty = {**dict.fromkeys(launcher.ACCELERATE_READS, ""), "LOCAL_RANK": "0"}
    record = ["trajectories", "--teacher", teacher_folder, "--num", 16, "--depth", 4, "--steps", 2, "--batch-size", 4]
    done = fork_cli(*record, "--shard-size", 8, "--out", tmp_path / "t", environment=empty)
    assert done.returncode == 0, done.stderr
    (tmp_path / "student.json").write_text('{"image_size": 8, "image_channels": 1, "channels": [8, 8, 8, 8], "latent_size": 2}')
    train = [
        "distill",
        "--trajectories",
        tmp_path / "t",
        "--preset",
        tmp_path / "student.json",
        "--updates",
        2,
        "--batch-sizes",
        4,
    ]
    done = fork_cli(*train, "--critic-channels", 8, "--out", tmp_path / "s", environment=empty)
    assert done.returncode == 0, done.stderr
    done = fork_cli("sample", "--student", tmp_path / "s", "-n", 2, "--out", tmp_path / "images", environment=empty)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("name", ["meta", "meta:1", "gpu", "", "0", "cuda:", "cuda:99", "xpu", "mps", "vulkan", "hpu", "\0"])
def test_devices_that_are_not_there(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(InputError, match="--device .* is not available") as refused:
        require_device(name)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_the_library_refuses_them_too(tmp_path):
    config = evaluate.EvaluationConfig(num=256)
    for work in (
        lambda: Student.from_pretrained("digits", "meta"),
        lambda: FusedStudent.from_pretrained(tmp_path, "meta"),
        lambda: Teacher.from_pretrained("digits", "meta"),
        lambda: evaluate.evaluate_student("digits", "digits", config, tmp_path, device="meta"),
        lambda: evaluate.evaluate_folders("digits", "digits", config, device="meta"),
        lambda: next(warmup("digits", "meta")),
        lambda: run_demo(tmp_path, device="meta"),
        lambda: train_teacher(TeacherTrainingConfig(device="meta"), tmp_path),
    ):
        with pytest.raises(InputError, match="'meta' is not available .it holds no values"):
            work()
    assert not list(tmp_path.iterdir())


def test_the_cpu_is_one_device():
    assert require_device("cpu") == require_device("cpu:1") == require_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--out", "x.png"],
        ["trajectories", "--out", "x"],
        ["teacher", "train", "--out", "x"],
        ["distill", "--trajectories", "x", "--preset", "digits", "--out", "y"],
        ["evaluate", "--out", "x"],
        ["report", "--evaluation", "x", "--out", "y"],
        ["warmup"],
        ["demo", "--out", "x"],
    ],
)
def test_every_command_refuses_a_device_that_holds_nothing(command, tmp_path, monkeypatch, capsys):
    from advkd.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--device", "meta"], standalone_mode=True)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("advkd: --device 'meta' is not available") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_defaults_are_plain_within_and_restored():
    with other_default(torch.float64), torch.device("meta"):
        with plain_defaults():
            inside = torch.zeros(1)
        outside = torch.zeros(1)
    assert (inside.dtype, inside.device.type) == (torch.float32, "cpu")
    assert (outside.dtype, outside.device.type) == (torch.float64, "meta")


class Broken:
    """A standard error whose reader has gone, at once or after some words."""

    def __init__(self, error, words=0):
        self.error, self.words = error, words

    def write(self, text):
        self.words -= 1
        if self.words < 0:
            raise self.error

    flush = isatty = lambda self: self.write("")


@pytest.mark.parametrize("words", [0, 3])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "gone"), ValueError("I/O operation on closed file")])
def test_a_bar_whose_stream_breaks_ends_nothing(error, words, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(error, words))
    assert list(progress_bar(range(100), mininterval=0)) == list(range(100))
    assert can_be_shown() is False


def test_a_closed_stream_is_none(monkeypatch, tmp_path):
    stream = open(tmp_path / "stream", "w")
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    sample("digits", 2, 0, tmp_path / "images")
    assert (tmp_path / "images" / "000001.png").exists()


def test_output_that_nobody_reads_is_no_error():
    command = [sys.executable, "-m", "advkd", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def fresh_without_streams(*arguments):
    """The exit code of a fresh command line without standard output and standard error."""
    return subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "advkd", *map(str, arguments)],
        env=process_environment(),
        timeout=300,
    ).returncode


WITHOUT_STREAMS = """
import os, runpy, sys
os.close(1)
os.close(2)
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
runpy.run_module("advkd", run_name="__main__", alter_sys=True)
"""


def closed_streams(*arguments):
    """The same of a forked one, whose streams are as those of an interpreter that starts without."""
    return fork("-c", WITHOUT_STREAMS, *arguments).wait(300)


def test_every_command_runs_without_standard_streams(tmp_path, teacher_folder):
    record = ["trajectories", "--teacher", teacher_folder, "--num", 16, "--depth", 4, "--steps", 2, "--batch-size", 4]
    for folder, processes in (("one", 1), ("two", 2)):
        assert closed_streams(*record, "--shard-size", 8, "--processes", processes, "--out", tmp_path / folder) == 0
        assert len(Trajectories(tmp_path / folder)) == 16
    (tmp_path / "student.json").write_text('{"image_size": 8, "image_channels": 1, "channels": [8, 8, 8, 8], "latent_size": 2}')
    train = ["distill", "--trajectories", tmp_path / "one", "--preset", tmp_path / "student.json", "--updates", 2]
    assert closed_streams(*train, "--batch-sizes", 4, "--critic-channels", 8, "--out", tmp_path / "s") == 0
    assert closed_streams("sample", "--student", tmp_path / "s", "-n", 2, "--out", tmp_path / "images") == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    small = ["train", "--size", 8, "--steps", 1, "--out"]
    assert fresh_without_streams("classifier", *small, tmp_path / "classifier") == 0
    assert closed_streams("teacher", *small, tmp_path / "teacher", "--channels", 8) == 0
    # A mistake is still an exit code.
    assert closed_streams("sample", "-n", 0, "--out", tmp_path / "x.png") == 2


def test_a_teacher_in_several_files_loads_without_standard_error(tmp_path, monkeypatch):
    from diffusers.utils import logging

    teacher = tiny_teacher()
    teacher.unet.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    teacher.scheduler.save_pretrained(tmp_path / "scheduler")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    monkeypatch.setattr(sys, "stderr", None)
    try:
        again = Teacher.from_pretrained(tmp_path)
    finally:
        monkeypatch.undo()
        logging.enable_progress_bar()
    assert again.identity()["weights_sha256"] == teacher.identity()["weights_sha256"]


SCRIPT = """
import sys
from advkd.data.dataset_info import TrajectoryConfig
from advkd.diffusion.recorder import record_in_processes
{guard}
    record_in_processes(sys.argv[1], TrajectoryConfig(steps=2, num=4, depth=4, batch_size=2, shard_size=2), sys.argv[2], 2)
"""


def test_a_script_that_records_needs_a_guard_and_a_file(tmp_path, teacher_folder):
    """The script that has both runs in fresh interpreters."""
    good, unguarded = tmp_path / "good.py", tmp_path / "unguarded.py"
    good.write_text(SCRIPT.format(guard="if __name__ == '__main__':"))
    unguarded.write_text(SCRIPT.format(guard="if True:"))
    from_standard_input = "__file__ = '<stdin>'" + good.read_text()
    for script in ((unguarded,), ("-c", from_standard_input)):
        done = fork(*script, teacher_folder, tmp_path / "out").finish(200)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        assert done.returncode == 1 and "InputError" in last and "__main__" in last and "from a file" in last, done.stderr
    done = start(good, teacher_folder, tmp_path / "out").finish(200)
    assert done.returncode == 0 and len(Trajectories(tmp_path / "out")) == 4, done.stderr


@pytest.mark.kernels
def test_a_script_from_standard_input_does_not_record(tmp_path, teacher_folder):
    """In fresh interpreters."""
    command = [sys.executable, "-", str(teacher_folder), str(tmp_path / "out")]
    text = SCRIPT.format(guard="if __name__ == '__main__':")
    done = subprocess.run(command, input=text, env=process_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "from a file, not from standard input" in done.stderr


def test_a_recording_process_that_is_killed_is_not_called_unguarded():
    from advkd.runtime import workers

    for code, started, words in (
        (-9, True, "a recording process was killed; the finished shards are kept"),
        (-9, False, "was killed"),
        (1, True, "failed"),
    ):
        error = workers._unsaid(code, started, "recording", "the finished shards are kept")
        assert isinstance(error, TrainingError) and words in str(error)


def test_the_package_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "advkd", "--help"], capture_output=True, text=True, env=process_environment())
    assert done.returncode == 0 and done.stdout.startswith("Usage: advkd [OPTIONS] COMMAND") and os.linesep in done.stdout


AT_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["advkd", "advkd.cli"])
def test_an_interrupt_while_modules_are_imported_is_one_line(module):
    command = [sys.executable, "-c", AT_IMPORT, module, "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment(), timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"\nadvkd: {launcher.INTERRUPTED}\n")


@pytest.mark.parametrize("fails", [False, True])
def test_a_handler_that_python_did_not_install_stays(fails, monkeypatch):
    def install(number, handler):
        raise TypeError(f"{handler} was to be installed")

    if not fails:
        monkeypatch.setattr(launcher.signal, "getsignal", lambda number: None)
    try:
        with launcher.deaf_to_interrupts():
            monkeypatch.setattr(launcher.signal, "signal", install)
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    except TypeError:
        assert fails
    finally:
        monkeypatch.undo()
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not blocked


def test_an_interrupt_while_children_start_comes_afterwards():
    child = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('deaf')"]
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with launcher.deaf_to_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            said = subprocess.check_output(child, text=True)
            reached = True
    assert reached and said == "deaf\n" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
