"""Time of an update of the demo's distillation and of its parts, with the hand-written passes and without them.

python -m profiling.cases.distillation [--out FOLDER]

The same updates in one process, in turn: plain PyTorch (autograd's double backward; batch norm, then LeakyReLU in place), each
of the two replacements alone, and both. Amdahl's bound is the gain if the critic's part of plain PyTorch's update took no time.
"""

import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from advkd.cli.demo import TEACHER, demo_recipe, demo_recording
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.models.batch_norm import BatchNorm2d
from advkd.models.shape import PRESETS
from advkd.models.student import Student
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.timing import percentiles
from advkd.training.distillation import Distiller

from ..harness import Sweep, main
from .tables import TABLES

PARITY_TESTS = ["tests/ops/test_norm_act.py", "tests/system/test_critic_update.py"]
NUM, UPDATES, WARMUP = 64, 40, 4
METHODS = {
    "plain PyTorch": ("autograd", True),
    "advkd, critic alone": ("auto", True),
    "advkd, student's blocks alone": ("autograd", False),
    "advkd": ("auto", False),
}
"""Name: what differentiates the critic, and whether the student's blocks are plain."""


def plain_forward(norm, x, slope=1.0, upsample=False):
    """Batch norm and LeakyReLU as plain PyTorch has them best."""
    x = F.leaky_relu(torch.nn.BatchNorm2d.forward(norm, x), slope, inplace=True)
    return F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x


@contextmanager
def blocks(plain):
    """The student's normalisation, plain or as it is."""
    ours = BatchNorm2d.forward
    BatchNorm2d.forward = plain_forward if plain else ours
    try:
        yield
    finally:
        BatchNorm2d.forward = ours


def distiller(data, out, backend):
    torch.manual_seed(0)
    config = demo_recipe(UPDATES)
    config.critic_backend = backend
    student = Student(replace(PRESETS["digits"], classes=data.info.student_classes))
    run = Distiller(data, student, config, out, progress=False)
    run.spent = {}
    _time(run, "update_critics")
    return run


def _time(run, part):
    call = getattr(run.method, part)

    def timed(*args):
        begin = time.perf_counter()
        result = call(*args)
        run.spent[part] = time.perf_counter() - begin
        return result

    setattr(run.method, part, timed)


def measure(data, root):
    """Seconds of an update by method, of the critic in it and of everything else, and the loss of the last update."""
    runs = {name: distiller(data, Path(root) / str(i), backend) for i, (name, (backend, _)) in enumerate(METHODS.items())}
    times, critics, last = {name: [] for name in runs}, {name: [] for name in runs}, {}
    for _ in range(UPDATES):
        for name, run in runs.items():
            begin = time.perf_counter()
            with blocks(METHODS[name][1]):
                last[name] = run.step()
            times[name].append(time.perf_counter() - begin)
            critics[name].append(run.spent["update_critics"])
    return {name: {**_row(times[name][WARMUP:], critics[name][WARMUP:]), "loss": last[name]["loss"]} for name in runs}


def _row(wholes, critics):
    rests = [whole - critic for whole, critic in zip(wholes, critics)]
    return {"seconds": percentiles(wholes), "critic": percentiles(critics), "rest": percentiles(rests)}


def amdahl(rows):
    """Gain of an update in which the critic's part takes no time."""
    plain = rows["plain PyTorch"]
    return plain["seconds"]["median"] / plain["rest"]["median"]


def compared():
    """Rows of every method, and Amdahl's bound."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as root:
        teacher = Teacher.from_pretrained(TEACHER)
        data = Trajectories(record_trajectories(teacher, demo_recording(NUM), Path(root) / "paths"))
        rows = measure(data, root)
    return {"rows": rows, "amdahl_critic": amdahl(rows), "teacher": TEACHER}


if __name__ == "__main__":
    main({"distillation": Sweep("distillation", compared, PARITY_TESTS, [TABLES["distillation"]])})
