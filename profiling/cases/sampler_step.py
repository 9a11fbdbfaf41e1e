"""One step of the teacher's sampler: 64 images of 3x256x256, DDIM from t = 500 to 480.

python -m profiling.cases.sampler_step [--device cuda] [--only noise] [--out FOLDER]      # scaling: --only scaling

"copy" and "add" move the bytes of the step and compute next to nothing: the floor. A scheduler's step makes new tensors for the
state and for x_0, as its interface says; the op is timed into a tensor that is there. On a GPU calls, the same work as captured
graphs, and both forms of the floor stand side by side; without diffusers its contestants and our schedulers are missing.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

from advkd.diffusion.coefficients import ddim_coefficients
from advkd.ops import StepCoefficients, philox_normal, sampler_step
from advkd.runtime.timing import measure

from .. import harness
from ..harness import CAPTURED, Case, Contestant, Sweep, main, with_captured
from ..sweep import curves, growth, medians, panels

SHAPE = (64, 3, 256, 256)
T, FOLLOWING, STEPS, SEED = 500, 480, 50, 3
PARITY_TESTS = ["tests/ops/test_sampler_step.py", "tests/system/test_schedulers.py"]
DIFFUSERS, COMPILED = "diffusers, DDIMScheduler", "torch.compile of diffusers' step"
APART = "torch.randn(out=z), torch.compile of the formula, into y"
INSIDE = "torch.compile of the formula and its noise, into y"


def alpha_bars():
    """alpha_bar of every timestep by DDPM's linear betas (Ho et al. 2020), in float32 as diffusers' schedulers have it."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def published():
    """diffusers' DDIM, ready to step."""
    from diffusers import DDIMScheduler

    return _ready(DDIMScheduler())


def fused():
    """Ours in its place."""
    from advkd.diffusion.schedulers import FusedDDIMScheduler

    return _ready(FusedDDIMScheduler())


def _ready(scheduler):
    scheduler.set_timesteps(STEPS)
    return scheduler


def problem(device, dtype, last=False, eta=0.0):
    """State, network output, a tensor for the result, coefficients."""
    # Past a number of compilations torch.compile runs a function as it is, without failing.
    torch._dynamo.reset()
    layout = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    x, m = (torch.randn(SHAPE, generator=generator, device=device).to(dtype, memory_format=layout) for _ in range(2))
    a_t, a_s = (float(alpha_bars()[t]) for t in (T, FOLLOWING))
    return x, m, torch.empty_like(x), ddim_coefficients(a_t, a_s, "epsilon", eta=eta, clip=1.0)


def formula(x, m, c):
    """The step without its noise."""
    return c.c_0 * (c.k_x * x + c.k_m * m).clamp(-c.clip, c.clip) + c.c_x * x + c.c_m * m


def oracle(x, m, c, z=None):
    """The step in float64."""
    x_next = formula(x.double(), m.double(), c)
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


def stepping(scheduler, x, m, **options):
    """A scheduler's step as its user calls it."""
    return lambda: scheduler.step(m, T, x, **options).prev_sample


def compiled_step(scheduler, compiler=None, **options):
    """torch.compile of a scheduler's step; ``compiler``: Inductor's options."""

    def step(x, m):
        return scheduler.step(m, T, x, return_dict=False, **options)[0]

    return torch.compile(step, dynamic=False, options=compiler)


def compiled_formula(c, y, pooled=None):
    """torch.compile of the formula with constant coefficients, into tensors that are there: the best that a user can write."""

    def step(x, m, z=None):
        x_next = formula(x, m, c)
        y.copy_(x_next if z is None else x_next + c.c_z * z)
        return y if pooled is None else pooled.copy_(F.avg_pool2d(x_next, x.shape[-1] // pooled.shape[-1]))

    return torch.compile(step, dynamic=False)


def compiled_formula_and_noise(c, y, compiler=None):
    """The same with numbers that the compiled code draws."""

    def step(x, m):
        return y.copy_(formula(x, m, c) + c.c_z * torch.randn_like(x))

    return torch.compile(step, dynamic=False, options=compiler)


def deterministic(device, dtype=torch.float32, last=False):
    """DDIM with eta = 0."""
    x, m, y, c = problem(device, dtype, last)
    schedulers = ("advkd, FusedDDIMScheduler", "advkd, FusedDDIMScheduler without x_0")
    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, out=y)[0], "ours"),
        Contestant(schedulers[0], lambda: stepping(fused(), x, m), "ours"),
        Contestant(schedulers[1], lambda: stepping(fused().set_step_options(return_x0=False), x, m), "ours"),
        Contestant(DIFFUSERS, lambda: stepping(published(), x, m), "baseline"),
        Contestant(COMPILED, lambda: functools.partial(compiled_step(published()), x, m)),
        Contestant("torch.compile of the formula, into y", lambda: functools.partial(compiled_formula(c, y), x, m)),
        *floors(x, m, y),
    ]
    contestants = with_captured(contestants, device, leave=schedulers)
    return case("deterministic", x, lambda: oracle(x, m, c), contestants, bytes_of(x, m, y), device, last)


