"""Fixtures and helpers that many tests share: a tiny teacher, its trajectories, a tiny student."""

import atexit
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

# Workers of pytest-xdist share the cores instead of each taking all of them, and so do the processes that they start. OpenMP
# and BLAS read the number when they are loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // WORKERS))

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The package keeps its caches apart from the user's here.
os.environ["ADVKD_CACHE"] = tempfile.mkdtemp(prefix="advkd-tests-")
atexit.register(shutil.rmtree, os.environ["ADVKD_CACHE"], ignore_errors=True)

# Results that are compared with float32 arithmetic must not come from TensorFloat-32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

from advkd.data.dataset_info import TrajectoryConfig
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.models.shape import StudentConfig
from advkd.models.student import Student
from advkd.training.trainer import Trainer

from .forked import ROOT, SEEDS, Forked, Fresh

TINY_STUDENT = StudentConfig(image_size=8, image_channels=1, channels=(8, 8, 8, 8), latent_size=2)
CLASSES = ("ant", "bee", "cow")


def tiny_unet(channels=1, seed=0, **options):
    """An 8x8 UNet of a few thousand parameters."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **{"out_channels": channels, **options},
    )


def tiny_teacher(timesteps=1000, channels=1, **scheduler):
    diffusers = pytest.importorskip("diffusers")
    return Teacher(tiny_unet(channels), diffusers.DDPMScheduler(num_train_timesteps=timesteps, **scheduler), "tiny")


def tiny_student(seed=0, **changes):
    torch.manual_seed(seed)
    return Student(replace(TINY_STUDENT, **changes))


def tiny_recording(**changes):
    """Depth 4, ten teacher steps, 24 samples in shards of 8."""
    values = {"num": 24, "depth": 4, "steps": 10, "batch_size": 4, "shard_size": 8, **changes}
    return TrajectoryConfig(**values)


def conditional_student(seed=0, detail_noise=True, **changes):
    """A tiny student of three classes, in eval mode, with batch-norm statistics of its own activations."""
    torch.manual_seed(seed)
    shape = {"image_size": 16, "channels": (8, 8, 8, 8, 4, 4), "latent_size": 1 if detail_noise else 2, **changes}
    student = Student(StudentConfig(detail_noise=detail_noise, classes=CLASSES, class_channels=5, **shape)).train()
    with torch.no_grad():
        for seed in range(3):
            student(student.latents(12, seed), labels=torch.arange(12) % 3)
    return student.eval()


@contextlib.contextmanager
def other_default(value):
    """Run a block under another default dtype of torch or another default device."""
    if isinstance(value, str):
        with torch.device(value):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = [torch.float64, torch.bfloat16, "meta"]
"""Defaults of torch that users set; "meta" stands for any device other than the CPU."""


@pytest.fixture(scope="session")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """The tiny teacher in diffusers' pipeline layout."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("teacher")
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conditional(tmp_path_factory):
    """A tiny teacher of the classes a, b and c with a null class, in diffusers' pipeline layout."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("conditional")
    unet = tiny_unet(num_class_embeds=4)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"], "null": 3}))
    return folder


@pytest.fixture(scope="session")
def trajectories(teacher, tmp_path_factory):
    """Paired (DDIM) trajectories of the tiny teacher."""
    return record_trajectories(teacher, tiny_recording(), tmp_path_factory.mktemp("ddim"), progress=False)


@pytest.fixture(scope="session")
def labelled_paths(conditional, tmp_path_factory):
    """Paired trajectories of the tiny conditional teacher: of its classes c and a in turn, guided."""
    config = tiny_recording(classes="c,a", guidance=1.5)
    teacher = Teacher.from_pretrained(conditional)
    return record_trajectories(teacher, config, tmp_path_factory.mktemp("labelled-paths"), progress=False)


@pytest.fixture(scope="session")
def unpaired(tmp_path_factory):
    """Unpaired (ancestral DDPM) trajectories of a tiny teacher with 20 timesteps."""
    config = tiny_recording(solver="ddpm", steps=0)
    return record_trajectories(tiny_teacher(20), config, tmp_path_factory.mktemp("ddpm"), progress=False)


@pytest.fixture
def forty_gigabytes():
    """Device memory for tensors beyond 2^31 elements; concurrent processes take turns."""
    with open(Path(tempfile.gettempdir()) / "advkd-device-memory", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GB of the device's memory")
        yield
        torch.cuda.empty_cache()


def run_cli(*arguments, environment=None, timeout=300, cwd=None):
    """Run the command line in a fresh process, which imports everything anew."""
    return subprocess.run(
        [sys.executable, "-m", "advkd.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=process_environment(environment),
    )


def start(*arguments, environment=None):
    """Start ``python ARGUMENTS`` as a fresh process."""
    return Fresh(*arguments, environment=process_environment(environment))


def start_cli(*arguments):
    """Start the command line in a fresh process."""
    return start("-m", "advkd.cli", *arguments)


def run_torchrun(*arguments, environment=None):
    """Run the module ``ARGUMENTS`` as two processes under ``torchrun``: the launcher's result."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "--"]
    return start(*launcher, *arguments, environment=environment).finish(240)


TURNS = itertools.cycle(SEEDS)


def fork(*arguments, environment=None):
    """Start ``python ARGUMENTS`` as a child of the two warm processes in turn, or of that with ``PYTHONHASHSEED``."""
    changes = {"PYTHONHASHSEED": next(TURNS), **(environment or {})}
    assert changes.get("OMP_NUM_THREADS", "1") == "1", "a forked child has one thread: start a fresh process"
    return Forked(*arguments, environment=process_environment(changes))


def fork_cli(*arguments, environment=None, timeout=300):
    """Run the command line in a child of a warm process."""
    return fork("-m", "advkd.cli", *arguments, environment=environment).finish(timeout)


GRACE = 10
"""Seconds that the other processes of a group have to end by themselves once one has failed."""


def fork_ranks(*arguments, world=2, environment=None, timeout=240, by=fork):
    """Run ``python ARGUMENTS`` as so many processes of one group, as ``torchrun`` starts them: the results by rank.

    All are killed at the end of the time, or :data:`GRACE` after the first has failed. ``by`` is :func:`fork` or :func:`start`.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {**dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(world)), "GROUP_WORLD_SIZE": "1"}
    group |= {"GROUP_RANK": "0", "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    elastic = {"RUN_ID": "tests", "RESTART_COUNT": "0", "MAX_RESTARTS": "0", "USE_AGENT_STORE": "True"}
    group |= {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
    processes, deadline = [], time.monotonic() + timeout
    try:
        for i in range(world):
            rank = {**dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(i)), "PYTHONHASHSEED": SEEDS[i % len(SEEDS)]}
            processes.append(by(*arguments, environment={**group, **rank, **(environment or {})}))
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if any(codes):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
    return [process.finish(timeout) for process in processes]


def process_environment(changes=None):
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(changes or {})}


@contextlib.contextmanager
def killed_after(updates):
    """Context in which a training ends by Ctrl-C after so many updates."""
    step = Trainer.step

    def killed(trainer):
        if trainer.done == updates:
            raise KeyboardInterrupt
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "kernels":
            item.add_marker("kernels")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
