"""The noise schedule: tables and their inverse, spacings against diffusers', formulas of noise levels, ends without signal."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import DPDM_SIGMA_MIN, SPACINGS, Schedule
from advkd.diffusion.solvers import FROM_NOISE, METHODS, Solver
from advkd.errors import InputError

from ..conftest import DEFAULTS, other_default, tiny_unet
from .runs import double

MAKERS = {"linear": Schedule.linear, "cosine": Schedule.cosine, "edm": Schedule.edm}
TOTALS = st.integers(1, 2000)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(sorted(MAKERS)), TOTALS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_sigma_and_t_are_inverse(name, total, shares):
    schedule = MAKERS[name](total)
    t = double(shares) * (total - 1)
    sigma = schedule.sigma(t)
    # log sigma has a rounding, of which t takes a share by the slope there.
    slope = schedule.log_sigma(torch.arange(total)).diff().min().item() if total > 1 else 1.0
    assert (schedule.t(sigma) - t).abs().max() <= 1e-12 * total + 8 * 2**-53 * 10 / slope
    assert (schedule.sigma(schedule.t(sigma)) / sigma - 1).abs().max() <= 1e-12
    assert torch.equal(schedule.log_snr(t), -schedule.log_sigma(t))
    assert torch.allclose(schedule.alpha_bar(t) * (1 + sigma**2), torch.ones_like(t), rtol=1e-12, atol=0)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(sorted(MAKERS)), TOTALS)
def test_whole_timesteps_are_the_table(name, total):
    schedule = MAKERS[name](total)
    t = torch.arange(total)
    assert len(schedule) == total
    assert torch.allclose(schedule.alpha_bar(t), schedule.alpha_bars, rtol=1e-13, atol=0)
    for i in {0, total // 2, total - 1}:
        level = schedule.level(i)
        assert level.alpha_bar == schedule.alpha_bars[i] and level.t == i
        assert math.isclose(level.alpha**2 + level.noise**2, 1, rel_tol=4e-16)


def test_levels_beyond_the_ends():
    schedule = Schedule.linear(10)
    sigmas = schedule.sigma(torch.tensor([0, 9]))
    assert schedule.t(sigmas * double([0.5, 2])).tolist() == [0, 9]
    assert torch.equal(schedule.sigma(torch.tensor([-1.0, 12.0])), sigmas)
    assert schedule.t(sigmas.reshape(2, 1)).shape == (2, 1) and schedule.t(1.0).shape == ()


def test_formulas():
    """Written out in float64, by other means than the schedule's."""
    beta = np.linspace(1e-4, 0.02, 1000)
    assert np.allclose(Schedule.linear().alpha_bars, np.exp(np.cumsum(np.log1p(-beta))), rtol=1e-12, atol=0)
    f = [math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(51)]
    alpha_bars = Schedule.cosine(50).alpha_bars.tolist()
    assert np.allclose(alpha_bars[:-1], np.array(f[1:-1]) / f[0], rtol=1e-12, atol=0)
    assert math.isclose(alpha_bars[-1], alpha_bars[-2] * 1e-3, rel_tol=1e-12)
    sigmas = [(80 ** (1 / 7) + i / 29 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(30)]
    # 1 - alpha_bar has the rounding of 1, which is 1e-16 / sigma^2 of it.
    assert np.allclose(Schedule.edm(30).sigma(torch.arange(30)), sigmas[::-1], rtol=1e-10, atol=0)
    assert Schedule.edm(1).sigma(0).item() == pytest.approx(80, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "beta_schedule"), [(Schedule.linear(), "linear"), (Schedule.cosine(), "squaredcos_cap_v2")]
)
def test_alpha_bars_are_diffusers(schedule, beta_schedule):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod.double()
    # A product of 1,000 factors of float32.
    assert torch.allclose(schedule.alpha_bars, theirs, rtol=1000 * 2**-23, atol=0)


def diffusers_timesteps(total, steps, spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_diffusers(spacing):
    for total in (1, 2, 3, 7, 10, 50, 100, 999, 1000):
        for steps in {1, 2, 3, 4, 7, 10, 15, 25, 33, 49, 50, 64, 100, 250, 333, 400, 700, 992, 999, 1000}:
            if steps > total or (spacing == "linspace" and steps == 1):
                continue
            ours = [level.t for level in Schedule.linear(total).levels(spacing, steps)]
            # diffusers' trailing range may run on to -1: 16 timesteps for 15 steps of 999.
            assert ours == diffusers_timesteps(total, steps, spacing)[:steps], (total, steps)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(SPACINGS), st.integers(1, 1200), st.data())
