"""Orders of accuracy of the deterministic solvers, fitted to errors at five numbers of steps, on data whose flow is known."""

import functools
import math

import pytest
import torch

from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.multistep import dpmpp_weights, multistep, unipc_weights
from advkd.diffusion.program import Writer
from advkd.diffusion.schedule import Level
from advkd.diffusion.solvers import METHODS, Solver

from .runs import DETERMINISTIC, double, end, exact_network, fine_flow, fitted_order, log_snr_schedule, remembered

COUNTS = (32, 48, 64, 96, 128)
SCHEDULE = log_snr_schedule(-0.5, 1.0)
"""Steps of 0.01 to 0.05 in log-SNR: small enough for the leading term, and errors of 1e-9 are far above float64's rounding."""

GAUSSIAN = GaussianTeacher(torch.tensor([0.5, -1.0, 0.25]), torch.tensor([0.3, 0.6, 1.5]), SCHEDULE)
MIXTURE = MixtureTeacher(torch.tensor([[-1.0, 0.4], [0.8, -0.2]]), [0.3, 0.7], 0.3, SCHEDULE)

OWN_START = {name: METHODS[name].whole for name in DETERMINISTIC}
"""Orders of whole runs. A run begins with a step of first order, whose error is O(h^2) once: it caps explicit methods at 2.
UniPC corrects that state at the next evaluation by the trapezoidal rule, whose error O(h^3) caps it at 3. Single-step methods
have no start."""

MULTISTEP = ["dpmpp-2m", "dpmpp-3m", "deis-2", "deis-3", "unipc-1", "unipc-2", "unipc-3"]


def start_states(teacher):
    return torch.randn(8, *teacher.shape, generator=torch.Generator().manual_seed(0)).double()


@functools.cache
def true_state(teacher, sigma):
    """The states at ``sigma`` that flow from the start states at the schedule's highest level."""
    flow = teacher.flow if teacher is GAUSSIAN else functools.partial(fine_flow, teacher)
    x, first = start_states(teacher), SCHEDULE.level(len(SCHEDULE) - 1.0).sigma
    return x if sigma == first else flow(x, first, sigma)


def error(teacher, program, levels, exact_history, kind="x0"):
    """Root mean square of a run's error at its last finite level. With exact history the steps that lack any are left out."""
    first = remembered(program) if exact_history else 0
    memory = {1 + j % first: teacher.predict(true_state(teacher, levels[j].sigma), levels[j].sigma) for j in range(first)}
    memory = {register: eps if kind == "eps" else x0 for register, (x0, eps) in memory.items()}
    found = end(program[first:-1], true_state(teacher, levels[first].sigma), exact_network(teacher), memory)
    return (found - true_state(teacher, levels[-1].sigma)).square().mean().sqrt().item()


def order(name, spacing, teacher, exact_history):
    solver, errors = Solver(name, spacing), []
    for steps in COUNTS:
        levels = solver.levels(SCHEDULE, steps + 1)
        program = solver.program(SCHEDULE, steps + 1, "sample")
        errors.append(error(teacher, program, levels, exact_history, "eps" if name.startswith("deis") else "x0"))
    return fitted_order(COUNTS, errors)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_whole_runs(name, spacing):
    assert abs(order(name, spacing, GAUSSIAN, exact_history=False) - OWN_START[name]) <= 0.15


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_order_from_exact_history(name, spacing):
    assert abs(order(name, spacing, GAUSSIAN, exact_history=True) - METHODS[name].order) <= 0.15


@pytest.mark.parametrize(("name", "wanted"), [("ddim", 1), ("heun-flow", 2)])
def test_order_from_noise_alone_to_the_image(name, wanted):
    """Runs in equal steps of tau, the last one of them Euler's, whose error is of second order in its length."""
    z, errors = start_states(GAUSSIAN), []
    for steps in COUNTS:
        program = Solver(name, "flow").program(SCHEDULE, steps, "sample")
        image = GAUSSIAN.mean + z * GAUSSIAN.variances.sqrt()
        errors.append((end(program, z, exact_network(GAUSSIAN)) - image).square().mean().sqrt().item())
    assert abs(fitted_order(COUNTS, errors) - wanted) <= 0.15


def velocity(y, tau):
    """D - eps = (D - y) / (1 - tau) at y = tau x0 + (1 - tau) eps."""
    return (MIXTURE.x0(y, double(tau), double(1 - tau)) - y) / (1 - tau)


