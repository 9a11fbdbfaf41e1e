"""The fused schedulers against diffusers' own: single steps, whole runs, bookkeeping, fallbacks, files and pipelines.

Tolerances are rounding bounds, which :mod:`tests.rounding` derives from each step's own arithmetic and operands: ours is within
the bound of its pass of the formula, which is diffusers' own code in float64, and within both sides' bounds of diffusers'.

Sizes of both sides' errors: they are alike in an epsilon prediction's x0, where 1 / sqrt(alpha_bar) = 97 magnifies ours to
3.4e-5 and diffusers' to 1.9e-5 (bounds 7e-5 and 6e-5); MKL's square root, whose last bit differs between processors of two
vendors, decides whether they add up. For a v or x0 prediction both are within 3e-7. diffusers has the larger error in DDPM's
next state between neighbouring timesteps, 1.7e-4 against our 4e-7: its 1 - a_t / a_s cancels.
"""

import copy
import functools
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from advkd.diffusion import fused_step as common
from advkd.diffusion import step_tables
from advkd.diffusion.coefficients import (
    ddim_coefficients,
    ddpm_coefficients,
    dpmsolver_coefficients,
    euler_coefficients,
    noise_coefficients,
    x0_coefficients,
)
from advkd.diffusion.schedulers import FusedDDIMScheduler
from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import philox_normal

from ..conftest import DEFAULTS, other_default, process_environment, tiny_unet
from ..rounding import Rounded
from .scheduler_cases import (
    BETAS,
    FLOAT64,
    NAMES,
    PAIRS,
    PREDICTIONS,
    SHAPE,
    SPACINGS,
    assert_within,
    compare,
    diffusers_bound,
    follow,
    follow_sigmas,
    fused_step,
    gap,
    kept,
    network_at,
    normal,
    output_at,
    pair,
    run,
    run_bound,
    seeded,
    storage,
    taken,
    with_tables,
)

pytestmark = pytest.mark.filterwarnings("error:.*runs diffusers' own code:UserWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def fallbacks():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs diffusers' own code", UserWarning)
        yield


