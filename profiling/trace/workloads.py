"""The three workloads that profilers look at, each in plain PyTorch or diffusers and with this project's kernels.

python -m profiling.trace.workloads {student,teacher,update} {baseline,fused} [--device cuda] [--size paper-256] [--repeats 3]

runs one of them between cudaProfilerStart and cudaProfilerStop, for ``nsys`` and ``ncu`` to wrap; with ``--peak`` it prints the
bytes that it takes instead, with ``--trace FILE.json.gz`` torch.profiler records it. A unit of work is one call: images of a
batch of latents, a batch's trajectory, or an update of the critics and one of the student. Both variants begin with the same
weights and random numbers; :func:`gate` compares what they give with float64. Each is as it is used best: without gradients
where none are needed, in channels_last but for diffusers' own loop, whose network stays as it was loaded. That network is
PyTorch's in both variants; so that nobody takes the layout's part of the gain for the loop's and the step's, a variant
``channels_last`` of the baseline stands beside them.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from advkd.data.dataset_info import TrajectoryConfig
from advkd.data.trajectories import Trajectories
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.adv_kd import recipe
from advkd.models.shape import PRESETS
from advkd.models.student import Student
from advkd.runtime.devices import keep_freed_memory
from advkd.runtime.ranges import named
from advkd.training.distillation import Distiller

from ..cases.distillation import blocks
from ..cases.student import plausible_student
from ..cases.teacher import ddim_loop, ddim_scheduler
from ..evidence import ROOT, environment
from ..sweep import forget_peak, memory

VARIANTS = ("baseline", "fused")
UNIT = "unit of work"
"""The range around each call, with its wait for the device."""
MORE_VARIANTS = {"teacher": ("channels_last",)}
"""Baselines beside the baseline, by workload."""
LIMIT = 1800.0
"""Seconds after which a process is taken to hang."""
FAILURES = (InputError, OSError, subprocess.TimeoutExpired)
"""Errors of a process of its own."""
WARMUP = 2
"""Calls before anything is recorded: kernels are compiled, algorithms chosen and graphs captured in them."""


@dataclass(frozen=True)
class Size:
    """Size of a unit of each workload.

    Attributes:
        preset: of the student.
        images: that the student draws.
        trajectories: of a batch of the teacher.
        batch: of the update.
        steps: of the teacher's DDIM.
    """

    preset: str
    images: int
    trajectories: int
    batch: int
    steps: int = 50


SIZES = {"digits": Size("digits", 64, 16, 32), "paper-256": Size("paper-256", 8, 2, 4, steps=20)}


def sizes(device):
    """The sizes that a device is profiled with."""
    return ("digits",) if torch.device(device).type == "cpu" else tuple(SIZES)


TEACHER = dict(
    sample_size=256,
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    attention_head_dim=None,
)
"""``UNet2DModel`` of the published 256x256 DDPMs, ``google/ddpm-celebahq-256`` among them."""


def teacher_of(size, device):
    """The shipped teacher; for 256 pixels one with the shape of ``google/ddpm-celebahq-256`` and random weights."""
    if size.preset == "digits":
        return Teacher.from_pretrained("digits", device)
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    return Teacher(UNet2DModel(**TEACHER).to(device), DDPMScheduler(), "random weights, 256 pixels")


def student_dtype(device):
    """The student's dtype: bfloat16 on a GPU, for both variants."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def student(variant, device, size):
    """Images on the host, from a seed."""
    model, dtype = plausible_student(size.preset).to(device), student_dtype(device)
    if variant == "fused":
        fused = model.fuse(dtype=dtype)
        return lambda: fused.sample(size.images, seed=1, batch_size=size.images)
    model = model.to(dtype, memory_format=torch.channels_last)

    def draw():
        with torch.inference_mode():
            with named("latents"):
                z = model.latents(size.images, seed=1).to(dtype)
            with named("student"):
                images = model(z)
            with named("to host"):
                return images.float().cpu()

    return draw


