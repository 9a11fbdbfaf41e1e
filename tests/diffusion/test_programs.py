"""Programs as the loop runs them: evaluations and registers, float32 against float64, batches, every solver on a UNet."""

import dataclasses
import functools
import itertools

import pytest
import torch

from advkd.diffusion.exact import MixtureTeacher
from advkd.diffusion.loop import SamplingLoop
from advkd.diffusion.program import registers
from advkd.diffusion.schedule import SPACINGS, Schedule
from advkd.diffusion.solvers import ALIASES, FROM_NOISE, METHODS, Solver, as_solver
from advkd.errors import InputError
from advkd.ops import philox_normal

from ..conftest import tiny_teacher
from .runs import end, exact_network

SOLVERS = [Solver(name) for name in METHODS] + [Solver("heun", "karras", churn=5.0), Solver("ddim", eta=0.7)]
ON_A_UNET = [solver for solver in SOLVERS if not solver.name.startswith("analytic")]
REGISTERS = {"dpmpp-2m": 2, "dpmpp-3m": 3, "deis-2": 2, "deis-3": 3, "unipc-1": 2, "unipc-2": 3, "unipc-3": 4}
REGISTERS |= {"heun": 2, "heun-flow": 2, "dpm-2": 2, "dpm-3": 3}
"""Registers of a run, the state's among them; other solvers have that one alone."""

TEACHER = MixtureTeacher.from_preset("8-gaussians")


def name_of(solver):
    return f"{solver.name}{'+' * solver.stochastic * bool(METHODS[solver.name].order)}"


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_evaluations_and_registers(solver):
    spacings = [spacing for spacing in SPACINGS if spacing != "flow" or solver.name in FROM_NOISE]
    for spacing, steps in itertools.product(spacings, (4, 5, 9)):
        spaced, seen = dataclasses.replace(solver, spacing=spacing), []
        program = TEACHER.program(spaced, steps)
        assert registers(program) == REGISTERS.get(solver.name, 1)
        assert sum(e.end is not None for e in program) == steps and program[-1].end.noise == 0

        def network(x, place):
            seen.append(place.t.item())
            return x

        loop = SamplingLoop(network, (2, 2), program, 0, "cpu", dtype=torch.float64)
        loop.start(TEACHER.noise(2), 0)
        for _ in range(steps):
            loop.step()
        assert len(seen) == sum(e.network for e in program) == spaced.evaluations(steps)
        timesteps = TEACHER.timesteps(spaced, steps)
        # Churn goes back to a noisier level before the network sees the state.
        assert len(timesteps) == steps and (solver.churn or seen[0] == pytest.approx(timesteps[0]))


def noise_of(program, seed, indices, shape, backend):
    """The noise of the passes that draw any: a function of seed, sample and the pass's number."""
    draws = [i for i, e in enumerate(program) if e.draws]
    return [philox_normal(seed, indices, shape, stream="step", step=i, backend=backend).double() for i in draws]


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_the_loop_is_the_programs_arithmetic(solver):
    """Registers, their order of reading and writing, and the noise of every pass, by another interpreter."""
    program = TEACHER.program(solver, 6)
    drawing = iter(noise_of(program, 9, range(5, 8), (2,), "reference"))
    x_T = TEACHER.noise(3, seed=9, start=5)
    wanted = end(program, x_T, exact_network(TEACHER), draw=lambda: next(drawing))
    found = TEACHER.sample(3, seed=9, solver=solver, steps=6, start=5)
    assert next(drawing, None) is None
    assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.fixture(scope="module")
def unet_teacher():
    return tiny_teacher()


@pytest.mark.parametrize("solver", ON_A_UNET, ids=name_of)
def test_samples_of_a_unet(solver, unet_teacher):
    """A sample is a function of seed and index: repeated to the bit, in another batch to the network's rounding."""
    draw = functools.partial(unet_teacher.sample, solver=solver, steps=4)
    images = draw(3, seed=2)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1
    assert torch.equal(images, draw(3, seed=2)) and (images - draw(3, seed=3)).abs().max() > 0.1
    parts = torch.cat((draw(2, seed=2), draw(1, seed=2, start=2)))
    # A few roundings of the network, times the noise's weight in x0: at most 1 / sqrt(alpha_bar) = 157.
    assert (images - parts).abs().max() <= 16 * 2**-24 * 157


