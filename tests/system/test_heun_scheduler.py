"""FusedHeunDiscreteScheduler: its schedules, and the slope that lies between two halves of a step.

What it has in common with the other schedulers is in ``test_schedulers.py``, as is what the tolerances are.
"""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from advkd.diffusion.heun_scheduler import FusedHeunDiscreteScheduler
from advkd.errors import InputError

from ..rounding import Rounded
from .scheduler_cases import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    assert_within,
    compare,
    diffusers_bound,
    follow_sigmas,
    fused_step,
    normal,
    output_at,
    pair,
    storage,
    with_tables,
)

pytestmark = pytest.mark.filterwarnings("error:.*runs diffusers' own code:UserWarning")

CASES = [
    *({"beta_schedule": betas} for betas in BETAS),
    *({"timestep_spacing": spacing} for spacing in SPACINGS),
    *({f"use_{sigmas}_sigmas": True} for sigmas in ("karras", "exponential", "beta")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.4},
]


@pytest.mark.parametrize("follows", [True, False], ids=["returned state", "another state"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_schedules(prediction, follows):
    for config in CASES:
        follow_sigmas(*pair("heun", 4, prediction_type=prediction, **config), prediction, follows=follows)
    follow_sigmas(*pair("heun", 4, prediction_type=prediction), prediction, begin=4, follows=follows)


def test_custom_timesteps():
    both = pair("heun", 0)
    for scheduler in both:
        scheduler.set_timesteps(timesteps=[900, 450, 3])
    follow_sigmas(*both, "epsilon")


def halfway(**config):
    """Both schedulers between the halves of a step, their states, the state before and the network's output."""
    theirs, ours = pair("heun", 6, **config)
    start, output = normal(0), normal(1)
    states = [scheduler.step(output, theirs.timesteps[0], start).prev_sample for scheduler in (theirs, ours)]
    return theirs, ours, states, start, output


def test_diffusers_attributes_follow():
    """dt, sample and the order of the next half are diffusers' after every half, and are freed with the second."""
    theirs, ours = pair("heun", 4)
    x = normal(0)
    for t in theirs.timesteps:
        for scheduler in (theirs, ours):
            scheduler.step(normal(1), t, x)
        assert ours.state_in_first_order == theirs.state_in_first_order and ours.sample is theirs.sample
        assert ours.dt == theirs.dt and (ours.prev_derivative is None) == (theirs.prev_derivative is None)
    ours.set_timesteps(4)
    assert ours.state_in_first_order and ours.prev_derivative is None


def test_a_second_run_of_another_batch():
    """The last step, to the image, has no second half: what it keeps is not read by the next run."""
    _, ours = pair("heun", 2)
    for shape, dtype in (((2, 3, 8, 8), torch.float64), ((1, 3, 4, 4), torch.float32)):
        x = normal(0, shape, dtype)
        for t in ours.timesteps:
            x = ours.step(normal(1, shape, dtype), t, x).prev_sample
        assert x.shape == shape and x.dtype == dtype
        ours.set_timesteps(2)


def in_place(tensor):
    tensor.mul_(0.5)


@pytest.mark.parametrize("return_x0", [True, False])
@pytest.mark.parametrize("written", ["neither", "start", "state"])
def test_the_slope_is_computed_from_what_is_left(written, return_x0):
    """(x - x0) / sigma, (x' - x0) / sigma' or (x' - x) / dt, whichever tensors are as they were; in float64 they are one."""
    theirs, ours = pair("heun", 6)
    ours.set_step_options(return_x0=return_x0)
    start, output = normal(0, dtype=torch.float64), normal(1, dtype=torch.float64)
    given = start.clone()
    slopes = []
    for scheduler, x in ((theirs, start), (ours, given)):
        scheduler.sigmas = scheduler.sigmas.double()
        state = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
        if scheduler is ours:
            in_place(given) if written == "start" else in_place(state) if written == "state" else None
        if scheduler is ours and written != "neither" and not return_x0:
            with pytest.raises(InputError, match="in place"):
                ours.step(output, scheduler.timesteps[1], state.clone())
            return
        slopes.append(scheduler.prev_derivative)
    # Differences of numbers up to 20 times the slope, in units of 2^-53, divided by sigma or dt of at least 7.
    assert (slopes[0] - slopes[1]).abs().max() < 1e-13 * slopes[0].abs().max()


def test_too_much_written_in_place_is_refused():
    _, ours, (_, state), start, output = halfway()
    in_place(start)
    in_place(state)
    with pytest.raises(InputError, match="in place"):
        ours.step(output, ours.timesteps[1], state)


@pytest.mark.parametrize("change", ["replaced", "in place"])
def test_a_state_that_was_changed_between_the_halves(change):
    """Diffusers keeps the slope of the first half, whatever becomes of the state."""
    theirs, ours, states, _, output = halfway()
    for state in states:
        state.mul_(0.5) if change == "in place" else None
    x = states[1] if change == "in place" else 0.5 * states[1]
    theirs.prev_derivative = ours.prev_derivative
    formula = diffusers_bound(with_tables(theirs, Rounded), output, theirs.timesteps[1], x)
    result, fused = fused_step(ours, output, theirs.timesteps[1], x)
    for value, exact, own in zip(result, formula, fused):
        assert_within(value, exact.value, own.error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_of_a_returned_state(prediction, dtype):
    """The slope is read from the stored state: half of that one's rounding is in the next."""
    theirs, ours = pair("heun", 6, prediction_type=prediction)
    start = (normal(0) * float(theirs.init_noise_sigma)).to(dtype)
    wide, x, exact = with_tables(theirs, torch.Tensor.double), start, start.double()
    for i, t in enumerate(theirs.timesteps[:2]):
        output = output_at(theirs, i, x.double(), prediction).to(dtype)
        inherited = 0.5 * abs(x.double() - exact).numpy()
        exact = wide.step(output.double(), t, x.double()).prev_sample
        (x, _), (own, _) = fused_step(ours, output, t, x)
        bound = own.error + inherited
        assert_within(x, exact.numpy(), bound + storage(abs(exact.numpy()) + bound, dtype))


@pytest.mark.parametrize("half", [0, 1])
def test_diffusers_code_takes_over_in_either_half(half):
    """A half through which a gradient is wanted, between fused ones."""
    results, gradients = [], []
    for scheduler in pair("heun", 4):
        x = normal(0)
        for i, t in enumerate(scheduler.timesteps):
            output = normal(10 + i).requires_grad_(i == 2 + half)
            if output.requires_grad and isinstance(scheduler, FusedHeunDiscreteScheduler):
                with pytest.warns(UserWarning, match="gradient"):
                    x = scheduler.step(output, t, x).prev_sample
            else:
                x = scheduler.step(output, t, x).prev_sample
            if output.requires_grad:
                gradients.append(torch.autograd.grad(x.sum(), output)[0])
            x = x.detach()
        results.append(x)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    # Seven halves of a few roundings each, of states up to 40.
    assert (results[0] - results[1]).abs().max() <= 7 * 4 * 40 * 2.0**-24


@pytest.mark.parametrize("as_copy", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_from_between_the_halves(as_copy):
    _, ours, (_, state), _, output = halfway()
    again = as_copy(ours)
    (first, _), (bound, _) = fused_step(ours, output, ours.timesteps[1], state)
    (second, _), (other, _) = fused_step(again, output, ours.timesteps[1], state)
    # The copy computes the slope: a difference, a quotient, and its product with half of dt.
    slope = 3 * 2.0**-24 * (abs(state.double()) + abs(normal(0).double())).numpy()
    assert_within(first, second, bound.error + other.error + slope)


def test_states_of_inference_mode_are_recognised():
    """They are made so that writes to them count."""
    with torch.inference_mode():
        _, ours, (_, state), _, _ = halfway()
        assert ours._returned.is_still(state) and not state.is_inference()
        state.mul_(2)
        assert not ours._returned.is_still(state)


def test_x0_can_be_left_out():
    _, ours, (_, state), start, output = halfway()
    other = pair("heun", 6)[1].set_step_options(return_x0=False)
    left_out = other.step(output, ours.timesteps[0], start)
    assert left_out.pred_original_sample is None and torch.equal(left_out.prev_sample, state)
    results = [s.step(output, s.timesteps[1], x).prev_sample for s, x in ((ours, state), (other, left_out.prev_sample))]
    assert torch.equal(*results)


@pytest.mark.parametrize("by_value", [True, False])
def test_a_start_in_the_middle_is_a_first_half(by_value, caplog):
    """Timesteps stand twice. A run that starts by either of the two begins with the first half, and ends as any other."""
    for position in (3, 4):
        theirs, ours = pair("heun", 4)
        t = ours.timesteps[position]
        compare(theirs, ours, normal(1), t.clone() if by_value else t, normal(0))
        assert ours.step_index == theirs.step_index == 5
        for t in ours.timesteps[5:]:
            ours.step(normal(1), t, normal(0))
        with pytest.raises(InputError, match="all 7 steps of the schedule are done; call set_timesteps"):
            ours.step(normal(1), t, normal(0))
    assert "set_begin_index" not in caplog.text
