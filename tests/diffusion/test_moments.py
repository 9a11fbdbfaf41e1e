"""Mean and variance after every step of the stochastic solvers on Gaussian data, where all states are Gaussian.

A state is affine in x_T and in the noise of every step: it is a vector of weights of 1, x_T, z_1, z_2, ..., on which the
program itself runs. What the moments must be is worked out apart, by a recursion for every solver.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.program import Writer
from advkd.diffusion.schedule import IMAGE, Schedule
from advkd.diffusion.solvers import Solver
from advkd.diffusion.stochastic import analytic_step, x0_variance

from .runs import STOCHASTIC, double, walk

MEAN, VARIANCE = 0.4, 0.3
SCHEDULES = {"linear": Schedule.linear(), "cosine": Schedule.cosine(100), "edm": Schedule.edm(40)}
SOLVERS = {
    "ddpm": Solver("ddpm"),
    "ddpm, trailing": Solver("ddpm", "trailing"),
    "ddim, eta 0": Solver("ddim"),
    "ddim, eta 0.5": Solver("ddim", eta=0.5),
    "ddim, eta 1": Solver("ddim", "trailing", eta=1.0),
    "ddim-renoised": Solver("ddim-renoised"),
    "euler-maruyama": Solver("euler-maruyama", "log_snr"),
    "predictor-corrector": Solver("predictor-corrector", "log_snr", snr=0.3),
    "consistency": Solver("consistency", "log_snr", sigma_min=0.001, sigma_data=0.7),
    "dpdm": Solver("dpdm", "log_snr"),
    "heun": Solver("heun", "karras"),
    "heun, churn": Solver("heun", "karras", churn=4.0, churn_min=0.05, churn_max=20.0, churn_noise=1.1),
}


def marginal(level):
    return level.alpha * MEAN, level.alpha**2 * VARIANCE + level.noise**2


def gaussian(schedule, mean=MEAN, variance=VARIANCE):
    return GaussianTeacher(double([mean]), double([variance]), schedule)


def denoised(weights, level, one):
    """The exact posterior mean."""
    mean, variance = marginal(level)
    return MEAN * one + level.alpha * VARIANCE / variance * (weights - mean * one)


def moments(program, first, network=denoised):
    """Mean and variance after every step of a run whose first state has the moments ``first``."""
    size = 2 + len(program)
    basis = iter(torch.eye(size, dtype=torch.float64))
    one, x_T = next(basis), next(basis)
    states = walk(program, x_T, lambda weights, level: network(weights, level, one), draw=lambda: next(basis))
    for weights in [state for state, e in zip(states, program) if e.end is not None]:
        constant, start, *noise = weights.tolist()
        yield constant + start * first[0], start**2 * first[1] + math.fsum(w * w for w in noise)


def expected(solver, schedule, levels, first, variance="fixed_small"):
    """The same by the papers' formulas, in mean and variance of the state."""
    mean, var = first
    if solver.name == "ddim-renoised":
        yield from renoised([*levels, IMAGE], mean, var)
        return
    for level, following in pairwise([*levels, IMAGE]):
        mean, var = STEPS[solver.name](solver, schedule, level, following, mean, var, len(levels), variance)
        yield mean, var


def renoised(levels, mean, var):
    """A double step of DDIM in y = x / alpha, D + sigma'' / sigma (y - D), then noise up to sigma' of the level passed over."""
    sigma, alpha = [level.sigma for level in levels], [level.alpha for level in levels]
    mean, var = mean / alpha[0], var / alpha[0] ** 2
    for i in range(len(levels) - 1):
        far = min(i + 2, len(levels) - 1)
        gain = VARIANCE / (VARIANCE + sigma[i] ** 2)
        factor = gain + sigma[far] / sigma[i] * (1 - gain)
        mean, var = MEAN + factor * (mean - MEAN), factor**2 * var + sigma[i + 1] ** 2 - sigma[far] ** 2
        yield alpha[i + 1] * mean, alpha[i + 1] ** 2 * var


def affine(level, a_0, a_x, mean, var, noise=0.0):
    """Moments of a_0 D + a_x x + noise, with D = MEAN + gain (x - its marginal's mean)."""
    centre, spread = marginal(level)
    gain = level.alpha * VARIANCE / spread
    return a_0 * (MEAN + gain * (mean - centre)) + a_x * mean, (a_0 * gain + a_x) ** 2 * var + noise


def ddpm(solver, schedule, level, following, mean, var, steps, variance):
    a, b = level.alpha_bar, following.alpha_bar
    beta = 1 - a / b
    small = (1 - b) / (1 - a) * beta
    noise = (beta if variance == "fixed_large" else small) if following.noise else 0.0
    return affine(level, math.sqrt(b) * beta / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a), mean, var, noise)


def ddim(solver, schedule, level, following, mean, var, steps, variance):
    a, b = level.alpha_bar, following.alpha_bar
    noise = solver.eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    eps = math.sqrt((1 - b - noise) / (1 - a))
    return affine(level, math.sqrt(b) - eps * math.sqrt(a), eps, mean, var, noise)


