"""FusedUniPCMultistepScheduler: orders, correctors, schedules, and the corrected state that it does not write.

What it has in common with the other schedulers is in ``test_schedulers.py``, as is what the tolerances are.
"""

import copy
import pickle
import warnings

import numpy
import pytest
import torch

pytest.importorskip("diffusers")

from advkd.errors import InputError

from .scheduler_cases import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    assert_within,
    compare,
    follow_sigmas,
    fused_step,
    noise_ratio,
    normal,
    output_at,
    pair,
    sigma_states,
    storage,
    with_tables,
)

pytestmark = pytest.mark.filterwarnings("error:.*runs diffusers' own code:UserWarning")


@pytest.fixture
def fallbacks():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs diffusers' own code", UserWarning)
        yield


LAST = {"final_sigmas_type": "sigma_min"}
CASES = [{"beta_schedule": betas} for betas in BETAS[:2]] + [{"timestep_spacing": spacing} for spacing in SPACINGS]
CASES += [{"lower_order_final": False}, {"disable_corrector": [0, 3]}, {"timestep_spacing": "leading", "steps_offset": 1}]
CASES += [{f"use_{sigmas}_sigmas": True} for sigmas in ("karras", "exponential", "beta")]


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_schedules(prediction, order, solver_type):
    for config in CASES:
        if solver_type == "bh1" or "lower_order_final" in config:
            config = {**config, **LAST}
        config |= {"prediction_type": prediction, "solver_type": solver_type, "solver_order": order}
        follow_sigmas(*pair("unipc", 5, **config), prediction)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_start_in_the_middle(order):
    follow_sigmas(*pair("unipc", 12, solver_order=order), "epsilon", begin=7)


@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_straight_paths(order, prediction):
    for options in ({"flow_shift": 1.0}, {"flow_shift": 3.0, **LAST}, {"use_karras_sigmas": True}):
        both = pair("unipc", 6, solver_order=order, prediction_type=prediction, use_flow_sigmas=True, **options)
        follow_sigmas(*both, prediction)
    both = pair("unipc", 0, solver_order=order, prediction_type=prediction, use_flow_sigmas=True)
    for scheduler in both:
        scheduler.set_timesteps(sigmas=numpy.array([0.9, 0.6, 0.3]))
    follow_sigmas(*both, prediction)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_another_state_than_the_one_returned(prediction, order):
    """The corrector then starts from last_sample, within the pass."""
    for config in ({}, {"disable_corrector": [1]}, {"solver_type": "bh1", **LAST}):
        both = pair("unipc", 6, solver_order=order, prediction_type=prediction, **config)
        follow_sigmas(*both, prediction, follows=False)


def test_a_corrector_disabled_within_a_run():
    theirs, ours = pair("unipc", 6)
    x = normal(0)
    for i, t in enumerate(theirs.timesteps):
        if i == 3:
            theirs.disable_corrector, ours.disable_corrector = [2], [2]
        x = compare(theirs, ours, sigma_states(theirs, i, x, "epsilon"), t, x).theirs[0]


def test_bh1_ends_at_the_image():
    """Diffusers multiplies 0 by its infinite B(h); the limit is x0."""
    theirs, ours = pair("unipc", 4, solver_type="bh1", prediction_type="sample")
    for i, t in enumerate(ours.timesteps):
        results = [s.step(normal(i), t, normal(0)).prev_sample for s in (theirs, ours)]
    assert results[0].isnan().all() and torch.equal(results[1], normal(3))


def test_orders_that_have_no_limit_run_diffusers_code():
    """To the image by a higher order, which lower_order_final avoids."""
    theirs, ours = pair("unipc", 4, lower_order_final=False)
    with pytest.warns(UserWarning, match="log-SNR"):
        for t in ours.timesteps:
            results = [s.step(normal(1), t, normal(0)).prev_sample for s in (theirs, ours)]
    assert not any(result.isfinite().any() for result in results)


def in_float64(order, **config):
    """Both schedulers, whose arithmetic is float64: tables, states and outputs."""
    both = pair("unipc", 6, solver_order=order, **config)
    for scheduler in both:
        scheduler.sigmas = scheduler.sigmas.double()
    return both


def output(i):
    return 0.3 * normal(50 + i, dtype=torch.float64)


CLOSE = 1e-10
"""For runs in float64. Every step divides by alpha, 0.006 at least, and by a ratio of noises, 0.1 at least; ours and diffusers'
coefficients are each good to 1e-13, as third-order ones cancel by a factor of 1000."""


def masked(state, i):
    """Inpainting: what is known is put back, with its noise."""
    state[:, :, :4] = 0.1 * normal(80 + i, dtype=torch.float64)[:, :, :4]
    return state