def noisy(device, dtype=torch.float32):
    """DDIM with eta = 1: the noise is made in the call. Every contestant draws its own."""
    x, m, y, c = problem(device, dtype, eta=1.0)
    indices = torch.arange(len(x), device=device)
    generator = torch.Generator(device)

    def ours_noise():
        return oracle(x, m, c, philox_normal(SEED, indices, SHAPE[1:], stream="step", step=7))

    def their_noise():
        z = torch.randn(SHAPE, generator=generator.manual_seed(1), device=device, dtype=dtype)
        return oracle(x, m, c, z)

    def call(scheduler):
        return lambda: scheduler.step(m, T, x, eta=1.0, generator=generator.manual_seed(1)).prev_sample

    def drawn_apart():
        step, z = compiled_formula(c, y), torch.empty_like(x)
        return lambda: step(x, m, torch.randn(SHAPE, generator=generator.manual_seed(1), out=z))

    philox = Contestant(
        "advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, noise=(SEED, indices, 7), out=y)[0], "ours", ours_noise
    )
    contestants = [
        *with_captured([philox], device),
        Contestant("advkd, FusedDDIMScheduler, torch's generator", lambda: call(fused()), "ours", their_noise),
        Contestant(DIFFUSERS, lambda: call(published()), "baseline", their_noise),
        *_drawn_inside(COMPILED, _noisy_step, x, m, c),
        Contestant(APART, drawn_apart, "peer", their_noise),
        *with_captured(floors(x, m, y), device),
        *(_noise_on_a_gpu(x, m, y, c) if harness.captures(device) else []),
    ]
    return case("with noise", x, lambda: oracle(x, m, c), contestants, bytes_of(x, m, y), device)


def _noise_on_a_gpu(x, m, y, c):
    """Peers as graphs, which draw from torch's own generator, and the formula with numbers that its compiled code draws."""

    def apart():
        step, z = compiled_formula(c, y), torch.empty_like(x)
        return lambda: step(x, m, torch.randn(SHAPE, out=z))

    graphs = {DIFFUSERS: lambda: stepping(published(), x, m, eta=1.0), APART: apart}
    return [
        *(
            Contestant(name + CAPTURED, lambda f=f: _replayed(f()), "peer", lambda: _global_noise(x, m, c), captured=True)
            for name, f in graphs.items()
        ),
        *_drawn_inside(INSIDE, lambda compiler: compiled_formula_and_noise(c, y, compiler), x, m, c),
    ]


def _drawn_inside(name, compile_step, x, m, c):
    """Compiled code that draws numbers of its own, as a call and on a GPU as a graph, too.

    The first call, which is checked, is the same graph with torch's numbers.
    """

    @functools.cache
    def compiled():
        torch.manual_seed(1)
        first, step = compile_step({"fallback_random": True})(x, m).clone(), compile_step(None)
        step(x, m)
        return first, step

    def prepare(captured):
        first, step = compiled()
        checked, run = [first], harness.Replay(lambda i: step(x, m)) if captured else functools.partial(step, x, m)
        return lambda: checked.pop() if checked else run()

    def noise():
        return _global_noise(x, m, c)

    call = Contestant(name, lambda: prepare(False), "peer", noise)
    graph = Contestant(name + CAPTURED, lambda: prepare(True), "peer", noise, captured=True)
    return [call, graph] if harness.captures(x.device) else [call]


def _noisy_step(compiler):
    return compiled_step(published(), compiler, eta=1.0)


def _global_noise(x, m, c):
    """The step with the first numbers of torch's own generator behind seed 1."""
    torch.manual_seed(1)
    return oracle(x, m, c, torch.randn(SHAPE, device=x.device, dtype=x.dtype))


