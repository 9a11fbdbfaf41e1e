"""Stages named for profilers: what each workload names, and that nothing happens when they are off."""

import subprocess
import sys

import pytest
import torch

from advkd import ranges
from advkd.distill import distill
from advkd.errors import InputError
from advkd.ranges import name_ranges, named
from advkd.recipes import recipe

from ..conftest import process_environment, tiny_student

STAGES = ("data", "student forward", "critic update", "student update", "average")


@pytest.fixture
def names(monkeypatch):
    """What is opened, in order."""
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
    code = "import advkd.ranges as r; print(r._open is not None)"
    for value, wanted in (("torch", "True"), ("", "False")):
        environment = process_environment({"ADVKD_RANGES": value})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == wanted
    with pytest.raises(InputError, match="ADVKD_RANGES must be one of"):
        name_ranges("perfetto")