CHANGES = {
    "replaced": lambda state, x, i: masked(state.clone(), i),
    "written to": lambda state, x, i: masked(state, i),
    "copied back": lambda state, x, i: x.copy_(state),
    "copied back and written to": lambda state, x, i: masked(x.copy_(state), i),
    "every second one written to": lambda state, x, i: masked(state, i) if i % 2 else state,
    "another dtype's": lambda state, x, i: state.float().double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.usefixtures("fallbacks")
def test_states_that_the_caller_changes(order, change):
    """The corrector starts from the corrected state before, whatever the caller does to the returned one."""
    results, (theirs, ours) = [], in_float64(order)
    for scheduler in (theirs, ours):
        x = normal(0, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            # Diffusers' corrector would read the run's first state as it has become; ours goes on from what it was.
            state = scheduler.step(output(i), t, x.clone() if scheduler is theirs else x).prev_sample
            x = change(state, x, i)
        results.append(x)
    assert (results[0] - results[1]).abs().max() < CLOSE * results[0].abs().max()


@pytest.mark.parametrize("read", ["never", "always"])
@pytest.mark.parametrize("written", ["neither", "start", "state"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_last_sample_is_computed_from_what_is_left(order, written, read):
    theirs, ours = in_float64(order)
    x, mine = normal(0, dtype=torch.float64), normal(0, dtype=torch.float64)
    for i, t in enumerate(theirs.timesteps[:-1]):
        x, start = theirs.step(output(i), t, x).prev_sample, mine
        mine = ours.step(output(i), t, start).prev_sample
        if read == "always":
            assert (ours.last_sample - theirs.last_sample).abs().max() < CLOSE * x.abs().max()
    if written != "neither":
        {"start": start, "state": mine}[written].zero_()
    assert (ours.last_sample - theirs.last_sample).abs().max() < CLOSE * x.abs().max()


def test_too_much_written_in_place_is_refused():
    _, ours = pair("unipc", 6)
    x = normal(0)
    for t in ours.timesteps[:2]:
        start, x = x, ours.step(normal(1), t, x).prev_sample
    start.zero_()
    x.zero_()
    with pytest.raises(InputError, match="in place"):
        ours.step(normal(1), ours.timesteps[2], x)


def test_a_third_order_corrector_of_another_state_needs_diffusers_code():
    _, ours = pair("unipc", 8, solver_order=3)
    x = normal(0)
    for t in ours.timesteps[:3]:
        x = ours.step(normal(1), t, x).prev_sample
    with pytest.raises(InputError, match="backend.*third-order corrector"):
        copy.deepcopy(ours).set_step_options(backend="cpu").step(normal(1), ours.timesteps[3], x.clone())
    with pytest.warns(UserWarning, match="third-order corrector"):
        x = ours.step(normal(1), ours.timesteps[3], x.clone()).prev_sample
    # What diffusers' code returned is recognised by the fused step after it.
    ours.step(normal(1), ours.timesteps[4], x)


@pytest.mark.parametrize("as_copy", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_within_a_run(as_copy):
    _, ours = in_float64(2)
    x = normal(0, dtype=torch.float64)
    for i, t in enumerate(ours.timesteps[:3]):
        x = ours.step(output(i), t, x).prev_sample
    results = [s.step(output(3), ours.timesteps[3], x).prev_sample for s in (as_copy(ours), ours)]
    assert (results[0] - results[1]).abs().max() < CLOSE * x.abs().max()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.usefixtures("fallbacks")
def test_diffusers_code_takes_over_within_a_run(order):
    """A step through which a gradient is wanted, between fused ones."""
    results, gradients = [], []
    for scheduler in in_float64(order):
        x = normal(0, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            given = output(i).requires_grad_(i == 3)
            x = scheduler.step(given, t, x).prev_sample
            if i == 3:
                gradients.append(torch.autograd.grad(x.sum(), given)[0])
                x, scheduler.last_sample = x.detach(), scheduler.last_sample.detach()
                scheduler.model_outputs = [m.detach() for m in scheduler.model_outputs]
        results.append(x)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    assert (results[0] - results[1]).abs().max() < CLOSE * results[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_of_a_returned_state(prediction, dtype):
    """The corrected state is read from the stored one: that one's rounding is in the next by the ratio of their noises."""
    theirs, ours = pair("unipc", 6, prediction_type=prediction)
    x, wide = normal(0, dtype=dtype), with_tables(theirs, torch.Tensor.double)
    exact = x.double()
    for i, t in enumerate(theirs.timesteps[:4]):
        given = output_at(theirs, i, x.double(), prediction).to(dtype)
        inherited = noise_ratio(theirs, i) * abs(x.double() - exact).numpy()
        exact = wide.step(given.double(), t, x.double()).prev_sample
        (x,), (own, _) = fused_step(ours, given, t, x)
        # The formula goes on from the x0 that ours has stored, and from the corrected state that its state contains.
        bound = own.error + inherited
        assert_within(x, exact.numpy(), bound + storage(abs(exact.numpy()) + bound, dtype))
        wide.model_outputs[-1] = ours.model_outputs[-1].double()
        predicted = with_tables(wide, torch.Tensor.double)
        predicted._step_index -= 1
        exact = predicted.multistep_uni_p_bh_update(None, sample=wide.last_sample, order=wide.this_order)


def test_states_of_inference_mode_are_recognised():
    """They are made so that writes to them count."""
    with torch.inference_mode():
        _, ours = pair("unipc", 6)
        state = ours.step(normal(1), ours.timesteps[0], normal(0)).prev_sample
        assert ours._returned.is_still(state) and not state.is_inference()
        state.mul_(2)
        assert not ours._returned.is_still(state)
