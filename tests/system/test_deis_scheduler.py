"""FusedDEISMultistepScheduler: orders, schedules, paths, and its weights as integrals.

What it has in common with the other schedulers is in ``test_schedulers.py``, as is what the tolerances are.
"""

import math

import numpy
import pytest
import torch

pytest.importorskip("diffusers")

from advkd.diffusion.multistep import deis_log_rho_weights
from advkd.diffusion.schedule import Level

from .scheduler_cases import BETAS, PREDICTIONS, SPACINGS, compare, follow_sigmas, normal, pair

pytestmark = pytest.mark.filterwarnings("error:.*runs diffusers' own code:UserWarning")

SIGMAS = [f"use_{sigmas}_sigmas" for sigmas in ("karras", "exponential", "beta")]
CASES = [{"beta_schedule": betas} for betas in BETAS[:2]] + [{"timestep_spacing": spacing} for spacing in SPACINGS]
CASES += [{"lower_order_final": False}, {"timestep_spacing": "leading", "steps_offset": 1}]
CASES += [{sigmas: True} for sigmas in SIGMAS]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_schedules(prediction, order):
    for config in CASES:
        follow_sigmas(*pair("deis", 6, solver_order=order, prediction_type=prediction, **config), prediction)


@pytest.mark.parametrize("steps", [14, 15])
def test_the_last_orders_are_lowered_in_short_runs_only(steps):
    follow_sigmas(*pair("deis", steps, solver_order=3), "epsilon", begin=steps - 5)


@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_straight_paths(order, prediction):
    for shift in (1.0, 3.0):
        both = pair("deis", 6, solver_order=order, prediction_type=prediction, use_flow_sigmas=True, flow_shift=shift)
        follow_sigmas(*both, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_is_remembered(prediction):
    """model_outputs holds noise predictions as diffusers' own do, so that either's code can go on with them."""
    theirs, ours = pair("deis", 6, solver_order=3, prediction_type=prediction)
    x = normal(0)
    for i, t in enumerate(theirs.timesteps[:3]):
        x = compare(theirs, ours, normal(10 + i), t, x).theirs[0]
        assert [m is None for m in ours.model_outputs] == [m is None for m in theirs.model_outputs]
    assert ours.lower_order_nums == theirs.lower_order_nums == 3


def test_an_unknown_timestep_means_the_last():
    theirs, ours = pair("deis", 10)
    compare(theirs, ours, normal(1), 123, normal(0))
    assert ours.step_index == theirs.step_index == 10


def test_equal_levels_before_a_step_run_diffusers_code():
    theirs, ours = pair("deis", 4)
    for scheduler in (theirs, ours):
        scheduler.sigmas = torch.tensor([5.0, 2.0, 2.0, 1.0, 0.5])
    with pytest.warns(UserWarning, match="log-SNR"):
        for t in ours.timesteps[:3]:
            results = [s.step(normal(1), t, normal(0)).prev_sample for s in (theirs, ours)]
    assert not any(result.isfinite().any() for result in results)


def level(sigma):
    alpha = 1 / math.sqrt(1 + sigma * sigma)
    return Level(-1.0, alpha, sigma * alpha, alpha * alpha)


@pytest.mark.parametrize("sigmas", [(20.0, 9.0, 4.0, 2.0), (0.30, 0.29, 0.28, 0.27), (3.0, 2.0, 0.5, 0.02)], ids=str)
def test_weights_are_integrals_of_lagrange_polynomials(sigmas):
    """Over rho, of polynomials in log rho: by Gauss's rule with 40 points, which is exact here to rounding."""
    *past, following = (level(sigma) for sigma in sigmas)
    past.reverse()
    points, shares = numpy.polynomial.legendre.leggauss(40)
    for order in (1, 2, 3):
        ratio, weights = deis_log_rho_weights(past[:order], following)
        assert ratio == pytest.approx(following.alpha / past[0].alpha, rel=1e-15)
        gap = following.sigma - past[0].sigma
        rho = past[0].sigma + gap * (points + 1) / 2
        for j, weight in enumerate(weights):
            factors = [
                numpy.log(rho / other.sigma) / math.log(past[j].sigma / other.sigma)
                for other in past[:order]
                if other is not past[j]
            ]
            integral = gap / 2 * (shares * numpy.prod(factors, axis=0)).sum()
            # Solving for three weights loses as many digits as the nodes are close, relative to the largest weight.
            assert weight == pytest.approx(following.alpha * integral, rel=1e-11, abs=1e-12 * max(map(abs, weights)))


def test_equal_levels_leave_the_state():
    assert deis_log_rho_weights([level(2.0), level(3.0)], level(2.0)) == (1.0, [0.0, 0.0])
