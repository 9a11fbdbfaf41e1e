"""Weights of multistep methods as integrals of polynomials, for steps of any length and unequal levels."""

import math

import numpy as np
import pytest

from advkd.diffusion.multistep import deis_weights, dpmpp_weights, exponential_weights, unipc_weights
from advkd.diffusion.schedule import Schedule

NODES, SHARES = np.polynomial.legendre.leggauss(60)
SCHEDULE = Schedule.linear()


def integral(function, start, end):
    """Gauss and Legendre's rule of 60 points, exact to rounding for these integrands."""
    middle, half = (start + end) / 2, (end - start) / 2
    return half * math.fsum(SHARES * function(middle + half * NODES))


@pytest.mark.parametrize("h", [1e-9, 1e-4, 0.03, 0.5, 0.999, 1.0, 1.7, 6.0, 12.0])
@pytest.mark.parametrize("offsets", [(0.0,), (0.0, -1.0), (0.0, -0.7, -2.0), (1.0, 0.0, -0.4, -1.3)])
def test_exponential_weights_are_integrals(h, offsets):
    """Errors of all monomials in t / h, relative to the integral of e^(t - h); offsets are in steps."""
    weights = exponential_weights(h, [h * offset for offset in offsets])
    for power in range(len(offsets)):
        found = math.fsum(w * offset**power for w, offset in zip(weights, offsets))
        wanted = integral(lambda t: np.exp(t - h) * (t / h) ** power, 0, h)  # noqa: B023
        # The weights are solved for from a matrix of condition at most 200.
        assert abs(found - wanted) <= 200 * 2**-52 * sum(map(abs, weights))


LEVELS = [SCHEDULE.level(t) for t in (900.0, 700.0, 550.0, 300.0, 250.0)]
"""Unequal steps, in sigma and in log-SNR."""


def combined(weights, past, level, x, function):
    """The next state of a step whose remembered values are a function of the level."""
    ratio, remembered = weights
    return ratio * x + math.fsum(w * function(at) for w, at in zip(remembered, past))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_integrates_polynomials_in_sigma(order):
    past, following = LEVELS[:order][::-1], LEVELS[order]
    for power in range(order):
        found = combined(deis_weights(past, following), past, following, 0.3, lambda level: level.sigma**power)  # noqa: B023
        area = (following.sigma ** (power + 1) - past[0].sigma ** (power + 1)) / (power + 1)
        assert math.isclose(found, following.alpha * (0.3 / past[0].alpha + area), rel_tol=1e-12)


def exact_step(level, following, x, function):
    """x' of the equation d(x / noise) / dlambda = e^lambda D(lambda), by quadrature."""
    start, end = level.log_snr, following.log_snr
    area = integral(lambda t: np.exp(t) * function(t), start, end)
    return following.noise * (x / level.noise + area)


@pytest.mark.parametrize("order", [1, 3])
def test_dpmpp_integrates_polynomials_in_log_snr(order):
    past, following = LEVELS[:order][::-1], LEVELS[order]
    for power in range(order):
        found = combined(dpmpp_weights(past, following), past, following, 0.3, lambda level: level.log_snr**power)  # noqa: B023
        wanted = exact_step(past[0], following, 0.3, lambda t: t**power)  # noqa: B023
        assert math.isclose(found, wanted, rel_tol=1e-11, abs_tol=1e-13)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_corrects_the_state_by_a_polynomial_of_one_degree_more(order):
    """From its own prediction a step goes to what the corrected state would give, for D of that degree."""
    past, following = LEVELS[: order + 1][::-1], LEVELS[order + 1]
    level, before = past[0], past[1:]
    for power in range(order + 1):
        D = lambda level: level.log_snr**power  # noqa: B023, E731
        predicted = combined(dpmpp_weights(before, level), before, level, 0.3, D)
        corrected = exact_step(before[0], level, 0.3, lambda t: t**power)  # noqa: B023
        found = combined(unipc_weights(past, following, order), past, following, predicted, D)
        wanted = combined(dpmpp_weights(past[:order], following), past[:order], following, corrected, D)
        assert math.isclose(found, wanted, rel_tol=1e-11, abs_tol=1e-13)
