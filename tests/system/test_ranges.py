"""Stages named for profilers: the names of each workload, and no effect when disabled."""

import json
import subprocess
import sys
import threading

import pytest
import torch

from advkd.diffusion.recorder import record_in_processes
from advkd.errors import InputError
from advkd.methods.adv_kd import recipe
from advkd.runtime import ranges
from advkd.runtime.ranges import name_ranges, named
from advkd.training.distillation import distill

from ..conftest import process_environment, tiny_recording, tiny_student

STAGES = ("data", "student forward", "critic update", "student update", "average")


@pytest.fixture
def names(monkeypatch):
    """The names of opened ranges, in order."""
    found = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            found.append(self.name)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(ranges, "_open", Range)
    return found


def test_off_by_default_and_free():
    assert ranges._open is None and named("a") is named("b")
    with named("a"), named("b"):
        pass


def test_sampling(names):
    tiny_student().fuse().sample(3, batch_size=2)
    assert names == ["latents", "student", "to host"] * 2


def test_the_teachers_trajectory(names, teacher):
    teacher.record(teacher.noise(2, 0, 0), {}, "ddim", 5, 0, 0)
    assert names == ["network", "step"] * 5


def test_distillation(names, trajectories, tmp_path):
    small = {"batch_sizes": (8,), "critic_channels": 4, "critic_max_channels": 8, "critic_updates": 2, "ema": 0.0}
    distill(trajectories, tiny_student(), recipe("joint", updates=(1,), **small), tmp_path, progress=False)
    critics = ["data", "student forward", "critic update"] * 2
    assert [name for name in names if name in STAGES] == [*critics, "student update", "average"]


def test_profilers_see_the_names():
    name_ranges("torch")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, named("stage"):
            torch.ones(3) + 1
    finally:
        name_ranges("")
    assert "advkd: stage" in {event.key for event in profile.key_averages()}
    assert ranges._open is None


def test_nvtx_without_a_profiler_attached():
    nvtx = pytest.importorskip("nvtx")
    name_ranges("nvtx")
    try:
        stage = named("stage")
        assert isinstance(stage, nvtx.annotate) and stage is not named("stage")
        with stage, named("inside"):
            pass
    finally:
        name_ranges("")


def test_the_environment_switches_them_on():
    code = "import advkd.runtime.ranges as r; print(r._open is not None)"
    for value, wanted in (("torch", "True"), ("", "False")):
        environment = process_environment({"ADVKD_RANGES": value})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == wanted
    with pytest.raises(InputError, match="ADVKD_RANGES must be one of"):
        name_ranges("perfetto")


def clocks(folder):
    """The clocks that each process wrote."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.fixture
def ticking(tmp_path, monkeypatch):
    """A clock that advances by one with every reading; yields its folder."""
    times = iter(range(1000))
    monkeypatch.setattr(ranges, "perf_counter", lambda: next(times))
    name_ranges(f"clock:{tmp_path / 'clocks'}")
    yield tmp_path / "clocks"
    name_ranges("")


def test_a_clock_sums_own_seconds_by_path(ticking):
    with named("whole"):
        for _ in range(2):
            with named("part"), named("inner"):
                pass
        with pytest.raises(ValueError), named("failing"):
            raise ValueError
    with named("part"):
        pass
    assert clocks(ticking) == []
    name_ranges("")
    (found,) = clocks(ticking)
    spent = {path: (figures["seconds"], figures["calls"]) for path, figures in found["ranges"].items()}
    assert spent.pop("part") == (1, 1)
    assert spent == {"whole": (4, 1), "whole / part": (4, 2), "whole / part / inner": (2, 2), "whole / failing": (1, 1)}
    # Twelve readings are eleven steps: own times leave nothing out and count nothing twice.
    assert found["process"] == "MainProcess" and sum(seconds for seconds, _ in spent.values()) == 11
    assert ranges._open is None


def test_a_clock_leaves_other_threads_out(ticking):
    def work():
        with named("elsewhere"):
            pass

    with named("here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    name_ranges("")
    assert [list(found["ranges"]) for found in clocks(ticking)] == [["here"]]


def test_recording_processes_write_their_clocks(teacher_folder, tmp_path, monkeypatch):
    """In fresh interpreters, which read the variable while they start."""
    monkeypatch.setenv("ADVKD_RANGES", f"clock:{tmp_path / 'clocks'}")
    record_in_processes(teacher_folder, tiny_recording(num=16), tmp_path / "paths", 2, progress=False)
    found = clocks(tmp_path / "clocks")
    assert len({each["process"] for each in found}) == 2 and "MainProcess" not in {each["process"] for each in found}
    for each in found:
        # A shard of two batches of ten steps.
        calls = {path: figures["calls"] for path, figures in each["ranges"].items()}
        assert calls["trajectories / network"] == calls["trajectories / step"] == 20
        assert calls["trajectories / load"] == 1 and calls["trajectories / noise"] == 2 and "trajectories / write" in calls


def test_a_clock_needs_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for bad, said in (("clock", "ADVKD_RANGES=clock:FOLDER"), ("clock:", "needs a folder"), ("torch:there", "must be one of")):
        with pytest.raises(InputError, match=said):
            name_ranges(bad)
    with pytest.raises(InputError, match="ADVKD_RANGES.* is a file"):
        name_ranges(f"clock:{tmp_path / 'file'}")
    assert ranges._open is None