def euler_maruyama(solver, schedule, level, following, mean, var, steps, variance):
    if not following.noise:
        return affine(level, 1.0, 0.0, mean, var)
    b = math.log(following.alpha_bar / level.alpha_bar)
    centre, spread = marginal(level)
    return mean + b / 2 * mean - b * (mean - centre) / spread, (1 + b / 2 - b / spread) ** 2 * var + b


def predictor_corrector(solver, schedule, level, following, mean, var, steps, variance):
    mean, var = euler_maruyama(solver, schedule, level, following, mean, var, steps, variance)
    if not following.noise:
        return mean, var
    d = 2 * solver.snr**2 * (1 - following.alpha_bar)
    centre, spread = marginal(following)
    return mean - d * (mean - centre) / spread, (1 - d / spread) ** 2 * var + 2 * d


def heun(solver, schedule, level, following, mean, var, steps, variance):
    """Karras et al. 2022, algorithm 2, in y = x / alpha and sigma: dy / dsigma = sigma (y - MEAN) / (VARIANCE + sigma^2)."""
    sigma, after = level.sigma, following.sigma
    mean, var = mean / level.alpha, var / level.alpha_bar
    if solver.churn_min <= sigma <= solver.churn_max:
        highest = schedule.level(len(schedule) - 1.0).sigma
        hat = min(sigma * (1 + min(solver.churn / steps, math.sqrt(2) - 1)), highest)
        var, sigma = var + solver.churn_noise**2 * (hat**2 - sigma**2), hat
    slope = sigma / (VARIANCE + sigma**2)
    factor = 1 + (after - sigma) * slope
    if after:
        factor = 1 + (after - sigma) / 2 * (slope + after / (VARIANCE + after**2) * factor)
    return following.alpha * (MEAN + factor * (mean - MEAN)), following.alpha_bar * factor**2 * var


def consistency(solver, schedule, level, following, mean, var, steps, variance):
    """f = c y + (1 - c) D of y = x / alpha; then x' = alpha' (f + sqrt(sigma'^2 - sigma_min^2) z)."""
    s, lowest = solver.sigma_data, solver.sigma_min
    skip = s * s / ((level.sigma - lowest) ** 2 + s * s)
    noise = following.alpha_bar * (following.sigma**2 - lowest**2) if following.noise else 0.0
    return affine(level, following.alpha * (1 - skip), following.alpha * skip / level.alpha, mean, var, noise)


def dpdm(solver, schedule, level, following, mean, var, steps, variance):
    return affine(level, following.alpha, 0.0, mean, var, 1 - following.alpha_bar)


STEPS = {
    "consistency": consistency,
    "dpdm": dpdm,
    "ddpm": ddpm,
    "ddim": ddim,
    "euler-maruyama": euler_maruyama,
    "predictor-corrector": predictor_corrector,
    "heun": heun,
}


def assert_close(found, wanted, tolerance=1e-12):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted)
    for (mean, var), (wanted_mean, wanted_var) in zip(found, wanted):
        assert abs(mean - wanted_mean) <= tolerance * (1 + abs(wanted_mean))
        assert abs(var - wanted_var) <= tolerance * (1 + wanted_var)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_moments_after_every_step(name, schedule):
    solver, schedule = SOLVERS[name], SCHEDULES[schedule]
    levels, first = solver.levels(schedule, 20), (0.0, 1.0)
    found = moments(solver.program(schedule, 20, "sample"), first)
    assert_close(found, expected(solver, schedule, levels, first))


def test_ddpm_with_the_large_variance():
    solver, schedule = SOLVERS["ddpm"], SCHEDULES["linear"]
    program = solver.program(schedule, 20, "sample", variance="fixed_large")
    assert_close(
        moments(program, (0.0, 1.0)), expected(solver, schedule, solver.levels(schedule, 20), (0.0, 1.0), "fixed_large")
    )


def test_every_stochastic_solver_is_proved_here():
    noisy = {solver.name for solver in SOLVERS.values() if solver.stochastic}
    assert noisy | {"analytic-ddpm", "analytic-ddim"} == {*STOCHASTIC, "ddim", "heun"}


def test_churn_keeps_the_marginal():
    """The pass that adds noise takes the marginal of one level to that of the other, whatever the data."""
    schedule = SCHEDULES["edm"]
    low, high = schedule.level(10), schedule.at_sigma(1.4 * schedule.level(10).sigma)
    step = Writer("sample").add_noise(low, high).step
    mean, var = marginal(low)
    wanted = marginal(high)
    assert abs(step.c_x * mean - wanted[0]) <= 1e-14 and abs(step.c_x**2 * var + step.c_z**2 - wanted[1]) <= 1e-14


