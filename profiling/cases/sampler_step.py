"""One step of the teacher's sampler: 64 images of 3x256x256, DDIM from t = 500 to 480, and solvers that remember.

python -m profiling.cases.sampler_step [--device cuda] [--only noise] [--out FOLDER]      # scaling: --only scaling

"copy" and "add" move the bytes of the step and compute next to nothing: the floor. A scheduler's step makes new tensors for the
state and for x_0, as its interface says; the op is timed into a tensor that is there. On a GPU calls, the same work as captured
graphs, and both forms of the floor stand side by side; without diffusers its contestants and our schedulers are missing.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

import advkd
from advkd.data.plots import panels
from advkd.diffusion.coefficients import ddim_coefficients
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.ops import StepCoefficients, philox_normal, sampler_step
from advkd.runtime.timing import measure

from .. import harness
from ..harness import CAPTURED, Case, Contestant, Sweep, main, with_captured
from ..sweep import curves, growth, medians

SHAPE = (64, 3, 256, 256)
T, FOLLOWING, STEPS, SEED = 500, 480, 50, 3
PARITY_TESTS = [
    "tests/ops/test_sampler_step.py",
    "tests/system/test_schedulers.py",
    "tests/system/test_heun_scheduler.py",
    "tests/system/test_unipc_scheduler.py",
    "tests/system/test_deis_scheduler.py",
]
DIFFUSERS, COMPILED = "diffusers, DDIMScheduler", "torch.compile of diffusers' step"


def alpha_bars():
    """alpha_bar of every timestep by DDPM's linear betas (Ho et al. 2020), in float32 as diffusers' schedulers have it."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def published():
    """diffusers' DDIM, ready to step."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def fused(**options):
    """Ours in its place."""
    from advkd.diffusion.schedulers import FusedDDIMScheduler

    scheduler = FusedDDIMScheduler().set_step_options(**options)
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


def formula(x, m, c, z=None):
    """The step; in float64 it is the oracle."""
    x_next = c.c_0 * (c.k_x * x + c.k_m * m).clamp(-c.clip, c.clip) + c.c_x * x + c.c_m * m
    return x_next if z is None else x_next + c.c_z * z


def oracle(x, m, c, z=None):
    """The step in float64."""
    return formula(x.double(), m.double(), c, z if z is None else z.double())


def floors(x, m, y):
    return [
        Contestant("torch.add(x, m, out=y)", lambda: lambda: torch.add(x, m, out=y), "floor"),
        Contestant("y.copy_(x)", lambda: lambda: y.copy_(x), "floor"),
    ]


def stepping(scheduler, x, m, **options):
    """A scheduler's step as its user calls it."""
    return lambda: scheduler.step(m, T, x, **options).prev_sample


def compiled_step(compiler=None, **options):
    """torch.compile of diffusers' step; ``compiler``: Inductor's options."""
    scheduler = published()
    return torch.compile(lambda x, m: scheduler.step(m, T, x, return_dict=False, **options)[0], dynamic=False, options=compiler)


def compiled_formula(c, y, pooled=None, drawn=False, compiler=None):
    """torch.compile of the formula with constant coefficients, into tensors that are there: the best that a user can write.

    ``drawn``: with noise that the compiled code draws itself.
    """

    def step(x, m, z=None):
        x_next = formula(x, m, c, torch.randn_like(x) if drawn else z)
        y.copy_(x_next)
        return y if pooled is None else pooled.copy_(F.avg_pool2d(x_next, x.shape[-1] // pooled.shape[-1]))

    return torch.compile(step, dynamic=False, options=compiler)


def deterministic(device, dtype=torch.float32, last=False):
    """DDIM with eta = 0."""
    x, m, y, c = problem(device, dtype, last)
    schedulers = ("advkd, FusedDDIMScheduler", "advkd, FusedDDIMScheduler without x_0")
    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, out=y)[0], "ours"),
        Contestant(schedulers[0], lambda: stepping(fused(), x, m), "ours"),
        Contestant(schedulers[1], lambda: stepping(fused(return_x0=False), x, m), "ours"),
        Contestant(DIFFUSERS, lambda: stepping(published(), x, m), "baseline"),
        Contestant(COMPILED, lambda: functools.partial(compiled_step(), x, m)),
        Contestant("torch.compile of the formula, into y", lambda: functools.partial(compiled_formula(c, y), x, m)),
        *floors(x, m, y),
    ]
    contestants = with_captured(contestants, device, leave=schedulers)
    return case("deterministic", x, lambda: oracle(x, m, c), contestants, last=last)