def _replayed(function):
    """A graph that draws; its first replay, which is checked, begins with seed 1."""
    replay = harness.Replay(lambda i: function())
    torch.manual_seed(1)
    return replay


def pooled(device, r, dtype=torch.float32):
    """The step and the r x r average of its result."""
    x, m, y, c = problem(device, dtype)
    average = torch.empty(*SHAPE[:2], SHAPE[2] // r, SHAPE[3] // r, dtype=dtype, device=device)

    def plain():
        step = stepping(published(), x, m)
        return lambda: F.avg_pool2d(step(), r)

    def compiled():
        step = compiled_step(published())
        return functools.partial(torch.compile(lambda x, m: F.avg_pool2d(step(x, m), r), dynamic=False), x, m)

    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, pool=r, out=(y, average))[2], "ours"),
        Contestant("diffusers and avg_pool2d", plain, "baseline"),
        Contestant("torch.compile of both", compiled),
        Contestant(
            "torch.compile of the formula and the average, into tensors",
            lambda: functools.partial(compiled_formula(c, y, average), x, m),
        ),
        Contestant("advkd, sampler_step without pooling", lambda: lambda: sampler_step(x, m, c, out=y)[0], "floor"),
    ]
    contestants = with_captured(contestants, device)
    small = x.numel() // r**2 * x.element_size()
    wanted = functools.partial(F.avg_pool2d, kernel_size=r)
    return case(f"pooled by {r}", x, lambda: wanted(oracle(x, m, c)), contestants, bytes_of(x, m, y) + small, device)


def case(name, x, wanted, contestants, moved, device, last=False):
    layout = ", channels_last" if last else ""
    title = f"{name}, {str(x.dtype)[6:]}{layout}"
    figures = {"moved_bytes": moved, "repeats": 20, "device": device, "keep_going": harness.captures(device)}
    return Case(title, wanted, tolerance(x.dtype), contestants, len(x), **figures)


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


BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STEP = StepCoefficients(1.2, -0.5, 0.8, 0.1, 0.2, c_z=0.3, clip=1.0)
QUIET = replace(STEP, c_z=0.0)


def growing(batch, size):
    """Seconds of a call by kind, 3 channels of float32, into a tensor that is there."""
    x, m = torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)
    y, indices = torch.empty_like(x), torch.arange(batch)
    calls = {
        "deterministic": lambda: sampler_step(x, m, QUIET, out=y),
        "with noise": lambda: sampler_step(x, m, STEP, noise=(0, indices, 1), out=y),
        "torch.add": lambda: torch.add(x, m, out=y),
    }
    return {"batch": batch, "size": size, "seconds": measure(calls, repeats=25, warmup=5)}


def overhead(repeats=2000):
    """Seconds of a call on 16 numbers: what a call costs at least."""
    x, m = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    indices = torch.arange(1)
    calls = {
        "deterministic": lambda: sampler_step(x, m, QUIET),
        "with noise": lambda: sampler_step(x, m, STEP, noise=(0, indices, 1)),
    }
    return measure(calls, repeats, warmup=100)


def scaling():
    """Growth of the step's cost with batch and resolution, and the least cost of a call."""
    rows = {"batches": [growing(batch, 256) for batch in BATCHES], "sizes": [growing(4, size) for size in SIZES]}
    return {**rows, "overhead": overhead()}


def plot(result, path):
    """Two panels: time by batch and by resolution, beside proportional growth."""
    axes = {"batches": ("batch", "images of 3x256x256"), "sizes": ("size", "image side, 4 images of 3 channels")}
    with panels(path, size=(10, 4), count=2) as found:
        for panel, (key, (axis, label)) in zip(found, axes.items(), strict=True):
            rows = result[key]
            times = {name: medians(rows, "seconds", name) for name in rows[0]["seconds"]}
            expected = growth(times["deterministic"], [row["batch"] * row["size"] ** 2 for row in rows], -1)
            title = f"{'resolution' if axis == 'size' else axis} (dotted: proportional)"
            curves(panel, [row[axis] for row in rows], times, [expected], xlabel=label, ylabel="ms per call", title=title)


SWEEPS = {"scaling": Sweep("step_scaling", scaling, PARITY_TESTS, plot=plot)}

if __name__ == "__main__":
    main(SWEEPS, "bench_sampler_step", cases, PARITY_TESTS)