# The last timestep of the cosine schedule has alpha_bar = 2.4e-9; see test_ddim_cosine_end.
SCHEDULES = [(b, s) for b in BETAS for s in SPACINGS if b != "squaredcos_cap_v2" or s == "leading"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("beta_schedule", "timestep_spacing"), SCHEDULES)
def test_ddim_schedules(beta_schedule, timestep_spacing, prediction):
    for options in ({"set_alpha_to_one": False, "steps_offset": 1}, {}):
        config = {"beta_schedule": beta_schedule, "timestep_spacing": timestep_spacing, **options}
        for eta in (0.0, 1.0):
            follow(*pair("ddim", 12, prediction_type=prediction, **config), prediction, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0, 0.4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_clipping_and_eta(prediction, clip, eta):
    config = {"prediction_type": prediction, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    for clipped_eps in (False, True):
        follow(*pair("ddim", 20, **config), prediction, eta=eta, use_clipped_model_output=clipped_eps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_random_outputs(prediction):
    """An output unrelated to the state makes x0 as large as 1 / sqrt(a_t); clipping then acts on almost all of it."""
    for clip in (True, False):
        theirs, ours = pair("ddim", 10, prediction_type=prediction, clip_sample=clip)
        for i, t in enumerate(theirs.timesteps):
            compare(theirs, ours, normal(50 + i), t, normal(i))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_cosine_end(prediction, eta):
    """At alpha_bar = 2.4e-9 an epsilon prediction's x0, and with it every rounding, enters by a factor of thousands.

    The other predictions have no such factor, but diffusers' 1 - a_s - sigma^2 cancels for eta = 1: there it leaves our bound.
    """
    theirs, ours = pair("ddim", 10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=prediction)
    for scheduler in (theirs, ours):
        scheduler.register_to_config(clip_sample=False)
    x, t, noise = normal(0), 999, {"variance_noise": normal(1)} if eta else {}
    step = compare(theirs, ours, network_at(theirs, x, t, prediction), t, x, eta=eta, **noise)
    distance = abs(step.theirs[0].numpy() - step.formula[0].value)
    assert bool((distance > step.fused[0].error).any()) == (eta == 1 and prediction != "epsilon")


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction):
    """rescale_betas_zero_snr: alpha_bar = 0 at the start, where v and x0 predictions are well defined."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    theirs, ours = pair("ddim", 10, **config)
    assert float(theirs.alphas_cumprod[-1]) == 0
    follow(theirs, ours, prediction)
    theirs, ours = pair("ddpm", 10, **config)
    compare(theirs, ours, normal(1), 999, normal(0), torch.Generator().manual_seed(0))


def test_any_ddim_timestep():
    """diffusers' DDIM steps from any t to t - T // steps, whatever the schedule."""
    theirs, ours = pair("ddim", 7)
    for t in (999, 333, 141, 5, 0):
        for timestep in (t, torch.tensor(t), torch.tensor([t]), numpy.int64(t)):
            x, output = normal(t), normal(1)
            by_number = compare(theirs, ours, output, t, x).ours
            assert torch.equal(ours.step(output, timestep, x).prev_sample, by_number[0])


DDPM_CASES = [
    {},
    {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid", "timestep_spacing": "trailing"},
    {"variance_type": "fixed_small_log"},
    {"variance_type": "fixed_large", "steps_offset": 1},
    {"variance_type": "fixed_large", "timestep_spacing": "linspace", "clip_sample": False},
    {"clip_sample_range": 0.5},
    {"trained_betas": numpy.linspace(1e-3, 0.02, 1000).tolist()},
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("config", DDPM_CASES, ids=str)
@pytest.mark.parametrize("steps", [25, 999])
def test_ddpm(config, prediction, steps):
    theirs, ours = pair("ddpm", steps, prediction_type=prediction, **config)
    schedule = theirs.timesteps.tolist()
    for i, t in enumerate([schedule[0], schedule[len(schedule) // 2], schedule[-2], schedule[-1]]):
        x = normal(i)
        compare(theirs, ours, network_at(theirs, x, t, prediction), t, x, torch.Generator().manual_seed(i))


def test_ddpm_schedules_of_all_kinds():
    """Before set_timesteps (t to t - 1), and on custom timesteps: the last one goes to the image."""
    for custom in (None, [900, 500, 499, 20]):
        theirs, ours = pair("ddpm", 0)
        if custom:
            theirs.set_timesteps(timesteps=custom)
            ours.set_timesteps(timesteps=custom)
        for t in custom or [999, 400, 1, 0]:
            compare(theirs, ours, normal(1), t, normal(t), torch.Generator().manual_seed(2))
    with pytest.raises(InputError, match="timestep"):
        ours.step(normal(1), 501, normal(0))


SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_euler(beta_schedule, prediction):
    cases = [{"timestep_spacing": spacing} for spacing in SPACINGS] + SIGMAS[1:]
    cases += [{"final_sigmas_type": "sigma_min"}, {"interpolation_type": "log_linear"}, {"sigma_min": 0.1, "sigma_max": 50.0}]
    cases += [{"timestep_type": "continuous"}, {"steps_offset": 1, "timestep_spacing": "leading"}]
    for config in cases + ([{"rescale_betas_zero_snr": True}] if prediction != "epsilon" else []):
        follow_sigmas(*pair("euler", 8, beta_schedule=beta_schedule, prediction_type=prediction, **config), prediction)


def test_euler_custom_schedules():
    theirs, ours = pair("euler", 0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[900.0, 450.5, 3.0])
    follow_sigmas(theirs, ours, "epsilon")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=[20.0, 5.0, 0.5, 0.0])
    follow_sigmas(theirs, ours, "epsilon")


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_dpmsolver(beta_schedule, prediction, solver_type):
    """Orders 1 and 2, the last order lowered at 14 steps and not at 15, spacings, final sigmas, begin index."""
    cases = [{"timestep_spacing": spacing} for spacing in SPACINGS] + [{"solver_order": 1}]
    cases += [{"final_sigmas_type": "sigma_min", "lower_order_final": low} for low in (True, False)]
    cases += [{"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False}]
    common = {"beta_schedule": beta_schedule, "prediction_type": prediction, "solver_type": solver_type}
    for config in cases:
        follow_sigmas(*pair("dpmsolver", 14, **common, **config), prediction)
        follow_sigmas(*pair("dpmsolver", 15, **common, **config), prediction, begin=4)


@pytest.mark.parametrize("sigmas", ["karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_dpmsolver_sigmas(beta_schedule, prediction, sigmas):
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction, f"use_{sigmas}": True}
    for steps in (6, 25):
        follow_sigmas(*pair("dpmsolver", steps, **config), prediction)


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmsolver_flow(shift, final_sigmas_type):
    config = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    for steps in (6, 20):
        follow_sigmas(*pair("dpmsolver", steps, **config, final_sigmas_type=final_sigmas_type), "flow_prediction")


@pytest.mark.parametrize("steps", [6, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs(name, prediction, steps):
    """The second run, with another number of steps, needs tables of its own."""
    theirs, ours = pair(name, steps, prediction_type=prediction)
    options = {"eta": 0.7} if name == "ddim" else {}
    for count in (steps, steps // 2):
        results, generators = [], []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(count)
            x = normal(0) * float(scheduler.init_noise_sigma)
            # Batches may have a generator per sample.
            generators.append(seeded(5, 6))
            results.append(run(scheduler, x, prediction, generator=generators[-1], **options))
        bound = run_bound(*pair(name, count, prediction_type=prediction), x, prediction, generator=seeded(5, 6), **options)
        assert_within(*results, bound)
        for a, b in zip(*generators):
            assert torch.equal(a.get_state(), b.get_state())


@pytest.mark.parametrize("name", ["euler", "dpmsolver", "heun", "unipc", "deis"])
def test_image_to_image_start(name):
    """A start in the middle: with a begin index, and by the first timestep alone."""
    for begin in (True, False):
        theirs, ours = pair(name, 10)
        count = len(theirs.timesteps)
        x = normal(0) * float(theirs.sigmas[4] if theirs.init_noise_sigma != 1 else 1)
        results, others = [], pair(name, 10)
        for scheduler in (theirs, ours, *others):
            if begin:
                scheduler.set_begin_index(4)
        for scheduler in (theirs, ours):
            results.append(run(scheduler, x, begin=4))
            assert scheduler.step_index == count
        assert_within(*results, run_bound(*others, x, begin=4))


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
# Schedules whose first timestep repeats: scheduler, configuration, arguments of set_timesteps.
REPEATED = [
    ("dpmsolver", {**COSINE, "use_karras_sigmas": True}, {"num_inference_steps": 20}),
    ("dpmsolver", {**COSINE, "use_exponential_sigmas": True}, {"num_inference_steps": 20}),
    ("dpmsolver", {**COSINE, "use_beta_sigmas": True}, {"num_inference_steps": 20}),
    ("dpmsolver", {"solver_order": 1}, {"timesteps": [900, 900, 900, 500, 500, 3]}),
    ("euler", {}, {"timesteps": [900.0, 900.0, 900.0, 500.0, 500.0, 3.0]}),
    ("euler", {}, {"sigmas": [200.0, 180.0, 160.0, 5.0, 0.001, 0.0]}),
]


def repeated(name, config, arguments):
    """diffusers' scheduler and ours with repeated timesteps."""
    both = pair(name, 0, **config)
    for scheduler in both:
        scheduler.set_timesteps(**arguments)
    return both


def walk(theirs, ours, timesteps):
    """Compare every step of ours with diffusers', along diffusers' path; returns the operands and our results."""
    x, steps = normal(0) * float(theirs.init_noise_sigma), []
    for i, t in enumerate(timesteps):
        for scheduler in (theirs, ours):
            scheduler.scale_model_input(x, t)
        step = compare(theirs, ours, normal(50 + i), t, x)
        assert ours.step_index == theirs.step_index
        steps.append((x, step.ours[0]))
        x = step.theirs[0]
    return steps


@pytest.mark.parametrize(("name", "config", "arguments"), REPEATED, ids=str)
def test_a_loop_over_repeated_timesteps_takes_all_steps(name, config, arguments):
    """The steps are those of diffusers from a begin index of 0, and bit for bit ours from there; a second run, too."""
    theirs, ours = repeated(name, config, arguments)
    given, count = copy.deepcopy(ours), len(ours.timesteps)
    assert ours.timesteps.tolist().count(ours.timesteps[0]) > 1
    for _ in range(2):
        for scheduler in (theirs, given):
            scheduler.set_begin_index(0)
        steps = walk(theirs, ours, ours.timesteps)
        assert len(steps) == ours.step_index == count and ours.begin_index is None
        for i, (x, result) in enumerate(steps):
            # The history is diffusers' along that walk.
            given.scale_model_input(x, ours.timesteps[i])
            assert given.step_index in (None, i)
            after = given.step(normal(50 + i), ours.timesteps[i], x).prev_sample
            assert name == "dpmsolver" and theirs.config.solver_order == 2 or torch.equal(after, result)
        with pytest.raises(InputError, match=f"all {count} steps of the schedule are done; call set_timesteps"):
            ours.step(x, ours.timesteps[-1], x)
        for scheduler in (theirs, ours, given):
            scheduler.set_timesteps(**arguments)


@pytest.mark.parametrize(("name", "config", "arguments"), REPEATED, ids=str)
def test_repeated_timesteps_given_by_value_are_diffusers(name, config, arguments):
    """The run begins at the second; an early end names the timestep and the begin index that cures it."""
    theirs, ours = repeated(name, config, arguments)
    number, count, values = ours.timesteps[0].item(), len(ours.timesteps), [t.clone() for t in ours.timesteps]
    walk(theirs, ours, values[:-1])
    x = normal(0)
    message = rf"after {count - 1} steps, not {count}.* repeated timestep {number},.* position 1;.* set_begin_index\(0\)"
    with pytest.raises(InputError, match=message):
        ours.step(x, values[-1], x)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(**arguments)
        scheduler.set_begin_index(0)
    assert len(walk(theirs, ours, values)) == count


@pytest.mark.parametrize(("first", "begins"), [(1, 1), (2, 1), (3, 4), (4, 4), (5, 5)])
@pytest.mark.parametrize("name", ["euler", "dpmsolver"])
def test_a_start_in_the_middle_of_repeated_timesteps(name, first, begins):
    """It is where diffusers starts: at the noise level of add_noise. A warning appears where the loop's position differs."""
    config = {} if name == "euler" else {"solver_order": 1}
    theirs, ours = repeated(name, config, {"timesteps": [900, 900, 900, 500, 500, 3]})
    with mock.patch.object(common._LOGGER, "warning") as warned:
        walk(theirs, ours, ours.timesteps[first : first + 1])
    assert ours.step_index == begins + 1
    said = [call.args[0] for call in warned.call_args_list if "set_begin_index" in call.args[0]]
    assert len(said) == (first != begins) and all(f"set_begin_index({first})" in text for text in said)
    image, noise, t = normal(1), normal(2), ours.timesteps[first : first + 1]
    theirs, ours = repeated(name, config, {"timesteps": [900, 900, 900, 500, 500, 3]})
    assert torch.equal(ours.add_noise(image, noise, t), theirs.add_noise(image, noise, t))
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(first)
    assert len(walk(theirs, ours, ours.timesteps[first:])) == 6 - first


def test_dpmsolver_unknown_timestep_means_the_last():
    theirs, ours = pair("dpmsolver", 10)
    compare(theirs, ours, normal(1), 123, normal(0))
    assert ours.step_index == theirs.step_index == 10


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample_dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_dtypes_and_accuracy(name, sample_dtype, output_dtype, monkeypatch):
    """diffusers' dtypes; float32 arithmetic (float64 for float64) that is rounded once to the dtype of storage."""
    for module in (scheduling_ddim, scheduling_ddpm, common):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: normal(9, dtype=output_dtype))
    for prediction in PREDICTIONS:
        theirs, ours = pair(name, 10, prediction_type=prediction)
        options = {"eta": 0.5} if name == "ddim" else {}
        x = (normal(0) * float(theirs.init_noise_sigma)).to(sample_dtype)
        for i, t in enumerate(ours.timesteps[:3]):
            for scheduler in (theirs, ours):
                scheduler.scale_model_input(x, t)
            output = output_at(theirs, i, x.double(), prediction).to(output_dtype)
            after_ours = copy.copy(theirs)
            after_ours.model_outputs = list(getattr(ours, "model_outputs", []))
            for attribute in kept(theirs):
                if hasattr(ours, attribute):
                    # An assignment makes it an operand of our next step, too, and not a part of the state.
                    setattr(ours, attribute, getattr(ours, attribute))
                    setattr(after_ours, attribute, getattr(ours, attribute))
            formula = diffusers_bound(with_tables(after_ours, Rounded), output, t, x, **options)
            expected = theirs.step(output, t, x, return_dict=False, **options)
            result, fused = fused_step(ours, output, t, x, **options)
            for ours_value, theirs_value, exact, own in zip(result, expected, formula, fused):
                assert ours_value.dtype == theirs_value.dtype
                bound = own.error + FLOAT64 * exact.error
                assert_within(ours_value, exact.value, bound + storage(abs(exact.value) + bound, ours_value.dtype))
            if hasattr(theirs, "model_outputs"):
                histories = [[None if m is None else m.dtype for m in s.model_outputs] for s in (theirs, ours)]
                assert histories[0] == histories[1] and theirs.lower_order_nums == ours.lower_order_nums
            x = expected[0].to(sample_dtype)


def test_noise_wider_than_the_state():
    """diffusers promotes the next state to the noise's dtype, but not x0."""
    theirs, ours = pair("ddim", 10)
    x, output, noise = normal(0, dtype=torch.float16), normal(1, dtype=torch.float16), normal(2)
    expected, result = (s.step(output, 900, x, eta=1.0, variance_noise=noise, return_dict=False) for s in (theirs, ours))
    wide = ours.step(output.float(), 900, x.float(), eta=1.0, variance_noise=noise).prev_sample
    assert [t.dtype for t in result] == [t.dtype for t in expected] == [torch.float32, torch.float16]
    assert torch.equal(result[0], wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_euler_without_x0_is_the_same(dtype):
    """Without x0, half-precision states are not widened in memory; the arithmetic is float32 either way."""
    results = []
    for wanted in (True, False):
        _, ours = pair("euler", 10)
        ours.set_step_options(return_x0=wanted)
        x = (normal(0) * float(ours.init_noise_sigma)).to(dtype)
        ours.scale_model_input(x, ours.timesteps[0])
        results.append(ours.step(normal(1, dtype=dtype), ours.timesteps[0], x).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 3, 7, 5), (2, 1, 3, 4, 5), (0, 3, 4, 4)])
def test_shapes(name, shape):
    _, ours = pair(name, 10)
    t, x, output = ours.timesteps[3], normal(0, shape), normal(1, shape)
    result = ours.step(output, t, x, **taken(ours, torch.Generator().manual_seed(0))).prev_sample
    assert result.shape == shape
    if name == "ddpm" and len(shape) == 1:
        # diffusers itself looks for a dimension of channels.
        x, output = x[:, None], output[:, None]
    step = compare(*pair(name, 10), output, t, x, torch.Generator().manual_seed(0))
    assert torch.equal(result, step.ours[0].reshape(shape))


def test_tensors_that_do_not_match():
    """A sample without a batch and a broadcast output are left to diffusers; another device is refused."""
    theirs, ours = pair("ddim", 10)
    for x, output in ((normal(0, ()), normal(1, ())), (normal(0), normal(1, (3, 8, 8)))):
        with pytest.warns(UserWarning, match="shape"):
            result = copy.deepcopy(ours).step(output, 500, x).prev_sample
        assert torch.equal(result, theirs.step(output, 500, x).prev_sample)
    with pytest.raises(InputError, match="model_output"):
        ours.step(normal(1).to("meta"), 500, normal(0))


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name):
    """Channels-last states stay so; expanded and transposed ones are right."""
    _, ours = pair(name, 10)
    t, x, output = ours.timesteps[-1], normal(0), normal(1)
    dense = copy.deepcopy(ours).step(output, t, x).prev_sample
    last = copy.deepcopy(ours).step(output, t, x.to(memory_format=torch.channels_last)).prev_sample
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, dense)
    turned = copy.deepcopy(ours).step(output.transpose(2, 3), t, x.transpose(2, 3)).prev_sample
    assert torch.equal(turned.transpose(2, 3), dense)
    repeated = copy.deepcopy(ours).step(output[:1].expand(2, -1, -1, -1), t, x[:1].expand(2, -1, -1, -1)).prev_sample
    assert torch.equal(repeated[1], dense[0])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_signatures_are_diffusers(name):
    published, fused = PAIRS[name]
    for method in ("__init__", "step", "set_timesteps", "scale_model_input", "add_noise"):
        assert list(inspect.signature(getattr(fused, method)).parameters) == list(
            inspect.signature(getattr(published, method)).parameters
        )
        if method == "step":
            defaults = [[p.default for p in inspect.signature(kind.step).parameters.values()] for kind in (published, fused)]
            assert defaults[0] == defaults[1]
    theirs, ours = pair(name, 10)
    x, output, t = normal(0), normal(1), ours.timesteps[0]
    expected, result = (s.step(output, t, x) for s in (theirs, ours))
    assert type(expected) is type(result) and list(expected.keys()) == list(result.keys())
    theirs, ours = pair(name, 10)
    expected, result = (s.step(output, t, x, return_dict=False) for s in (theirs, ours))
    assert isinstance(result, tuple) and len(result) == len(expected)


# Cases that the kernel does not cover: scheduler, configuration, arguments of step, and a word of the reason.
FALLBACKS = [
    ("ddim", {"thresholding": True}, {}, "thresholding"),
    ("ddim", {}, {"eta": -0.5}, "eta"),
    ("ddpm", {"thresholding": True}, {}, "thresholding"),
    ("ddpm", {"variance_type": "learned"}, {}, "learned"),
    ("ddpm", {"variance_type": "learned_range"}, {}, "learned_range"),
    ("ddpm", {"variance_type": "fixed_large_log"}, {}, "fixed_large_log"),
    ("euler", {}, {"s_churn": 2.0}, "s_churn"),
    ("dpmsolver", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}, "algorithm_type"),
    ("dpmsolver", {"algorithm_type": "sde-dpmsolver++"}, {}, "algorithm_type"),
    ("dpmsolver", {"solver_order": 3}, {}, "solver_order 3"),
    ("dpmsolver", {"thresholding": True}, {}, "thresholding"),
    ("dpmsolver", {"variance_type": "learned"}, {}, "learned"),
    ("unipc", {"predict_x0": False}, {}, "predict_x0=False"),
    ("unipc", {"solver_p": DDIMScheduler()}, {}, "solver_p"),
    ("unipc", {"solver_order": 4}, {}, "solver_order 4"),
    ("unipc", {"thresholding": True}, {}, "thresholding"),
    ("unipc", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, {}, "v_prediction"),
    ("unipc", {"prediction_type": "flow_prediction"}, {}, "flow_prediction"),
    ("deis", {"thresholding": True}, {}, "thresholding"),
    ("deis", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, {}, "v_prediction"),
    ("deis", {"prediction_type": "flow_prediction"}, {}, "flow_prediction"),
]


@pytest.mark.parametrize(("name", "config", "arguments", "word"), FALLBACKS)
def test_uncovered_configurations_run_diffusers_code(name, config, arguments, word):
    """Results equal bit for bit, as do the generators' states, and there is one warning in all."""
    theirs, ours = pair(name, 6, **config)
    learned = str(config.get("variance_type")).startswith("learned")
    results, states = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scheduler in (theirs, ours):
            x, generator = normal(0), torch.Generator().manual_seed(3)
            for i, t in enumerate(scheduler.timesteps):
                scheduler.scale_model_input(x, t)
                output = normal(50 + i)
                if learned:
                    # The variance comes as extra channels; a learned one is positive.
                    output = torch.cat([output, output.abs()], 1)
                x = scheduler.step(output, t, x, **taken(scheduler, generator), **arguments).prev_sample
            results.append(x)
            states.append(generator.get_state())
    assert torch.equal(results[0].nan_to_num(7), results[1].nan_to_num(7)) and torch.equal(*states)
    own_warnings = [str(w.message) for w in caught if "runs diffusers' own code" in str(w.message)]
    assert len(own_warnings) == 1 and word in own_warnings[0] and type(ours).__qualname__ in own_warnings[0]
    assert all(w.filename == __file__ for w in caught if "runs diffusers' own code" in str(w.message))


def test_a_variance_type_changed_after_construction():
    theirs, ours = pair("ddpm", 10)
    theirs.variance_type = ours.variance_type = "fixed_small_log"
    with pytest.warns(UserWarning, match="variance_type"):
        results = [s.step(normal(1), 900, normal(0), torch.Generator().manual_seed(0)).prev_sample for s in (theirs, ours)]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_epsilon_at_zero_terminal_snr_runs_diffusers_code(name):
    """x0 is infinite there, and clipped; the steps after it are fused."""
    theirs, ours = pair(name, 10, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    x, output = normal(0), normal(1)
    with pytest.warns(UserWarning, match="alpha_bar = 0"):
        results = [s.step(output, 999, x, generator=torch.Generator().manual_seed(0)) for s in (theirs, ours)]
    assert torch.equal(results[0].prev_sample, results[1].prev_sample)
    assert results[1].pred_original_sample.abs().max() == 1
    ours.step(output, 899, x)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver"])
def test_undefined_steps_run_diffusers_code(name):
    """More noise than a state holds; two equal noise levels before a second-order step. diffusers is not finite in both."""
    theirs, ours = pair(name, 4)
    x, output, arguments = normal(0), normal(1), {"eta": 3.0} if name == "ddim" else {}
    for scheduler in (theirs, ours):
        if name == "dpmsolver":
            scheduler.sigmas = torch.tensor([5.0, 2.0, 2.0, 1.0, 0.0])
    with pytest.warns(UserWarning, match="eta = 3.0" if name == "ddim" else "log-SNR"):
        for t in ours.timesteps[:3]:
            results = [s.step(output, t, x, **arguments).prev_sample for s in (theirs, ours)]
    assert not any(result.isfinite().any() for result in results)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_a_change_of_path_within_a_run(name):
    """A step whose inputs require a gradient runs diffusers' code between fused ones; the histories fit together."""
    theirs, ours = pair(name, 6)
    results, gradients = [], []
    for scheduler in (theirs, ours):
        x, generator = normal(0) * float(scheduler.init_noise_sigma), torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            output = output_at(theirs, i, x, "epsilon")
            with torch.set_grad_enabled(i == 2), warnings.catch_warnings():
                warnings.simplefilter("ignore" if i == 2 else "error", UserWarning)
                x = scheduler.step(output.requires_grad_(i == 2), t, x, **taken(scheduler, generator)).prev_sample
                if i == 2:
                    gradients.append(torch.autograd.grad(x.sum(), output)[0])
            x = x.detach()
        results.append(x)
    start = normal(0) * float(theirs.init_noise_sigma)
    assert_within(*results, run_bound(*pair(name, 6), start, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_gradient_warning_names_the_remedy():
    _, ours = pair("ddim", 6)
    with torch.enable_grad(), pytest.warns(UserWarning, match="torch.no_grad"):
        ours.step(normal(0).requires_grad_(), 0, normal(1))
    # Under no_grad parameters may require gradients.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.step(normal(0).requires_grad_(), 0, normal(1))


@pytest.mark.parametrize(
    "name, argument, value, others",
    [
        ("ddim", "eta", 0.5, {}),
        ("euler", "s_churn", 1.0, {}),
        ("euler", "s_churn", 0.0, {}),
        ("euler", "s_noise", 1.0, {"s_churn": 1.0}),
    ],
)
@pytest.mark.usefixtures("fallbacks")
def test_gradients_with_respect_to_a_steps_numbers(name, argument, value, others):
    gradients, tangents = [], []
    for scheduler in pair(name, 6):
        start = (scheduler.timesteps[1], scheduler.scale_model_input(normal(0), scheduler.timesteps[1]))

        def total(number):
            scheduler._step_index = None
            generator = torch.Generator().manual_seed(0)
            given = {**others, argument: number}
            return scheduler.step(normal(1), *start, **given, generator=generator).prev_sample.square().sum()

        number = torch.tensor(value, requires_grad=True)
        with torch.enable_grad():
            gradients.append(torch.autograd.grad(total(number), number)[0])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(number.detach(), torch.ones(()))
            tangents.append(torch.autograd.forward_ad.unpack_dual(total(dual)).tangent)
    assert torch.equal(*gradients) and torch.equal(*tangents) and gradients[0] != 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("fallbacks")
def test_derivatives_in_forward_mode_are_diffusers(name):
    tangents = []
    for scheduler in pair(name, 6):
        start = (scheduler.timesteps[1], scheduler.scale_model_input(normal(0), scheduler.timesteps[1]))

        def step(output):
            return scheduler.step(output, *start, **taken(scheduler, torch.Generator().manual_seed(0))).prev_sample

        tangents.append(torch.func.jvp(step, (normal(1),), (normal(2),))[1])
    assert torch.equal(*tangents) and tangents[0].abs().max() > 0


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float32])
@pytest.mark.usefixtures("fallbacks")
def test_timesteps_of_every_width(name, dtype):
    """They work in diffusers' own code, too, which would index with them."""
    for config in ({}, {"thresholding": True, "prediction_type": "v_prediction"}):
        results = []
        for kind in (torch.int64, dtype):
            scheduler = PAIRS[name][1](**config)
            scheduler.set_timesteps(1000)
            generator = torch.Generator().manual_seed(0)
            results.append(scheduler.step(normal(0), torch.tensor(100, dtype=kind), normal(1), generator=generator).prev_sample)
        assert torch.equal(*results)
    for timestep in (torch.tensor(3.0).to(torch.float8_e4m3fn), torch.tensor(True), numpy.True_):
        with pytest.raises(InputError, match="timestep"):
            scheduler.step(normal(0), timestep, normal(1))


def test_a_history_that_requires_a_gradient():
    """DPM-Solver++'s x0 of the step before carries its graph into the next step, as in diffusers."""
    gradients = []
    for scheduler in pair("dpmsolver", 6):
        output = normal(1)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step(output.requires_grad_(), scheduler.timesteps[0], normal(0))
            second = scheduler.step(normal(2), scheduler.timesteps[1], normal(0)).prev_sample
            gradients.append(torch.autograd.grad(second.sum(), output)[0])
    assert torch.equal(*gradients) and gradients[0].abs().min() > 0


PHILOX = {"ddim": {"eta": 0.8}, "ddpm": {}}


@pytest.mark.parametrize("name", sorted(PHILOX))
def test_noise_from_counters(name, monkeypatch):
    """Noise is a function of (seed, index, position in the schedule) instead of a generator, to 2e-6 on every backend."""
    _, ours = pair(name, 5)
    other = copy.deepcopy(ours)
    indices = torch.tensor([7, 2**33])
    ours.set_step_options(seed=11, indices=(given_indices := indices.clone()))
    ours.set_timesteps(5)
    given_indices.zero_()
    x = normal(0)
    for i, t in enumerate(ours.timesteps):
        output = network_at(ours, x, t, "epsilon")
        noise = philox_normal(11, indices, SHAPE[1:], stream="step", step=i)
        monkeypatch.setattr(common, "randn_tensor", lambda *args, **options: noise)
        (expected, _), given = fused_step(other, output, t, x, **PHILOX[name])
        (x, _), drawn = fused_step(ours, output, t, x, **PHILOX[name])
        assert_within(x, expected, given[0].error + drawn[0].error)
    # A sample's noise does not depend on its batch; samples and seeds differ.
    t = ours.timesteps[0]

    def single(seed, index):
        ours.set_step_options(seed=seed, indices=range(index, index + 1))
        return ours.step(normal(1, (1, 3, 8, 8)), t, normal(0, (1, 3, 8, 8)), **PHILOX[name]).prev_sample

    ours.set_step_options(seed=11)
    both = ours.step(normal(1, (1, 3, 8, 8)).repeat(2, 1, 1, 1), t, normal(0, (1, 3, 8, 8)).repeat(2, 1, 1, 1), **PHILOX[name])
    assert torch.equal(both.prev_sample[1:], single(11, 1))
    assert gap(single(11, 1), single(11, 2)) > 0.01 < gap(single(11, 1), single(12, 1))


def test_step_options():
    theirs, ours = pair("ddim", 5)
    x, output = normal(0), normal(1)
    ours.set_step_options(return_x0=False)
    result = ours.step(output, 0, x)
    assert result.pred_original_sample is None and ours.step(output, 0, x, return_dict=False)[1] is None
    assert torch.equal(result.prev_sample, compare(*pair("ddim", 5), output, 0, x).ours[0])
    assert "seed" not in ours.config and ours.set_step_options() is ours
    for options, name in (
        ({"backend": "fast"}, "backend"),
        ({"seed": -1}, "seed"),
        ({"indices": range(2)}, "seed"),
        ({"seed": 0, "indices": [0, 1]}, "indices"),
    ):
        with pytest.raises(InputError, match=name):
            ours.set_step_options(**options)
    ours.set_step_options(seed=0)
    compare(theirs, ours, output, 800, x)
    with pytest.raises(InputError, match="generator"):
        ours.step(output, 800, x, eta=1.0, generator=torch.Generator())
    with pytest.raises(InputError, match="variance_noise"):
        ours.step(output, 800, x, eta=1.0, variance_noise=x)
    with pytest.raises(InputError, match="timestep"):
        ours.step(output, 801, x, eta=1.0)
    ours.set_step_options(seed=0, indices=range(3))
    with pytest.raises(InputError, match="indices"):
        ours.step(output, 800, x, eta=1.0)
    with torch.enable_grad(), pytest.raises(InputError, match="seed"):
        ours.step(output.clone().requires_grad_(), 800, x)


def test_a_backend_asked_for_by_name_runs_or_raises():
    _, ours = pair("ddim", 5)
    ours.set_step_options(backend="reference")
    ours.step(normal(0), 0, normal(1))
    with pytest.raises(BackendUnavailableError):
        ours.set_step_options(backend="cuda").step(normal(0), 0, normal(1))
    ours.register_to_config(thresholding=True)
    with pytest.raises(InputError, match="backend"):
        ours.step(normal(0), 0, normal(1))


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_outside_the_schedule(name):
    x = normal(0)
    for bad in (1000.0, -1.0, 1e9) if name == "euler" else (1000, -1, torch.tensor(5000)):
        with pytest.raises(InputError, match="timestep"):
            pair(name, 10)[1].step(x, bad, x)
    if name in ("ddim", "ddpm"):
        for bad in (0.5, torch.tensor([1, 2]), "500", float("nan")):
            with pytest.raises(InputError, match="timestep"):
                pair(name, 10)[1].step(x, bad, x)
    if name in ("ddpm", "euler", "heun"):
        _, ours = pair(name, 10)
        with pytest.raises(InputError, match="timestep"):
            ours.step(x, 123 if name == "ddpm" else 123.0, x)
    if name not in ("ddim", "ddpm"):
        _, ours = pair(name, 2)
        for t in ours.timesteps:
            x = ours.step(ours.scale_model_input(x, t), t, x).prev_sample
        with pytest.raises(InputError, match="set_timesteps"):
            ours.step(x, t, x)
    if name in ("euler", "heun"):
        with pytest.raises(InputError, match="timestep"):
            pair(name, 10)[1].scale_model_input(x, 123.0)


@pytest.mark.parametrize("steps", [20, 1000])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_schedule_that_an_offset_moves_beyond_training(name, steps):
    """With as many steps as training and an offset, the message names both, and each remedy works."""
    config, x = {"num_train_timesteps": steps, "timestep_spacing": "leading"}, normal(0)
    _, ours = pair(name, steps, steps_offset=1, **config)
    for t in (ours.timesteps[0], ours.timesteps[0].clone(), torch.tensor([steps]), steps, numpy.int64(steps)):
        with pytest.raises(InputError, match="timestep") as caught:
            ours.step(x, t, x)
        message = str(caught.value)
        assert f"timestep {steps} is an element of scheduler.timesteps, but outside [0, {steps})" in message
        assert "must be an element" not in message
        assert f"steps_offset=1 with num_inference_steps={steps}" in message
        assert f"take steps_offset=0 or num_inference_steps={steps - 1}" in message
    # The rest of the schedule works, and for a timestep in neither the message gives the bounds of its own schedule.
    assert torch.isfinite(ours.step(x, ours.timesteps[1], x).prev_sample).all()
    with pytest.raises(InputError, match=f"must be an element of scheduler.timesteps, got {steps + 7}"):
        ours.step(x, steps + 7, x)
    for _, mended in (pair(name, steps - 1, steps_offset=1, **config), pair(name, steps, **config)):
        assert torch.isfinite(mended.step(x, mended.timesteps[0], x).prev_sample).all()


def test_a_schedule_outside_training_without_an_offset():
    _, ours = pair("ddim", 10)
    ours.timesteps = torch.tensor([1200, 500, -3])
    for t in (0, 2):
        with pytest.raises(InputError, match=r"is an element of .*, but outside \[0, 1000\).*set timesteps within"):
            ours.step(normal(0), ours.timesteps[t], normal(0))
    with pytest.raises(InputError, match="steps_offset=-1.*take steps_offset=0$"):
        pair("ddim", 10, steps_offset=-1)[1].step(normal(0), -1, normal(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bad", [float("nan"), torch.tensor(float("nan")), "500", None, True, torch.tensor(True), torch.tensor([1, 2, 3]), [900], 5j]
)
def test_values_that_are_no_timesteps(name, bad):
    """Every scheduler refuses these; Euler refuses integers, and with them True, in diffusers' words."""
    _, ours = pair(name, 10)
    with pytest.raises(ValueError if name == "euler" else InputError, match="timestep"):
        ours.step(normal(0), bad, normal(0))


def test_a_message_names_no_range_that_the_schedule_leaves():
    _, ours = pair("euler", 10, timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(InputError, match=r"must be an element of scheduler.timesteps, got 2000.0$"):
        ours.step(normal(0), 2000.0, normal(0))
    with pytest.raises(InputError, match=r"must be an element of scheduler.timesteps, in \[0, 1000\), got 2000.0$"):
        pair("euler", 10)[1].step(normal(0), 2000.0, normal(0))


def test_a_schedule_may_leave_the_range():
    """Euler's timesteps may be log sigmas, or reach T by an offset: any element of the schedule is accepted."""
    for config in (
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ):
        _, ours = pair("euler", 1000 if "steps_offset" in config else 10, **config)
        t = float(ours.timesteps[0 if "steps_offset" in config else -1])
        assert not 0 <= t < 1000
        x = ours.scale_model_input(normal(0), t)
        assert torch.isfinite(ours.step(x, t, x).prev_sample).all()


def test_errors_of_diffusers_stay():
    x = normal(0)
    for name in ("ddim", "dpmsolver", "unipc", "deis"):
        with pytest.raises(ValueError, match="set_timesteps"):
            pair(name, 0)[1].step(x, 0, x)
    with pytest.raises(ValueError, match="integer"):
        pair("euler", 5)[1].step(x, 0, x)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        pair("ddim", 5)[1].step(x, 0, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


@pytest.mark.parametrize("name", NAMES)
def test_steps_do_not_read_tensors(name, monkeypatch):
    """After the first step of a run the host reads no tensor: on a GPU that would synchronize with the device."""
    _, ours = pair(name, 6)
    ours.set_step_options(seed=0)
    x, timesteps = normal(0), list(ours.timesteps)
    arguments = {"eta": 1.0} if name == "ddim" else {}
    ours.scale_model_input(x, timesteps[0])
    x = ours.step(normal(1), timesteps[0], x, **arguments).prev_sample
    for method in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, lambda *args, **options: pytest.fail("a tensor is read"))
    for t in timesteps[1:]:
        x = ours.step(x, t, x, **arguments).prev_sample
    monkeypatch.undo()
    assert torch.isfinite(x).all()


def written_by_numpy(tensor):
    array = tensor.numpy()
    array *= 0.9


@torch.inference_mode()
def written_in_inference_mode(tensor):
    tensor.mul_(0.9)


WRITES = {
    "in place": lambda tensor: tensor.mul_(0.9),
    "data": lambda tensor: tensor.data.mul_(0.9),
    "numpy": written_by_numpy,
    "inference mode": written_in_inference_mode,
}


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_tables_follow_what_they_come_from(name, write, made_in_inference_mode):
    """A schedule or configuration that is replaced, or written to in any way, takes effect."""
    if made_in_inference_mode and write == "in place":
        pytest.skip("PyTorch refuses it outside inference mode")
    with torch.inference_mode(made_in_inference_mode):
        theirs, ours = pair(name, 10)
        for scheduler in (theirs, ours):
            for table in ("sigmas", "alphas_cumprod"):
                if hasattr(scheduler, table):
                    setattr(scheduler, table, getattr(scheduler, table).clone())
    x, output, generator = normal(0), normal(1), torch.Generator()

    def both():
        published = copy.deepcopy(theirs)
        for scheduler in (published, ours):
            if hasattr(scheduler, "sigmas"):
                scheduler._step_index, scheduler.lower_order_nums = None, 0
                scheduler.set_begin_index(4)
                scheduler.scale_model_input(x, scheduler.timesteps[4])
        return compare(published, ours, output, ours.timesteps[4], x, generator.manual_seed(0)).ours[0]

    first = both()
    for scheduler in (theirs, ours):
        WRITES[write](getattr(scheduler, "sigmas" if hasattr(scheduler, "sigmas") else "alphas_cumprod"))
    second = both()
    for scheduler in (theirs, ours):
        scheduler.register_to_config(prediction_type="v_prediction")
    third = both()
    assert gap(first, second) > 1e-3 < gap(second, third)


def test_tables_do_not_pile_up():
    """A different eta for every step needs a table each; old ones are dropped."""
    _, ours = pair("ddim", 5)
    for i in range(50):
        ours.step(normal(1), 800, normal(0), eta=i / 50)
        assert len(ours._kept) <= step_tables.VARIANTS


@pytest.mark.parametrize("write", [lambda t: t.add_(-7), lambda t: t.data.add_(-7), lambda t: t.numpy().__isub__(7)])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_written_timesteps_are_followed(name, write):
    """An element's position refers to the written list, and so does the noise's."""
    theirs, ours = pair(name, 10)
    x, output = normal(0), normal(1)
    for scheduler in (theirs, ours):
        scheduler.step(output, scheduler.timesteps[3], x)
        write(scheduler.timesteps)
    if name == "ddpm":
        theirs.custom_timesteps = ours.custom_timesteps = True
    compare(theirs, ours, output, ours.timesteps[3], x, torch.Generator().manual_seed(0))


def test_a_written_final_alpha_is_followed():
    theirs, ours = pair("ddim", 10, set_alpha_to_one=False)
    for _ in range(2):
        compare(theirs, ours, normal(1), 0, normal(0))
        for scheduler in (theirs, ours):
            scheduler.final_alpha_cumprod.data.mul_(0.5)


@pytest.mark.parametrize("other", [*DEFAULTS, "inference mode"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_elsewhere_changes_no_step(name, other):
    """Under another default dtype or device, or in inference mode, it gives equal states and tables that serve everywhere."""
    options, start, output = {"eta": 1.0} if name == "ddim" else {}, normal(0), normal(1)

    def last_state(scheduler):
        scheduler.set_timesteps(6)
        x = start
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, **options).prev_sample
        return x

    reference, ours = (PAIRS[name][1]().set_step_options(seed=3) for _ in range(2))
    wanted = last_state(reference)
    with torch.inference_mode() if other == "inference mode" else other_default(other):
        found = last_state(ours)
    assert (found.device, found.dtype) == (wanted.device, wanted.dtype) and torch.equal(found, wanted)
    tables = [table for table in ours._kept.values() if isinstance(table, step_tables.Table)]
    rows = [row for table in tables for rows in table._rows.values() for row in rows]
    assert rows and not any(row.is_inference() or row.is_meta for row in rows)
    assert torch.equal(last_state(ours), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode(name):
    """Schedulers are made and stepped in inference mode, through two schedules."""
    bounds = []
    for steps in (5, 4):
        theirs, ours = pair(name, steps)
        x = normal(0) * float(theirs.init_noise_sigma)
        bounds.append(run_bound(theirs, ours, x, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        theirs, ours = pair(name, 5)
        for steps, bound in zip((5, 4), bounds):
            results = []
            for scheduler in (theirs, ours):
                scheduler.set_timesteps(steps)
                x = normal(0) * float(scheduler.init_noise_sigma)
                results.append(run(scheduler, x, generator=torch.Generator().manual_seed(0)))
            assert_within(*results, bound)


@pytest.mark.parametrize("name", NAMES)
def test_files_name_diffusers_class(name, tmp_path):
    """A saved scheduler loads without advkd, and back into the fused class; objects can be pickled and copied."""
    published, fused = PAIRS[name]
    ours = fused(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == published.__name__
    for kind in (published, fused):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is kind and again.config.beta_schedule == "scaled_linear"
    assert type(pickle.loads(pickle.dumps(ours))) is fused and type(copy.deepcopy(ours)) is fused
    assert repr(ours).startswith(fused.__qualname__ + " {") and fused.__qualname__.startswith("Fused")


@pytest.mark.parametrize("name", NAMES)
def test_from_the_configuration_of_any_scheduler(name, caplog):
    published, fused = PAIRS[name]
    for other in NAMES:
        for kind in PAIRS[other]:
            config = kind(beta_schedule="scaled_linear", num_train_timesteps=500).config
            result, expected = fused.from_config(config), published.from_config(config)
            assert torch.equal(result.alphas_cumprod, expected.alphas_cumprod) and len(result) == 500
            keys = set(expected.config) - {"_use_default_values"}
            assert {k: result.config[k] for k in keys} == {k: expected.config[k] for k in keys}
    assert set(result.compatibles) == set(expected.compatibles)
    assert "ignored" not in caplog.text


def test_users_subclasses_keep_their_names():
    class Mine(FusedDDIMScheduler):
        pass

    assert Mine().__module__ == __name__ and json.loads(Mine().to_json_string())["_class_name"] == "Mine"


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_in_a_pipeline(name, tmp_path):
    """The drop-in line, a run, a saved pipeline that plain diffusers loads, and the fused scheduler put back."""
    published, fused = PAIRS[name]
    kind = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}[name]
    pipe = kind(tiny_unet(), published())
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np", **({"eta": 0.5} if name == "ddim" else {})}
    theirs, ours = pair(name, 5)
    pipe.scheduler = fused.from_config(pipe.scheduler.config)

    def compared(*arguments, **step_options):
        return SimpleNamespace(prev_sample=compare(theirs, ours, *arguments, **step_options).ours[0])

    with mock.patch.object(pipe.scheduler, "step", compared):
        stepwise = pipe(generator=torch.Generator().manual_seed(0), **options).images
    assert numpy.array_equal(pipe(generator=torch.Generator().manual_seed(0), **options).images, stepwise)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", published.__name__]
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is published
    back = DDPMPipeline.from_pretrained(tmp_path, scheduler=fused.from_pretrained(tmp_path, subfolder="scheduler"))
    assert type(back.scheduler) is fused


def test_import_is_not_paid_for_by_others():
    code = "import sys, advkd, advkd.diffusion.coefficients; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=process_environment()).returncode == 0


def test_coefficients_by_hand():
    """The numbers are simple: alpha_bar 0.64 to 0.8 (signal 0.8, noise 0.6), sigma 2 to 1."""
    # A few roundings of 2^-53, and differences that are at least a tenth of their terms.
    close = functools.partial(pytest.approx, rel=1e-14, abs=1e-15)
    assert x0_coefficients(0.64, "epsilon") == close((1.25, -0.75))
    assert x0_coefficients(0.64, "v_prediction") == close((0.8, -0.6))
    assert noise_coefficients(0.64, "sample") == close((1 / 0.6, -0.8 / 0.6))
    step = ddim_coefficients(0.64, 0.8, "epsilon", eta=1.0)
    variance = 0.2 / 0.36 * (1 - 0.64 / 0.8)
    assert (step.c_0, step.c_m, step.c_z) == close((0.8**0.5, (0.2 - variance) ** 0.5, variance**0.5))
    # DDIM with eta = 1 is DDPM with the small variance, once the noise is expressed by x and x0.
    same, ddpm = ddim_coefficients(0.64, 0.8, "sample", eta=1.0), ddpm_coefficients(0.64, 0.8, "sample")
    assert (same.c_0 + same.c_m, same.c_x, same.c_z) == close((ddpm.c_0, ddpm.c_x, ddpm.c_z))
    clipped = ddim_coefficients(0.64, 0.8, "epsilon", clipped_eps=True)
    assert (clipped.c_0, clipped.c_x, clipped.c_m) == close((0.8**0.5 - 0.2**0.5 * 0.8 / 0.6, 0.2**0.5 / 0.6, 0))
    assert ddpm_coefficients(0.64, 0.8, "sample", "fixed_large").c_z == close(0.2**0.5)
    assert ddpm_coefficients(0.64, 0.8, "sample", noisy=False).c_z == 0
    euler = euler_coefficients(2.0, 1.0, "sample")
    assert (euler.c_0, euler.c_x) == (0.5, 0.5)
    # To sigma = 0 both solvers return x0 exactly, and first-order DPM-Solver++ is deterministic DDIM.
    for last in (euler_coefficients(2.0, 0.0, "sample"), dpmsolver_coefficients(2.0, 0.0, "sample")):
        assert (last.c_0, last.c_x, last.c_h) == (1, 0, 0)
    first = dpmsolver_coefficients(0.75, 0.5, "sample")
    ddim = ddim_coefficients(0.64, 0.8, "sample")
    assert (first.c_0, first.c_x) == close((ddim.c_0 + ddim.c_m, ddim.c_x))
    # Equal gaps h: D1 = x0 - x0_prev, and half of the first-order weight goes to it.
    second = dpmsolver_coefficients(0.5, 0.25, "sample", 1.0)
    weight = dpmsolver_coefficients(0.5, 0.25, "sample").c_0
    assert (second.c_0, second.c_h) == close((1.5 * weight, -0.5 * weight))
    # Equal noise levels leave the state alone, as the last step of Karras sigmas to sigma_min does.
    for kind in ("midpoint", "heun"):
        still = dpmsolver_coefficients(0.5, 0.5, "sample", 1.0, kind)
        assert (still.c_0, still.c_x, still.c_h) == close((0, 1, 0))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: ddim_coefficients(0.0, 0.1, "epsilon"), "alpha_bar = 0"),
        (lambda: ddim_coefficients(1.0, 1.0, "sample"), "alpha_bar = 1"),
        (lambda: ddim_coefficients(0.64, 0.8, "epsilon", eta=2.0), "eta"),
        (lambda: ddim_coefficients(0.8, 0.64, "epsilon", eta=1.0), "alpha_bar"),
        (lambda: ddim_coefficients(0.64, 0.8, "flow_prediction"), "prediction"),
        (lambda: ddpm_coefficients(0.64, 0.8, "epsilon", "learned"), "variance_type"),
        (lambda: euler_coefficients(0.0, 0.0, "epsilon"), "sigma"),
        (lambda: euler_coefficients(1.0, 0.0, "noise"), "prediction"),
        (lambda: dpmsolver_coefficients(0.0, 0.0, "epsilon"), "sigma"),
        (lambda: dpmsolver_coefficients(1.0, 0.5, "epsilon", 1.0), "log-SNR"),
        (lambda: dpmsolver_coefficients(1.0, 0.0, "epsilon", 2.0), "log-SNR"),
        (lambda: dpmsolver_coefficients(1.0, 0.5, "epsilon", 2.0, "bh1"), "solver_type"),
        (lambda: dpmsolver_coefficients(1.0, 0.5, "flow_prediction", flow=True), "signal"),
    ],
)
def test_undefined_coefficients_are_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