def noisy(device, dtype=torch.float32):
    """DDIM with eta = 1: the noise is made in the call. Ours draws its own; checked calls draw torch's behind the seed."""
    x, m, y, c = problem(device, dtype, eta=1.0)
    indices = torch.arange(len(x), device=device)
    drop_in = "advkd, FusedDDIMScheduler, torch's generator"

    def philox():
        return oracle(x, m, c, philox_normal(SEED, indices, SHAPE[1:], stream="step", step=7))

    def torchs():
        torch.manual_seed(harness.SEED)
        return oracle(x, m, c, torch.randn(SHAPE, device=device, dtype=dtype))

    def apart():
        step, z = compiled_formula(c, y), torch.empty_like(x)
        return lambda: step(x, m, torch.randn(SHAPE, out=z))

    def drawn_inside(name, compile_step):
        """Compiled code that draws numbers of its own, on a GPU as a graph, too; the checked call has torch's numbers."""

        @functools.cache
        def compiled():
            return compile_step({"fallback_random": True}), compile_step(None)

        def prepare(captured=False):
            same, step = compiled()
            first = iter([functools.partial(same, x, m)])
            run = harness.Replay(lambda i: step(x, m)) if captured else functools.partial(step, x, m)
            return lambda: next(first, run)()

        call = Contestant(name, prepare, oracle=torchs)
        graph = replace(call, name=name + CAPTURED, prepare=lambda: prepare(captured=True), captured=True)
        return [call, graph] if harness.captures(device) else [call]

    contestants = [
        Contestant(
            "advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, noise=(SEED, indices, 7), out=y)[0], "ours", philox
        ),
        Contestant(drop_in, lambda: stepping(fused(), x, m, eta=1.0), "ours", torchs),
        Contestant(DIFFUSERS, lambda: stepping(published(), x, m, eta=1.0), "baseline", torchs),
        Contestant("torch.randn(out=z), torch.compile of the formula, into y", apart, oracle=torchs),
        *floors(x, m, y),
    ]
    contestants = [
        *with_captured(contestants, device, leave=(drop_in,)),
        *drawn_inside(COMPILED, lambda compiler: compiled_step(compiler, eta=1.0)),
        *drawn_inside(
            "torch.compile of the formula and its noise, into y", functools.partial(compiled_formula, c, y, None, True)
        ),
    ]
    return case("with noise", x, lambda: oracle(x, m, c), contestants)


def pooled(device, r, dtype=torch.float32):
    """The step and the r x r average of its result."""
    x, m, y, c = problem(device, dtype)
    average = torch.empty(*SHAPE[:2], SHAPE[2] // r, SHAPE[3] // r, dtype=dtype, device=device)

    def plain():
        step = stepping(published(), x, m)
        return lambda: F.avg_pool2d(step(), r)

    def compiled():
        step = compiled_step()
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
    return case(f"pooled by {r}", x, lambda: F.avg_pool2d(oracle(x, m, c), r), contestants, average.nbytes)


HISTORIES = {
    "unipc, order 2": ("unipc-2", 25, "UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc, order 3": ("unipc-3", 25, "UniPCMultistepScheduler", {"solver_order": 3}),
    "deis, order 3": ("deis-3", 25, "DEISMultistepScheduler", {"solver_order": 3}),
    "heun, second half": ("heun", 51, "HeunDiscreteScheduler", {}),
}
"""Our solver, a step in the middle of its run that has all its history, and diffusers' scheduler of the same method.

Heun's second half stores nothing: the next step needs no history.
"""


class Again:
    """A scheduler's step in the middle of a run, the same one in every call; steps from ``state`` make its history.

    ``tables``: dtype of the noise levels, in which diffusers computes coefficients.
    """

    def __init__(self, scheduler, position, state, output, tables=torch.float32, behind=4):
        scheduler.set_timesteps(STEPS)
        scheduler.sigmas = scheduler.sigmas.to(tables)
        # Heun's steps are of two halves, of which the first stands at an even position.
        begin = position - behind + (position - behind) % scheduler.order
        scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[begin:position]:
            state = scheduler.step(output, t, state, return_dict=False)[0]
        self.scheduler, self.arguments = scheduler, (output, scheduler.timesteps[position], state)
        self.kept = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}

    def __call__(self):
        kept = {name: list(value) if isinstance(value, list) else value for name, value in self.kept.items()}
        vars(self.scheduler).update(kept)
        return self.scheduler.step(*self.arguments, return_dict=False)[0]


def remembering(x, m, c, operands):
    """A step with its history, and what it stores; in float64 it is the oracle."""
    x0 = c.k_x * x + c.k_m * m
    earlier = sum(weight * operands[name] for name, weight in weights(c).items())
    return c.c_0 * x0 + c.c_x * x + c.c_m * m + earlier, c.s_0 * x0 + c.s_x * x + c.s_m * m


def weights(c):
    """Weights of the tensors that earlier steps stored, those that are not 0, by their names in the op."""
    return {name: weight for name, weight in (("previous_x0", c.c_h), ("history", c.c_g), ("noise", c.c_z)) if weight}


def with_history(device, name, dtype=torch.float32):
    """A step of a solver that remembers: the op on tensors given, the schedulers on those of their own run."""
    solver, position, kind, config = HISTORIES[name]
    x, m, y, _ = problem(device, dtype)
    evaluation = Solver(solver).program(Schedule(alpha_bars()), STEPS, "epsilon")[position]
    c = evaluation.step
    operands = {operand: torch.randn_like(x) for operand in weights(c)}
    stored = None if evaluation.stored is None else torch.empty_like(x)

    def step(make):
        return Again(make(**config), position, x, m)

    def published_kind(**options):
        import diffusers

        return getattr(diffusers, kind)(**options)

    def fused_kind(**options):
        return getattr(advkd, f"Fused{kind}")(**options)

    def given():
        wide = {operand: tensor.double() for operand, tensor in operands.items()}
        return remembering(x.double(), m.double(), c, wide)[0]

    def own_run(tables):
        # Diffusers' closed forms of DEIS cancel in float32, to 3e-4: that scheduler is held to its own coefficients.
        return lambda: Again(published_kind(**config), position, x.double(), m.double(), tables)()

    def written(x, m, operands):
        x_next, kept = remembering(x, m, c, operands)
        if stored is not None:
            stored.copy_(kept)
        return y.copy_(x_next)

    compiled = torch.compile(written, dynamic=False)
    drop_in = f"advkd, Fused{kind}"
    contestants = [
        Contestant("advkd, sampler_step", lambda: lambda: sampler_step(x, m, c, **operands, out=y, x0=stored)[0], "ours"),
        Contestant(drop_in, lambda: step(fused_kind), "ours", own_run(torch.float64)),
        Contestant(f"diffusers, {kind}", lambda: step(published_kind), "baseline", own_run(torch.float32)),
        Contestant("torch.compile of the formula, into tensors", lambda: functools.partial(compiled, x, m, operands)),
        *floors(x, m, y),
    ]
    contestants = with_captured(contestants, device, leave=(drop_in,))
    return case(name, x, given, contestants, ((stored is not None) + len(operands)) * x.nbytes)


def case(name, x, wanted, contestants, more_bytes=0, last=False):
    """A case that reads x and the network's output and writes a state, and so many bytes more."""
    title = f"{name}, {str(x.dtype)[6:]}" + (", channels_last" if last else "")
    # A few roundings of states below 8; half precision's own last one. diffusers rounds every operation to the dtype.
    tolerance = 1e-5 if x.dtype == torch.float32 else 8 * 6 * torch.finfo(x.dtype).eps
    figures = {"moved_bytes": 3 * x.nbytes + more_bytes, "device": x.device}
    return Case(title, wanted, tolerance, contestants, len(x), **figures)


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
        **{f"{name}, float32": functools.partial(with_history, device, name) for name in HISTORIES},
        **{f"{name}, bfloat16": functools.partial(with_history, device, name, half) for name in HISTORIES},
    }


BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STEP = StepCoefficients(1.2, -0.5, 0.8, 0.1, 0.2, c_z=0.3, clip=1.0)
QUIET = replace(STEP, c_z=0.0)


def calls(x, m, y=None):
    """The step as functions, without noise and with it."""
    indices = torch.arange(len(x))
    return {
        "deterministic": lambda: sampler_step(x, m, QUIET, out=y),
        "with noise": lambda: sampler_step(x, m, STEP, noise=(0, indices, 1), out=y),
    }


def growing(batch, size):
    """Seconds of a call by kind, 3 channels of float32, into a tensor that is there."""
    x, m, y = (torch.randn(batch, 3, size, size) for _ in range(3))
    functions = {**calls(x, m, y), "torch.add": lambda: torch.add(x, m, out=y)}
    return {"batch": batch, "size": size, "seconds": measure(functions, repeats=25, warmup=5)}


def scaling():
    """Growth of the step's cost with batch and resolution, and what a call costs at least: one on 16 numbers."""
    rows = {"batches": [growing(batch, 256) for batch in BATCHES], "sizes": [growing(4, size) for size in SIZES]}
    least = calls(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4))
    return {**rows, "overhead": measure(least, 2000, warmup=100)}


def plot(result, path):
    """Two panels: time by batch and by resolution, beside proportional growth."""
    axes = {"batches": ("batch", "images of 3x256x256"), "sizes": ("size", "image side, 4 images of 3 channels")}
    with panels(path, 3.4, columns=2) as found:
        for panel, (key, (axis, label)) in zip(found, axes.items(), strict=True):
            rows = result[key]
            times = {name: medians(rows, "seconds", name) for name in rows[0]["seconds"]}
            expected = growth(times["deterministic"], [row["batch"] * row["size"] ** 2 for row in rows], -1)
            title = f"{'resolution' if axis == 'size' else axis} (dotted: proportional)"
            curves(panel, [row[axis] for row in rows], times, [expected], xlabel=label, ylabel="ms per call", title=title)


SWEEPS = {"scaling": Sweep("step_scaling", scaling, PARITY_TESTS, plot=plot)}

if __name__ == "__main__":
    main(SWEEPS, "bench_sampler_step", cases, PARITY_TESTS)