def student_gate(device, size):
    """Both variants' images against float64, batch by batch of one."""
    exact = copy.deepcopy(plausible_student(size.preset)).double().to(device)
    with torch.no_grad():
        z = exact.latents(size.images, seed=1).double()
        wanted = torch.cat([exact(row) for row in z.split(1)]).cpu()
    errors = {variant: difference(student(variant, device, size)(), wanted) for variant in VARIANTS}
    # As bench_student: 1e-4 of the range; where operands are rounded, four times plain PyTorch's error.
    exactly = student_dtype(device) == torch.float32
    return errors, 1e-4 * float(wanted.max() - wanted.min()) if exactly else 4 * errors["baseline"]


def teacher(variant, device, size):
    """x_0 of one batch of start states. The network is uncompiled in all variants: layout, loop and step differ."""
    own = teacher_of(size, device)
    x_T = own.noise(size.trajectories, seed=1)
    if variant == "fused":
        own.optimize(compiled=False)
        return lambda: own.record(x_T, {}, "ddim", size.steps, 1)[0].clamp_(-1, 1)
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    unet, scheduler = own.unet.to(memory_format=layout), ddim_scheduler(own, size.steps)
    x_T = x_T.contiguous(memory_format=layout)
    return lambda: ddim_loop(unet, scheduler, x_T)


def teacher_gate(device, size):
    """Both variants' x_0 against diffusers' loop in float64: twice its float32 drift, as bench_teacher."""
    own = teacher_of(size, device)
    x_T = own.noise(size.trajectories, seed=1)
    wanted = ddim_loop(own.unet.double(), ddim_scheduler(own, size.steps), x_T.double()).cpu()
    errors = {variant: difference(teacher(variant, device, size)(), wanted) for variant in VARIANTS}
    return errors, 2 * errors["baseline"] + 1e-4


def distiller(variant, device, size, dtype=torch.float32):
    """A run of the joint recipe, a critic on every level, whose every update is a first one."""
    root = tempfile.TemporaryDirectory()
    own = teacher_of(size, device).optimize(compiled=False)
    # The images' contents do not matter here, so that as few steps as levels are enough.
    depth = len(PRESETS[size.preset].channels)
    recording = TrajectoryConfig(num=size.batch, depth=depth, steps=depth, batch_size=size.batch, shard_size=size.batch)
    data = Trajectories(record_trajectories(own, recording, Path(root.name) / "paths", progress=False))
    backend = "autograd" if variant == "baseline" else "auto"
    config = recipe("joint", updates=(2**30,), batch_sizes=(size.batch,), critic_backend=backend)
    torch.manual_seed(0)
    run = Distiller(data, Student(PRESETS[size.preset]), config, Path(root.name) / "run", device=device, dtype=dtype)
    # The folder is there as long as the run is.
    run.root = root
    return run


def update(variant, device, size):
    """An update of the critics and one of the student, as ``advkd distill`` trains; gives the losses."""
    run = distiller(variant, device, size)

    def train():
        with blocks(plain=True) if variant == "baseline" else nullcontext():
            return run.step()

    return train


def update_gradients(variant, device, size, dtype=torch.float32):
    """Gradients of a first update of critic and student as one vector, the student's with the same critic."""
    run, found = distiller(variant, device, size, dtype), []
    # Adam's first step is the gradient's sign, which rounding turns where the gradient is nothing: the critic stays.
    run.move = lambda name, gradients: found.extend(g.detach().double().cpu() for g in gradients)
    with blocks(plain=True) if variant == "baseline" else nullcontext():
        run.step()
    return torch.cat([gradient.flatten() for gradient in found])


def update_gate(device, size):
    """Both variants' gradients against autograd in float64, by its norm; the bound as in bench_gradient_penalty."""
    wanted = update_gradients("baseline", device, size, torch.float64)
    scale = float(wanted.norm())
    found = {variant: update_gradients(variant, device, size) / scale for variant in VARIANTS}
    errors = {variant: difference(vector, wanted / scale) for variant, vector in found.items()}
    return errors, max(1e-5, 2 * errors["baseline"])