def test_levels_fall_and_end_within_the_schedule(spacing, total, data):
    schedule, steps = Schedule.linear(total), data.draw(st.integers(1, min(total, 60)))
    if spacing == "dpdm" and steps > 1 and schedule.sigma(total) <= DPDM_SIGMA_MIN.get(steps, 0.3 if steps < 4 else 1e-4):
        with pytest.raises(InputError, match="above this schedule's highest: take another spacing"):
            schedule.levels(spacing, steps)
        return
    levels = schedule.levels(spacing, steps)
    sigmas = [level.sigma for level in levels]
    assert len(levels) == steps and all(a > b for a, b in zip(sigmas, sigmas[1:]))
    assert all(0 <= level.t <= total - 1 for level in levels)
    if spacing != "leading":
        assert levels[0].t == total - 1


def test_levels_by_noise():
    schedule = Schedule.linear()
    high, low = (schedule.level(t).sigma for t in (999, 0))
    for rho in (3.0, 7.0):
        wanted = [(high ** (1 / rho) + i / 11 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(12)]
        assert np.allclose([level.sigma for level in schedule.levels("karras", 12, rho)], wanted, rtol=1e-11, atol=0)
    steps = np.diff([level.log_snr for level in schedule.levels("log_snr", 12)])
    assert np.allclose(steps, math.log(high / low) / 11, rtol=1e-10, atol=0)
    # 1, 2 and 3 have no row in the paper's table; below the schedule's own lowest level there is none.
    for count, least in {2: 0.3, 3: 0.3, **DPDM_SIGMA_MIN, 10: 1e-4, 20: 1e-4}.items():
        least = max(least, low)
        wanted = [(high ** (1 / 40) + i / (count - 1) * (least ** (1 / 40) - high ** (1 / 40))) ** 40 for i in range(count)]
        assert np.allclose([level.sigma for level in schedule.levels("dpdm", count)], wanted, rtol=1e-11, atol=0)
    for level in schedule.levels("karras", 12):
        assert math.isclose(schedule.sigma(level.t).item(), level.sigma, rel_tol=1e-11)


def test_levels_of_a_flow():
    """Equal steps of tau in y = tau x0 + (1 - tau) eps, from noise alone; beyond the schedule's ends timesteps are its ends."""
    schedule = Schedule.linear()
    for steps in (1, 2, 7, 400):
        levels = schedule.levels("flow", steps)
        assert (levels[0].alpha, levels[0].noise, levels[0].alpha_bar) == (0, 1, 0)
        taus = [level.alpha / (level.alpha + level.noise) for level in levels]
        assert np.allclose(taus, np.arange(steps) / steps, rtol=0, atol=4e-16)
        lengths = [math.hypot(level.alpha, level.noise) for level in levels]
        assert np.allclose(lengths, 1, rtol=0, atol=4e-16) and levels[0].t == 999
    assert schedule.sigma(0) > levels[-1].sigma and levels[-1].t == 0


def zero_terminal(zeros=1):
    return Schedule(torch.cat((Schedule.linear(20).alpha_bars, torch.zeros(zeros))))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_of_a_schedule_that_ends_in_noise(spacing):
    if spacing in ("karras", "log_snr", "dpdm"):
        with pytest.raises(InputError, match=f"spacing {spacing} needs finite noise levels"):
            zero_terminal().levels(spacing, 4)
    else:
        first = zero_terminal().levels(spacing, 4)[0]
        assert (first.sigma == math.inf) == (spacing != "leading")


@pytest.mark.parametrize("name", METHODS)
def test_solvers_of_a_schedule_that_ends_in_noise(name):
    """DDIM, renoised too, DDPM and Heun in tau begin there where the output holds the image; the others say what to do."""
    schedule = zero_terminal()
    if name not in FROM_NOISE:
        with pytest.raises(
            InputError, match="begins at alpha_bar = 0: take ddim, ddim-renoised, ddpm, heun-flow, or another spacing"
        ):
            Solver(name, "trailing").program(schedule, 5, "sample", noise_power=lambda level: 0.5)
        assert Solver(name, "leading").program(schedule, 5, "sample", noise_power=lambda level: 0.5)
        return
    with pytest.raises(InputError, match="an epsilon prediction has no x0 at alpha_bar = 0"):
        Solver(name, "trailing").program(schedule, 5, "epsilon")
    teacher = GaussianTeacher(double([0.5]), double([0.3]), schedule)
    assert teacher.sample(3, solver=Solver(name, "trailing"), steps=5).isfinite().all()


def test_levels_beside_an_end_in_noise():
    schedule = zero_terminal(2)
    assert schedule.sigma(double([20, 20.5, 21])).tolist() == [math.inf] * 3
    assert schedule.alpha_bar(20.5) == 0 and schedule.level(20.5).alpha == 0
    assert schedule.t(math.inf) == 20 and schedule.t(1e9) == 19


def test_a_schedule_without_noise_at_its_beginning():
    schedule = Schedule(torch.tensor([1.0, 0.9, 0.5, 0.1]))
    with pytest.raises(InputError, match="needs finite noise levels"):
        schedule.levels("karras", 3)
    with pytest.raises(InputError, match="no noise at timestep 0"):
        Solver("heun", "trailing").program(schedule, 4, "sample")


@pytest.mark.parametrize("name", METHODS)
def test_a_schedule_that_repeats_a_level(name):
    """Differences by log-SNR or sigma are then over nothing."""
    schedule = Schedule(double([0.9, 0.9, 0.5, 0.5, 0.1]))
    program = functools.partial(Solver(name, "trailing").program, schedule, 5, "sample", noise_power=lambda level: 0.5)
    if METHODS[name].order > 1 or name == "deis-1":
        with pytest.raises(InputError, match=f"solver {name} needs levels that fall; this schedule repeats one: take ddim"):
            program()
    else:
        assert len([e for e in program() if e.end]) == 5


@pytest.mark.parametrize("other", DEFAULTS)
def test_torch_defaults_change_nothing(other):
    def numbers():
        schedules = [make(50) for make in MAKERS.values()]
        lists = [schedule.levels(spacing, 5) for schedule in schedules for spacing in SPACINGS]
        return lists, [
            (schedule.alpha_bars.tolist(), schedule.t(1.0).item(), schedule.sigma(3.5).item()) for schedule in schedules
        ]

    wanted = numbers()
    with other_default(other):
        assert numbers() == wanted


@pytest.mark.parametrize("alpha_bars", [[], [0.5, 0.6], [1.1, 0.5], [0.5, -0.1], [0.5, math.nan], [[0.5]], 0.5])
def test_tables_that_are_none(alpha_bars):
    with pytest.raises(InputError, match=r"alpha_bars must be \(T,\) numbers that fall within \[0, 1\]"):
        Schedule(torch.tensor(alpha_bars))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.levels("even", 3), "spacing must be one of leading, .*, got 'even'"),
        (lambda s: s.levels("karras", 0), "steps must be between 1 and the schedule's 10 timesteps, got 0"),
        (lambda s: s.levels("karras", 11), "steps must be between 1 and the schedule's 10 timesteps, got 11"),
        (lambda s: s.levels("karras", 2.5), "steps must be a whole number, got 2.5"),
        (lambda s: s.levels("karras", 3, rho=0.0), "rho > 0 must hold"),
        (lambda s: s.level(9.5), r"timestep must be in \[0, 9\], got 9.5"),
        (lambda s: s.level(math.nan), r"timestep must be in \[0, 9\], got nan"),
        (lambda s: Schedule.edm(4, sigma_min=2.0, sigma_max=1.0), "sigma_min <= sigma_max"),
        (lambda s: Schedule.cosine(0), "timesteps must be at least 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call(Schedule.linear(10))


def test_fractions_of_timesteps_reach_a_network():
    """diffusers rounds a Python float down without a word; a tensor keeps its fraction."""
    unet = tiny_unet().eval()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        below, between, above = (unet(x, torch.tensor([t])).sample for t in (10.0, 10.5, 11.0))
        assert torch.equal(below, unet(x, 10).sample)
    assert min((between - below).abs().max(), (between - above).abs().max()) > 1e-5


def test_levels_between_a_finite_and_an_infinite_one_are_infinite():
    """alpha_bar of 1 at the clean end and of 0 at the noisy one: no timestep between them is a number that is none."""
    schedule = Schedule(torch.tensor([1.0, 0.9, 0.5, 0.0], dtype=torch.float64))
    for share in (0.2, 0.5, 0.8):
        assert schedule.log_sigma(share) == -math.inf and schedule.log_sigma(2 + share) == math.inf
        assert schedule.alpha_bar(share) == 1 and schedule.alpha_bar(2 + share) == 0
        assert schedule.log_sigma(1 + share).isfinite()
    assert schedule.at_sigma(math.inf).alpha == 0 and schedule.at_sigma(math.inf).noise == 1


def test_a_schedule_keeps_its_own_table():
    table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = Schedule(table)
    table[1] = 0.2
    assert schedule.level(1.0).alpha_bar == 0.5 and schedule.alpha_bars[1] == 0.5
