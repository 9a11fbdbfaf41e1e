"""One step of the teacher's sampler: 64 images of 3x256x256, DDIM from t = 500 to 480.

python -m profiling.bench_sampler_step [--device cuda] [--only noise] [--out FOLDER]

"copy" and "add" move the bytes of the step and compute next to nothing: the floor. A scheduler's step makes new tensors for the
state and for x_0, as its interface says; the op is timed into a tensor that is there.
"""

import functools

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F

from advkd.coefficients import ddim_coefficients
from advkd.ops import philox_normal, sampler_step

from .harness import Case, Contestant, main

SHAPE = (64, 3, 256, 256)
T, FOLLOWING, STEPS, SEED = 500, 480, 50, 3
PARITY_TESTS = ["tests/ops/test_sampler_step.py", "tests/system/test_schedulers.py"]


def schedulers(**options):
    """Ours and diffusers' DDIM, ready to step."""
    from diffusers import DDIMScheduler

    from advkd.schedulers import FusedDDIMScheduler

    pair = [kind(**options) for kind in (FusedDDIMScheduler, DDIMScheduler)]
    for scheduler in pair:
        scheduler.set_timesteps(STEPS)
    return pair


def problem(device, dtype, last=False, eta=0.0):
    """State, network output, a tensor for the result, coefficients."""
    layout = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x, m = (torch.randn(SHAPE, generator=generator).to(device, dtype, memory_format=layout) for _ in range(2))
    alpha_bars = schedulers()[1].alphas_cumprod.double()
    c = ddim_coefficients(float(alpha_bars[T]), float(alpha_bars[FOLLOWING]), "epsilon", eta=eta, clip=1.0)
    return x, m, torch.empty_like(x), c


def oracle(x, m, c, z=None):
    """The step in float64."""
    x, m = x.double(), m.double()
    x_next = c.c_0 * (c.k_x * x + c.k_m * m).clamp(-c.clip, c.clip) + c.c_x * x + c.c_m * m
    return x_next if z is None else x_next + c.c_z * z.double()


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def tolerance(dtype):
    """A few roundings of states below 8; half precision's own last one. diffusers rounds every operation to the dtype."""
    return 1e-5 if dtype == torch.float32 else 8 * 6 * torch.finfo(dtype).eps


def floors(x, m, y):
    return [
        Contestant("torch.add(x, m, out=y)", lambda: lambda: torch.add(x, m, out=y), "floor"),
        Contestant("y.copy_(x)", lambda: lambda: y.copy_(x), "floor"),
    ]


def compiled_step(scheduler, **options):
    """torch.compile of diffusers' step."""

    def step(x, m):
        return scheduler.step(m, T, x, return_dict=False, **options)[0]

    return torch.compile(step, dynamic=False)


def compiled_formula(c, y, pooled=None):
    """torch.compile of the formula with constant coefficients, into tensors that are there: the best that a user can write."""

    def step(x, m, z=None):
        x_next = c.c_0 * (c.k_x * x + c.k_m * m).clamp(-c.clip, c.clip) + c.c_x * x + c.c_m * m
        y.copy_(x_next if z is None else x_next + c.c_z * z)
        return y if pooled is None else pooled.copy_(F.avg_pool2d(x_next, x.shape[-1] // pooled.shape[-1]))

    return torch.compile(step, dynamic=False)


def deterministic(device, dtype=torch.float32, last=False):
    """DDIM with eta = 0."""
    x, m, y, c = problem(device, dtype, last)
    ours, theirs = schedulers()
    without = schedulers()[0].set_step_options(return_x0=False)
    compiled, formula = compiled_step(theirs), compiled_formula(c, y)
    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, out=y)[0], "ours"),
        Contestant("advkd, FusedDDIMScheduler", lambda: lambda: ours.step(m, T, x).prev_sample, "ours"),
        Contestant("advkd, FusedDDIMScheduler without x_0", lambda: lambda: without.step(m, T, x).prev_sample, "ours"),
        Contestant("diffusers, DDIMScheduler", lambda: lambda: theirs.step(m, T, x).prev_sample, "baseline"),
        Contestant("torch.compile of diffusers' step", lambda: lambda: compiled(x, m)),
        Contestant("torch.compile of the formula, into y", lambda: lambda: formula(x, m)),
        *floors(x, m, y),
    ]
    return case("deterministic", x, lambda: oracle(x, m, c), contestants, bytes_of(x, m, y), device, last)