def test_euler_in_the_time_of_a_flow_is_ddim():
    y = z = start_states(MIXTURE)
    for i in range(5):
        y = y + velocity(y, i / 5) / 5
    run = end(Solver("ddim", "flow").program(SCHEDULE, 5, "sample"), z, exact_network(MIXTURE))
    assert torch.allclose(run, y, rtol=0, atol=1e-13)


def test_heun_in_the_time_of_a_flow():
    y = z = start_states(MIXTURE)
    for i in range(4):
        u = velocity(y, i / 5)
        y = y + (u + velocity(y + u / 5, (i + 1) / 5)) / 10
    y = y + velocity(y, 4 / 5) / 5
    run = end(Solver("heun-flow", "flow").program(SCHEDULE, 5, "sample"), z, exact_network(MIXTURE))
    assert torch.allclose(run, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["heun", "heun-flow", "dpm-2", "dpm-3", "dpmpp-2m", "unipc-1", "unipc-2"])
def test_order_on_a_denoiser_that_is_not_linear(name):
    assert abs(order(name, "log_snr", MIXTURE, exact_history=False) - OWN_START[name]) <= 0.15


@pytest.mark.parametrize("name", ["dpmpp-3m", "deis-3", "unipc-3"])
def test_order_from_exact_history_on_a_denoiser_that_is_not_linear(name):
    assert abs(order(name, "log_snr", MIXTURE, exact_history=True) - METHODS[name].order) <= 0.15


def halved(past, following):
    """3M with half the weight of its second difference D2 = 2 (D10 - D11) / (r0 + r1), as in the paper's own code."""
    ratio, weights = dpmpp_weights(past, following)
    if len(past) < 3 or following.noise == 0:
        return ratio, weights
    h = following.log_snr - past[0].log_snr
    r_0, r_1 = ((a.log_snr - b.log_snr) / h for a, b in zip(past, past[1:]))
    half = -following.alpha * ((math.expm1(-h) + h) / h**2 - 0.5) / (r_0 + r_1)
    differences = (1 / r_0, -1 / r_0 - 1 / r_1, 1 / r_1)
    return ratio, [weight - half * difference for weight, difference in zip(weights, differences)]


def test_half_the_second_difference_leaves_order_2():
    errors = []
    for steps in COUNTS:
        levels = SCHEDULE.levels("log_snr", steps + 1)
        errors.append(error(GAUSSIAN, list(multistep(Writer("sample"), levels, 3, halved)), levels, exact_history=True))
    assert abs(fitted_order(COUNTS, errors) - 2) <= 0.15


def diffusers_run(scheduler):
    """A run of diffusers' scheduler on the Gaussian up to its last level with noise, and those levels."""
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas[:12].double().tolist()
    levels = [Level(0.0, 1 / math.hypot(1, s), s / math.hypot(1, s), 1 / (1 + s * s)) for s in sigmas]
    network, x = exact_network(GAUSSIAN), start_states(GAUSSIAN)
    for t, level in zip(scheduler.timesteps[:-1], levels):
        x = scheduler.step(network(x, level), t, x).prev_sample
    return x, levels


def our_run(levels, remembered, weights):
    program = list(multistep(Writer("sample"), levels, remembered, weights))
    return end(program[:-1], start_states(GAUSSIAN), exact_network(GAUSSIAN))


OPTIONS = {"prediction_type": "sample", "lower_order_final": False, "final_sigmas_type": "zero", "timestep_spacing": "linspace"}
NEAR = {"atol": 1e-4, "rtol": 0}
"""diffusers keeps its noise levels in float32, and takes differences of their logarithms."""


def test_half_the_second_difference_is_what_diffusers_does():
    diffusers = pytest.importorskip("diffusers")
    wanted, levels = diffusers_run(diffusers.DPMSolverMultistepScheduler(solver_order=3, **OPTIONS))
    assert torch.allclose(our_run(levels, 3, halved), wanted, **NEAR)
    assert (our_run(levels, 3, dpmpp_weights) - wanted).abs().max() > 1e-3


def test_second_order_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    wanted, levels = diffusers_run(diffusers.DPMSolverMultistepScheduler(solver_order=2, **OPTIONS))
    assert torch.allclose(our_run(levels, 2, dpmpp_weights), wanted, **NEAR)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_that_of_diffusers(order):
    """With B(h) = e^h - 1; the state after a step is its prediction, as the correction comes with the next evaluation."""
    diffusers = pytest.importorskip("diffusers")
    wanted, levels = diffusers_run(diffusers.UniPCMultistepScheduler(solver_order=order, solver_type="bh2", **OPTIONS))
    assert torch.allclose(our_run(levels, order + 1, functools.partial(unipc_weights, order=order)), wanted, **NEAR)
