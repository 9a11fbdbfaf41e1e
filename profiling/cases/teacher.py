"""The teacher: one network evaluation, and a whole DDIM-50 trajectory.

python -m profiling.cases.teacher [--only trajectory] [--out FOLDER]
"""

import copy
import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from advkd import Teacher
from advkd.diffusion.loop import network_of
from advkd.runtime.ranges import named

from .. import peers
from ..harness import Case, Contestant, main

TIMESTEP = 500


class Evaluation(torch.nn.Module):
    """One evaluation of the teacher's network at a fixed timestep."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet.eval().requires_grad_(False)

    def forward(self, x):
        return self.unet(x, TIMESTEP, return_dict=False)[0]


def evaluation(batch):
    """The case of one network evaluation."""
    teacher = Teacher.from_pretrained("digits")
    network = Evaluation(copy.deepcopy(teacher.unet).to(memory_format=torch.contiguous_format))
    x = teacher.noise(batch, seed=1)
    with torch.no_grad():
        wanted = Evaluation(copy.deepcopy(teacher.unet).double())(x.double())
        tolerance = 2 * (network(x).double() - wanted).abs().max().item() + 1e-5
    x_last, t = x.contiguous(memory_format=torch.channels_last), torch.tensor([TIMESTEP])

    def contiguous():
        with torch.no_grad():
            return network(x)

    def ours(compiled):
        run = network_of(teacher.unet, compiled=compiled)
        return lambda: torch.no_grad()(run)(x_last, t)

    contestants = [
        Contestant("advkd, Teacher's network", lambda: ours(False), "ours"),
        Contestant("advkd, Teacher's network, compiled", lambda: ours(True), "ours"),
        Contestant("PyTorch eager", lambda: contiguous, "baseline"),
        Contestant("torch.compile, freezing", lambda: peers.compiled(copy.deepcopy(network), x)),
        Contestant("OpenVINO", lambda: peers.openvino(copy.deepcopy(network), x)),
    ]
    flop, moved = count(network, x)
    return Case(f"evaluation, batch {batch}", lambda: wanted, tolerance, contestants, batch, flop, moved, repeats=15)


@torch.no_grad()
def count(network, x):
    """Floating-point operations of one call, and bytes of weights, input and output."""
    with FlopCounterMode(display=False) as counter:
        output = network(x)
    weights = sum(p.numel() for p in network.parameters())
    return counter.get_total_flops(), 4 * (weights + x.numel() + output.numel())


def ddim_scheduler(own, steps=50):
    """diffusers' DDIM as our teacher samples with it."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(own.scheduler.config, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


def ddim_loop(unet, scheduler, x):
    """The loop that a diffusers user writes."""
    with torch.inference_mode():
        for t in scheduler.timesteps:
            with named("network"):
                output = unet(x, t).sample
            with named("step"):
                x = scheduler.step(output, t, x).prev_sample
    return x.clamp(-1, 1)


def trajectory(batch):
    """The case of whole trajectories: ours against diffusers' own DDIM loop."""
    teacher, compiled = Teacher.from_pretrained("digits"), Teacher.from_pretrained("digits").optimize(compiled=True)
    x_T = teacher.noise(batch, seed=1)
    scheduler, plain = ddim_scheduler(teacher), copy.deepcopy(teacher.unet).to(memory_format=torch.contiguous_format)
    diffusers_loop = functools.partial(ddim_loop, plain, scheduler, x_T)
    # Fifty float32 steps drift: the oracle is diffusers' loop in float64, the bound twice its own float32 drift.
    wanted = ddim_loop(copy.deepcopy(teacher.unet).double(), scheduler, x_T.double())
    tolerance = 2 * (diffusers_loop().double() - wanted).abs().max().item() + 1e-4
    contestants = [
        Contestant("advkd, Teacher.sample", lambda: lambda: teacher.sample(batch, seed=1), "ours"),
        Contestant("advkd, Teacher.sample, compiled", lambda: lambda: compiled.sample(batch, seed=1), "ours"),
        Contestant("diffusers, DDIMScheduler", lambda: diffusers_loop, "baseline"),
    ]
    flop, moved = (50 * figure for figure in count(Evaluation(teacher.unet), x_T))
    return Case(f"DDIM-50 trajectory, batch {batch}", lambda: wanted, tolerance, contestants, batch, flop, moved, repeats=5)


def cases(device):
    """The cases by name, on a CPU alone."""
    found = {
        "evaluation, batch 1": lambda: evaluation(1),
        "evaluation, batch 16": lambda: evaluation(16),
        "DDIM-50 trajectory, batch 16": lambda: trajectory(16),
    }
    return found if device == "cpu" else {}


PARITY_TESTS = ["tests/ops/test_sampler_step.py", "tests/system/test_teacher.py"]

if __name__ == "__main__":
    main(name="bench_teacher", cases=cases, parity_tests=PARITY_TESTS)