def noisy(device, dtype=torch.float32):
    """DDIM with eta = 1: the noise is made in the call. Every contestant draws its own."""
    x, m, y, c = problem(device, dtype, eta=1.0)
    indices = torch.arange(len(x), device=device)
    ours, theirs = schedulers()
    generator = torch.Generator(device)

    def ours_noise():
        return oracle(x, m, c, philox_normal(SEED, indices, SHAPE[1:], stream="step", step=7))

    def their_noise():
        z = torch.randn(SHAPE, generator=generator.manual_seed(1), device=device, dtype=dtype)
        return oracle(x, m, c, z)

    def global_noise():
        torch.manual_seed(1)
        return oracle(x, m, c, torch.randn(SHAPE, device=device, dtype=dtype))

    def call(scheduler):
        return lambda: scheduler.step(m, T, x, eta=1.0, generator=generator.manual_seed(1)).prev_sample

    def compiled():
        # Compiled code draws numbers of its own. The first call, which is checked, is the same graph with torch's numbers.
        with inductor.patch(fallback_random=True):
            torch.manual_seed(1)
            checked = [compiled_step(theirs, eta=1.0)(x, m)]
        torch._dynamo.reset()
        step = compiled_step(theirs, eta=1.0)
        step(x, m)
        return lambda: checked.pop() if checked else step(x, m)

    def drawn_apart():
        step, z = compiled_formula(c, y), torch.empty_like(x)
        return lambda: step(x, m, torch.randn(SHAPE, generator=generator.manual_seed(1), out=z))

    contestants = [
        Contestant(
            "advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, noise=(SEED, indices, 7), out=y)[0], "ours", ours_noise
        ),
        Contestant("advkd, FusedDDIMScheduler, torch's generator", lambda: call(ours), "ours", their_noise),
        Contestant("diffusers, DDIMScheduler", lambda: call(theirs), "baseline", their_noise),
        Contestant("torch.compile of diffusers' step", compiled, "peer", global_noise),
        Contestant("torch.randn(out=z), torch.compile of the formula, into y", drawn_apart, "peer", their_noise),
        *floors(x, m, y),
    ]
    return case("with noise", x, lambda: oracle(x, m, c), contestants, bytes_of(x, m, y), device)


def pooled(device, r, dtype=torch.float32):
    """The step and the r x r average of its result."""
    x, m, y, c = problem(device, dtype)
    _, theirs = schedulers()
    compiled = compiled_step(theirs)
    pool = torch.compile(lambda x, m: F.avg_pool2d(compiled(x, m), r), dynamic=False)
    average = torch.empty(*SHAPE[:2], SHAPE[2] // r, SHAPE[3] // r, dtype=dtype, device=device)
    formula = compiled_formula(c, y, average)
    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, pool=r, out=(y, average))[2], "ours"),
        Contestant("diffusers and avg_pool2d", lambda: lambda: F.avg_pool2d(theirs.step(m, T, x).prev_sample, r), "baseline"),
        Contestant("torch.compile of both", lambda: lambda: pool(x, m)),
        Contestant("torch.compile of the formula and the average, into tensors", lambda: lambda: formula(x, m)),
        Contestant("advkd, sampler_step without pooling", lambda: lambda: sampler_step(x, m, c, out=y)[0], "floor"),
    ]
    small = x.numel() // r**2 * x.element_size()
    wanted = functools.partial(F.avg_pool2d, kernel_size=r)
    return case(f"pooled by {r}", x, lambda: wanted(oracle(x, m, c)), contestants, bytes_of(x, m, y) + small, device)


def case(name, x, wanted, contestants, moved, device, last=False):
    layout = ", channels_last" if last else ""
    title = f"{name}, {str(x.dtype)[6:]}{layout}"
    return Case(title, wanted, tolerance(x.dtype), contestants, len(x), None, moved, repeats=20, device=device)


def cases(device):
    half = torch.bfloat16
    return {
        "deterministic, float32": lambda: deterministic(device),
        "deterministic, float32, channels_last": lambda: deterministic(device, last=True),
        "deterministic, bfloat16": lambda: deterministic(device, half),
        "with noise, float32": lambda: noisy(device),
        "with noise, bfloat16": lambda: noisy(device, half),
        "pooled by 2, float32": lambda: pooled(device, 2),
        "pooled by 4, float32": lambda: pooled(device, 4),
    }


if __name__ == "__main__":
    main("bench_sampler_step", cases, PARITY_TESTS)