@pytest.mark.parametrize("solver", ON_A_UNET, ids=name_of)
def test_float32_is_float64_to_rounding(solver, unet_teacher):
    """The float32 loop against the same program in float64 that is given the loop's own outputs of the network."""
    program, outputs = unet_teacher.program(solver, 5), []
    network = unet_teacher._network()

    def recorded(x, place):
        outputs.append(network(x, place).clone())
        return outputs[-1]

    x_T = unet_teacher.noise(2, seed=1)
    loop = SamplingLoop(recorded, x_T.shape, program, 1, "cpu")
    loop.start(x_T, 0)
    for _ in range(5):
        loop.step()
    drawing = iter(noise_of(program, 1, range(2), x_T.shape[1:], "auto"))
    wanted, size = in_float64(program, x_T.double(), iter(outputs), drawing)
    # Each pass has a dozen roundings of its largest term, which later passes multiply by their weights.
    assert (loop.x - wanted).abs().max() <= 16 * 2**-24 * size


@pytest.mark.parametrize(("spacing", "dtype"), [("trailing", torch.int64), ("karras", torch.float32)])
def test_timesteps_reach_the_unet(spacing, dtype, unet_teacher, monkeypatch):
    """Whole ones as they are, and fractions of others: diffusers would round a Python float without a word."""
    told, forward = [], unet_teacher.unet.forward

    def listening(x, t, **options):
        told.append(t)
        return forward(x, t, **options)

    monkeypatch.setattr(unet_teacher.unet, "forward", listening)
    solver = Solver("unipc", spacing)
    unet_teacher.sample(1, solver=solver, steps=4)
    assert {t.dtype for t in told} == {dtype}
    assert torch.equal(torch.cat(told), torch.tensor(unet_teacher.timesteps(solver, 4), dtype=dtype))
    assert spacing == "trailing" or (torch.cat(told)[1:3] % 1 > 0).all()


def in_float64(program, x_T, outputs, drawing):
    """The last state by clamped float64 arithmetic, and a bound of all terms that go into it, carried along."""
    held, sizes = {0: x_T}, {0: x_T.abs().max().item()}
    for e in program:
        s, state, size = e.step, held[e.x], sizes[e.x]
        output = next(outputs).double() if e.network else state
        clean = (s.k_x * state + s.k_m * output).clamp(-s.clip, s.clip)
        size_of_clean = abs(s.k_x) * size + abs(s.k_m) * output.abs().max().item()
        terms = [(s.c_0, clean, size_of_clean), (s.c_x, state, size), (s.c_m, output, output.abs().max().item())]
        for register, weight in ((e.previous, s.c_h), (e.history, s.c_g), (e.third, s.c_z)):
            if register is not None:
                terms.append((weight, held[register], sizes[register]))
        if e.draws:
            z = next(drawing)
            terms.append((s.c_z, z, z.abs().max().item()))
        if e.stored is not None:
            held[e.stored] = s.s_0 * clean + s.s_x * state + s.s_m * output
            sizes[e.stored] = abs(s.s_0) * size_of_clean + abs(s.s_x) * size + abs(s.s_m) * output.abs().max().item()
        held[e.out] = sum(weight * tensor for weight, tensor, _ in terms)
        sizes[e.out] = sum(abs(weight) * bound for weight, _, bound in terms)
    return held[0], sizes[0]


def test_names():
    assert as_solver("deis") == Solver("deis-3") and as_solver(Solver("heun")).name == "heun"
    assert {Solver(alias).name for alias in ALIASES} <= set(METHODS)
    assert [Solver(name).order for name in ("ddim", "dpm-3", "unipc", "ddpm")] == [1, 3, 3, 0]
    assert Solver("ddim", eta=0.1).order == 0 and Solver("heun", churn=1.0).stochastic


def test_defaults_of_runs():
    """All timesteps of DDPM, 50 of DDIM, 10 of the others, and no more than there are."""
    for total in (1000, 20, 5):
        teacher = MixtureTeacher.from_preset("two-gaussians", Schedule.linear(total))
        counts = [len(teacher.timesteps(name)) for name in ("ddpm", "ddim", "unipc")]
        assert counts == [total, min(50, total), min(10, total)]
    assert all(isinstance(t, int) for t in teacher.timesteps("unipc"))
    assert not all(isinstance(t, int) for t in TEACHER.timesteps(Solver("unipc", "karras")))


def test_a_default_below_the_order_says_that_it_is_the_default():
    teacher = MixtureTeacher.from_preset("two-gaussians", Schedule.linear(2))
    assert len(teacher.timesteps("dpmpp-2m")) == 2
    for ask in (teacher.timesteps, teacher.program):
        with pytest.raises(InputError, match="the default is the schedule's 2 timesteps, and solver unipc-2 takes at least 3"):
            ask("unipc")