def difference(found, wanted):
    """Largest absolute difference; of what is not a number, infinite."""
    error = float((found.double().cpu() - wanted).abs().max())
    return error if error == error else float("inf")


WORKLOADS = {"student": (student, student_gate), "teacher": (teacher, teacher_gate), "update": (update, update_gate)}
"""Name: what prepares a variant's unit of work, and what compares the variants."""


def prepare(name, variant, device="cpu", size="digits", steps=None):
    """The unit of work: a function without arguments.

    Args:
        steps: of the teacher, where a few are enough (a profiler that runs every kernel many times).
    """
    shape = SIZES[size]
    if steps:
        shape = replace(shape, steps=steps)
    return WORKLOADS[name][0](variant, device, shape)


def gate(name, device="cpu", size="digits"):
    """Comparison of both variants' results: ``{"errors": {variant: float}, "tolerance": float, "passed": bool}``."""
    errors, tolerance = WORKLOADS[name][1](device, SIZES[size])
    return {"errors": errors, "tolerance": tolerance, "passed": all(error <= tolerance for error in errors.values())}


def run_units(call, repeats, device="cpu"):
    """So many units of work, each with its wait for the device in a range of its own."""
    for _ in range(repeats):
        with named(UNIT):
            call()
            synchronize(device)


def synchronize(device):
    """Wait for a GPU's work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def run_profiled(call, repeats, device):
    """Warm up, then run where ``nsys --capture-range=cudaProfilerApi`` and ``ncu --profile-from-start off`` look."""
    for _ in range(WARMUP):
        call()
    synchronize(device)
    if torch.device(device).type == "cuda":
        with torch.cuda.profiler.profile():
            run_units(call, repeats, device)
    else:
        run_units(call, repeats, device)


def peak(name, variant, device, size):
    """Bytes of this fresh process: what the set-up keeps, and the peak of two units above that."""
    if torch.device(device).type == "cuda":
        call = prepare(name, variant, device, size)
        torch.cuda.reset_peak_memory_stats(device)
        run_units(call, WARMUP, device)
        return torch.cuda.max_memory_allocated(device)
    before = memory("VmRSS")
    call = prepare(name, variant, device, size)
    # Loading has a peak of its own, which is not the work's.
    forget_peak()
    run_units(call, WARMUP, device)
    return memory("VmHWM") - before


def positive(text):
    """An option's count, at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def command(name, variant, device, size, *more):
    """The command line of one workload in a process of its own."""
    words = [sys.executable, "-m", "profiling.trace.workloads", name, variant]
    return [*words, f"--device={device}", f"--size={size}", *more]


def finished(words, what, limit=LIMIT, **variables):
    """A process that has ended well, with its output; ``variables``: of its environment.

    Raises:
        InputError: it failed, in its own words.
        subprocess.TimeoutExpired: it hangs.
    """
    done = subprocess.run(words, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise InputError(f"{what} ended with {done.returncode}: {last_words(done)}")
    return done


def last_words(done):
    """A profiler's error, else the last line of a process's output."""
    lines = [*done.stdout.strip().splitlines(), *done.stderr.strip().splitlines()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return (errors or lines[-1:] or ["nothing was said"])[0]


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("name", choices=WORKLOADS)
    options.add_argument("variant", choices=VARIANTS)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--size", default="digits", choices=SIZES)
    options.add_argument("--repeats", type=positive, default=3, help="units of work")
    options.add_argument("--steps", type=positive, help="of the teacher, other than the size's")
    options.add_argument("--peak", action="store_true", help="print the bytes that the work takes")
    options.add_argument("--trace", type=Path, help="file for a recording by torch.profiler")
    given = options.parse_args()
    if given.peak:
        print(json.dumps(peak(given.name, given.variant, given.device, given.size)))
        return
    keep_freed_memory()
    call = prepare(given.name, given.variant, given.device, given.size, given.steps)
    if given.trace:
        from .torch_trace import profile

        profile(call, given.repeats, given.device, given.trace)
    else:
        run_profiled(call, given.repeats, given.device)


if __name__ == "__main__":
    main()