def test_analytic_variance_of_images_is_clipped():
    """The variance of x0 is at most 1, the noise before the last step 2 grey values, and the last step adds none."""
    schedule, clipped, free = Schedule.linear(), Writer("sample", 1.0), Writer("sample")
    noisy, quiet, last = (schedule.level(t) for t in (999.0, 400.0, 300.0))
    # At the noisiest level a network that finds 90 % of the noise leaves x0 a variance of 2,475, of which images have 1.
    assert x0_variance(noisy, 0.9, math.inf) == pytest.approx(0.1 * noisy.sigma**2)
    assert x0_variance(noisy, 0.9, 1.0) == 1 and x0_variance(quiet, 1.2, 1.0) == 0
    for ancestral in (True, False):
        own, other = (analytic_step(w, noisy, quiet, 0.9, ancestral).step for w in (clipped, free))
        gain = other.c_0**2
        assert own.c_z**2 - other.c_z**2 == pytest.approx(gain * (1 - 0.1 * noisy.sigma**2))
        assert analytic_step(clipped, last, IMAGE, 0.5, ancestral).step.c_z == 0
        assert analytic_step(free, last, IMAGE, 0.5, ancestral).step.c_z > 0
        most = analytic_step(clipped, quiet, last, 0.5, ancestral, last_noise=True).step.c_z
        # The mean of |z| is sqrt(2 / pi); a grey value is 2 / 255.
        assert most * math.sqrt(2 / math.pi) == pytest.approx(2 * 2 / 255)
        assert analytic_step(clipped, quiet, last, 0.5, ancestral).step.c_z > most


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize("name", ["analytic-ddpm", "analytic-ddim"])
def test_analytic_marginals_are_exact(name, spacing, steps):
    """With one variance in all directions the mean and the variance are the data's at every level, for any number of steps."""
    for schedule in SCHEDULES.values():
        solver = Solver(name, spacing)
        levels = solver.levels(schedule, steps)
        program = solver.program(schedule, steps, "sample", noise_power=gaussian(schedule).noise_power)
        wanted = [marginal(level) for level in levels[1:]] + [(MEAN, VARIANCE)]
        # 1 - E|eps|^2 is about alpha_bar near pure noise, and is known to a few roundings of 1.
        tolerance = 1e-12 + 8 * 2**-53 / levels[0].alpha_bar
        assert_close(moments(program, marginal(levels[0])), wanted, tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_renoised_steps_of_the_exact_flow_keep_the_marginals(steps):
    """A network whose double step is the flow's own map: the noise after it gives the marginal of the level passed over."""
    schedule, solver = SCHEDULES["linear"], Solver("ddim-renoised", "trailing")
    levels = solver.levels(schedule, steps)
    far = dict(zip(levels, [*levels[2:], IMAGE, IMAGE]))

    def distilled(weights, level, one):
        (mean, variance), (mean_after, variance_after) = marginal(level), marginal(far[level])
        after = mean_after * one + math.sqrt(variance_after / variance) * (weights - mean * one)
        ratio = far[level].noise / level.noise
        return (after - ratio * weights) / (far[level].alpha - ratio * level.alpha)

    found = moments(solver.program(schedule, steps, "sample"), marginal(levels[0]), distilled)
    assert_close(found, [marginal(level) for level in [*levels[1:], IMAGE]])
    exact = moments(solver.program(schedule, steps, "sample"), marginal(levels[0]))
    assert abs(list(exact)[-1][1] - VARIANCE) > 0.01


@pytest.mark.parametrize("ancestral", [True, False])
def test_analytic_variance_is_right_in_the_mean_over_directions(ancestral):
    """With several variances E|eps|^2 is their mean: one step from the marginal keeps the covariance's trace, not its parts."""
    schedule, variances = SCHEDULES["linear"], double([0.05, 0.4, 1.5])
    teacher = GaussianTeacher(torch.zeros(3), variances, schedule)
    level, following = schedule.level(600.0), schedule.level(200.0)
    step = analytic_step(Writer("sample"), level, following, teacher.noise_power(level), ancestral).step
    before, wanted = (at.alpha**2 * variances + at.noise**2 for at in (level, following))
    gain = step.c_0 * level.alpha * variances / before + step.c_x
    found = gain**2 * before + step.c_z**2
    assert abs((found - wanted).sum()) <= 1e-13 and (found - wanted).abs().max() > 1e-3


PATHS, STEPS_OF_A_PATH = 20_000, 6
FALSE_ALARM = 1e-6
"""Probability that a right program fails in any of the comparisons of :func:`test_sampled_moments`, all of them together."""


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim, eta 1", "ddim-renoised", "euler-maruyama", "predictor-corrector", "heun, churn"]
)
def test_sampled_moments(name):
    """Samples of the real loop: mean by the normal law, variance by chi^2."""
    solver, schedule = SOLVERS[name], SCHEDULES["cosine"]
    teacher = gaussian(schedule)
    found = [x for _, x in teacher.path(teacher.noise(PATHS, seed=3), solver, STEPS_OF_A_PATH, seed=4)]
    wanted = moments(solver.program(schedule, STEPS_OF_A_PATH, "sample"), (0.0, 1.0))
    least = FALSE_ALARM / (6 * STEPS_OF_A_PATH * 2)
    for x, (mean, var) in zip(found, wanted):
        z = (x.mean().item() - mean) / math.sqrt(var / PATHS)
        square = (x - x.mean()).square().sum().item() / var
        assert 2 * stats.norm.sf(abs(z)) > least
        assert 2 * min(stats.chi2.cdf(square, PATHS - 1), stats.chi2.sf(square, PATHS - 1)) > least
