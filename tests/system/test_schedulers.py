"""The fused schedulers against diffusers' own: single steps, whole runs, bookkeeping, fallbacks, files and pipelines.

Tolerances: ``prev_sample`` of DDIM, Euler and DPM-Solver++ to 1e-6 of max|x|, x0 to 5e-5 of max(1, |x0|), DDPM to 2e-4 of
diffusers (whose 1 - a_t / a_s cancels in float32) and 1e-6 of the formula in float64, which is diffusers' own code on float64
tables.
"""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
import warnings

import numpy
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm  # noqa: E402

from advkd import schedulers  # noqa: E402
from advkd.coefficients import (  # noqa: E402
    ddim_coefficients,
    ddpm_coefficients,
    dpmsolver_coefficients,
    euler_coefficients,
    noise_coefficients,
    x0_coefficients,
)
from advkd.errors import BackendUnavailableError, InputError  # noqa: E402
from advkd.ops import philox_normal  # noqa: E402
from advkd.schedulers import (  # noqa: E402
    FusedDDIMScheduler,
    FusedDDPMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerDiscreteScheduler,
)

from ..conftest import process_environment, tiny_unet  # noqa: E402

PAIRS = {
    "ddim": (DDIMScheduler, FusedDDIMScheduler),
    "ddpm": (DDPMScheduler, FusedDDPMScheduler),
    "euler": (EulerDiscreteScheduler, FusedEulerDiscreteScheduler),
    "dpmsolver": (DPMSolverMultistepScheduler, FusedDPMSolverMultistepScheduler),
}
NAMES = sorted(PAIRS)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
SPACINGS = ["leading", "trailing", "linspace"]
SHAPE = (2, 3, 8, 8)

pytestmark = pytest.mark.filterwarnings("error:.*runs diffusers' own code:UserWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(name, steps=10, **config):
    """diffusers' scheduler and ours, ready to run."""
    theirs, ours = (kind(**config) for kind in PAIRS[name])
    if steps:
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
    return theirs, ours


def normal(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, alpha, sigma, prediction):
    """What an almost perfect network says of x = alpha x0 + sigma eps for data N(0.3, 0.2), so that x0 is of order 1."""
    alpha, sigma = float(alpha), float(sigma)
    posterior = 0.3 + alpha * 0.2 / (alpha**2 * 0.2 + sigma**2) * (x - alpha * 0.3) + 0.1 * torch.sin(5 * x)
    eps = (x - alpha * posterior) / sigma
    outputs = {"epsilon": eps, "sample": posterior, "v_prediction": alpha * eps - sigma * posterior}
    return outputs.get(prediction, eps - posterior)


def network_at(scheduler, x, t, prediction):
    a = float(scheduler.alphas_cumprod[int(t)])
    return network(x, math.sqrt(a), math.sqrt(1 - a), prediction)


def exact(theirs):
    """diffusers' code on float64 copies of its float32 tables."""
    scheduler = copy.deepcopy(theirs)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def gap(a, b):
    return float((a.double() - b.double()).abs().max())


def assert_close(ours, theirs, x, prev_floor=0.0, x0_floor=0.0):
    """The required tolerances, or the floors derived for a step, where they are larger."""
    assert ours[0].dtype == theirs[0].dtype and torch.isfinite(ours[0]).all()
    assert gap(ours[0], theirs[0]) <= max(1e-6 * float(x.abs().max()), prev_floor)
    if len(theirs) > 1:
        assert ours[1].dtype == theirs[1].dtype
        assert gap(ours[1], theirs[1]) <= max(5e-5 * max(1.0, float(theirs[1].abs().max())), x0_floor)


def ddim_floor(scheduler, t, eta, sizes):
    """How far diffusers' float32 may be from the formula where noise is added; ``sizes`` are max|z| and max|eps|.

    It rounds 1 - a_t / a_s to 2^-24 absolute, hence the variance to eta^2 (1 - a_s) / (1 - a_t) 2^-24, which its two roots, the
    noise's and the direction's, divide by twice themselves. Larger than 1e-6 of max|x| between neighbouring timesteps only.
    """
    if not eta:
        return 0.0
    following = int(t) - 1000 // scheduler.num_inference_steps
    a_t = float(scheduler.alphas_cumprod[int(t)])
    a_s = float(scheduler.alphas_cumprod[following] if following >= 0 else scheduler.final_alpha_cumprod)
    step = ddim_coefficients(a_t, a_s, "epsilon", eta)
    error = 2**-24 * eta**2 * (1 - a_s) / (1 - a_t)
    return sum(error / (2 * root) * size for root, size in zip((step.c_z, step.c_m), sizes) if root)


def follow(theirs, ours, prediction, **arguments):
    """Step both along diffusers' path, comparing every step with it and with float64."""
    x, truth, eta = normal(0), exact(theirs), arguments.get("eta", 0)
    for i, t in enumerate(ours.timesteps):
        output, z = network_at(theirs, x, t, prediction), normal(100 + i)
        noises = [{"variance_noise": noise} if eta else {} for noise in (z, z, z.double())]
        steps = zip((theirs, ours, truth), (output, output, output.double()), (x, x, x.double()), noises)
        expected, result, formula = (s.step(m, t, y, **arguments, **n, return_dict=False) for s, m, y, n in steps)
        assert gap(result[0], formula[0]) <= 1e-6 * float(x.abs().max())
        sizes = (float(z.abs().max()), float(network_at(theirs, x, t, "epsilon").abs().max()))
        assert_close(result, expected, x, ddim_floor(theirs, t, eta, sizes))
        x = expected[0]


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
            x, output = normal(i), normal(50 + i)
            assert_close(ours.step(output, t, x).to_tuple(), theirs.step(output, t, x).to_tuple(), x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_cosine_end(prediction, eta):
    """At alpha_bar = 2.4e-9 diffusers' float32 code is far from its own float64; ours stays at the floor of float32.

    Floor: x0 enters as sqrt(a_s / a_t) (x - sqrt(1 - a_t) eps), a factor of thousands, and each of its two terms takes two
    roundings of 2^-24 (coefficient and product): 4 x 2^-24 x factor x max|x|. The other predictions have no such factor, but
    diffusers' 1 - a_s - sigma^2 cancels for eta = 1.
    """
    theirs, ours = pair("ddim", 10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=prediction)
    for scheduler in (theirs, ours):
        scheduler.register_to_config(clip_sample=False)
    x, noise, t = normal(0), normal(1), 999
    output = network_at(theirs, x, t, prediction)
    truth = exact(theirs).step(output.double(), t, x.double(), eta=eta, variance_noise=noise.double()).prev_sample
    float32, fused = (s.step(output, t, x, eta=eta, variance_noise=noise).prev_sample for s in (theirs, ours))
    factor = math.sqrt(float(theirs.alphas_cumprod[899] / theirs.alphas_cumprod[999])) if prediction == "epsilon" else 1.0
    floor = max(1e-6, 4 * 2**-24 * factor) * float(x.abs().max())
    assert gap(fused, truth) <= floor
    if prediction == "epsilon" or eta == 1:
        assert gap(float32, truth) > 1e-6 * float(x.abs().max())
    else:
        assert_close((fused,), (float32,), x)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction):
    """rescale_betas_zero_snr: alpha_bar = 0 at the start, where v and x0 predictions are well defined."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    theirs, ours = pair("ddim", 10, **config)
    assert float(theirs.alphas_cumprod[-1]) == 0
    follow(theirs, ours, prediction)
    theirs, ours = pair("ddpm", 10, **config)
    x, output = normal(0), normal(1)
    results = [s.step(output, 999, x, torch.Generator().manual_seed(0)).prev_sample for s in (theirs, ours)]
    assert gap(*results) <= 2e-4


def test_any_ddim_timestep():
    """diffusers' DDIM steps from any t to t - T // steps; the schedule is not asked."""
    theirs, ours = pair("ddim", 7)
    for t in (999, 333, 141, 5, 0):
        for timestep in (t, torch.tensor(t), torch.tensor([t]), numpy.int64(t)):
            x, output = normal(t), normal(1)
            assert_close(ours.step(output, timestep, x).to_tuple(), theirs.step(output, t, x).to_tuple(), x)


def ddpm_steps(scheduler, x, output, t, noise, monkeypatch):
    """A DDPM step with the given noise, whoever draws it."""
    for module in (scheduling_ddpm, schedulers):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, dtype=None, **options: noise.to(dtype or noise.dtype))
    return scheduler.step(output, t, x, return_dict=False)


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
def test_ddpm(config, prediction, steps, monkeypatch):
    theirs, ours = pair("ddpm", steps, prediction_type=prediction, **config)
    truth = exact(theirs)
    schedule = theirs.timesteps.tolist()
    for i, t in enumerate([schedule[0], schedule[len(schedule) // 2], schedule[-2], schedule[-1]]):
        x, noise = normal(i), normal(10 + i)
        output = network_at(theirs, x, t, prediction)
        expected = ddpm_steps(theirs, x, output, t, noise, monkeypatch)
        result = ddpm_steps(ours, x, output, t, noise, monkeypatch)
        formula = ddpm_steps(truth, x.double(), output.double(), t, noise, monkeypatch)
        # An epsilon prediction's x0 is (x - sqrt(1 - a_t) eps) / sqrt(a_t): two terms with two roundings each, of the
        # coefficient and of the product.
        a_t, size = float(theirs.alphas_cumprod[t]), float(x.abs().max())
        following = schedule[schedule.index(t) + 1] if t != schedule[-1] else -1
        a_s = float(theirs.alphas_cumprod[following]) if following >= 0 else 1.0
        x0_floor = 4 * 2**-24 / math.sqrt(a_t) * size if prediction == "epsilon" else 0.0
        weight = math.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
        assert gap(result[0], formula[0]) <= max(1e-6 * size, weight * x0_floor)
        assert gap(result[1], formula[1]) <= max(5e-5, x0_floor)
        assert gap(result[0], expected[0]) <= 2e-4
        assert gap(result[1], expected[1]) <= max(5e-5 * max(1.0, float(expected[1].abs().max())), 2 * x0_floor)


def test_ddpm_schedules_of_all_kinds(monkeypatch):
    """Before set_timesteps (t to t - 1), and on custom timesteps: the last one goes to the image."""
    for custom in (None, [900, 500, 499, 20]):
        theirs, ours = pair("ddpm", 0)
        if custom:
            theirs.set_timesteps(timesteps=custom)
            ours.set_timesteps(timesteps=custom)
        for t in custom or [999, 400, 1, 0]:
            x, output, noise = normal(t), normal(1), normal(2)
            expected = ddpm_steps(theirs, x, output, t, noise, monkeypatch)
            assert gap(ddpm_steps(ours, x, output, t, noise, monkeypatch)[0], expected[0]) <= 2e-4
    with pytest.raises(InputError, match="timestep"):
        ours.step(output, 501, x)


def sigma_states(theirs, i, x, prediction):
    """The network's output for a state at position i of a sigma schedule."""
    sigma = theirs.sigmas[i].double()
    if hasattr(theirs, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = theirs._sigma_to_alpha_sigma_t(sigma)
        return network(x, alpha, sigma, prediction)
    # Euler's state is x0 + sigma eps; the network sees it scaled.
    alpha = float(1 / (sigma**2 + 1) ** 0.5)
    return network(x * alpha, alpha, sigma * alpha, prediction)


def follow_sigmas(theirs, ours, prediction, begin=0, factor=None):
    """As ``follow``, for schedulers that count their steps; ``factor(i)`` is the size of a step's terms relative to max|x|."""
    x = normal(0) * float(theirs.sigmas[begin] if theirs.init_noise_sigma != 1 else 1)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(begin)
    for i, t in enumerate(ours.timesteps[begin:], begin):
        for scheduler in (theirs, ours):
            scheduler.scale_model_input(x, t)
        output = sigma_states(theirs, i, x, prediction)
        if hasattr(ours, "model_outputs"):
            ours.model_outputs = list(theirs.model_outputs)
        expected = theirs.step(output, t, x, return_dict=False)
        result = ours.step(output, t, x, return_dict=False)
        assert_close(result, expected, x, 1e-6 * factor(i) * float(x.abs().max()) if factor else 0.0)
        assert (ours.step_index, ours.begin_index) == (theirs.step_index, theirs.begin_index)
        x = expected[0]


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
    """Orders 1 and 2, the lowering of the last order below and above 15 steps, spacings, final sigmas, begin index."""
    cases = [{"timestep_spacing": spacing} for spacing in SPACINGS] + [{"solver_order": 1}]
    cases += [{"final_sigmas_type": "sigma_min", "lower_order_final": low} for low in (True, False)]
    cases += [{"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False}]
    common = {"beta_schedule": beta_schedule, "prediction_type": prediction, "solver_type": solver_type}
    for config in cases:
        follow_sigmas(*pair("dpmsolver", 12, **common, **config), prediction)
        follow_sigmas(*pair("dpmsolver", 20, **common, **config), prediction, begin=7)


@pytest.mark.parametrize("sigmas", ["karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_dpmsolver_sigmas(beta_schedule, prediction, sigmas):
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction, f"use_{sigmas}": True}
    for steps in (6, 25):
        theirs, ours = pair("dpmsolver", steps, **config)
        follow_sigmas(theirs, ours, prediction, factor=lambda i: amplification(theirs, i) if prediction == "epsilon" else 1)


def amplification(theirs, i):
    """alpha_t / alpha_s, at least 1: how much of x comes into the next state through an epsilon prediction's x0.

    Few steps from a large sigma make it large (6 for 5 Karras steps from sigma = 37): x0 is a difference of two terms of that
    size, each rounded to 2^-24 of itself in diffusers and here, so that the floor grows with it.
    """
    (now, _), (following, _) = (theirs._sigma_to_alpha_sigma_t(theirs.sigmas[j].double()) for j in (i, i + 1))
    return max(1.0, float(following / now))


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmsolver_flow(shift, final_sigmas_type):
    config = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    for steps in (6, 20):
        follow_sigmas(*pair("dpmsolver", steps, **config, final_sigmas_type=final_sigmas_type), "flow_prediction")


def output_at(scheduler, i, x, prediction):
    """The network's output for a state at position i of any scheduler's schedule."""
    if hasattr(scheduler, "sigmas"):
        return sigma_states(scheduler, i, x, prediction)
    return network_at(scheduler, x, scheduler.timesteps[i], prediction)


def run(scheduler, x, prediction="epsilon", **arguments):
    """A whole sampling run; returns the last state."""
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output_at(scheduler, i, x, prediction), t, x, **arguments).prev_sample
    return x


@pytest.mark.parametrize("steps", [6, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs(name, prediction, steps):
    """Every step adds at most its own tolerance: the sampler contracts N(0, 1) to the narrower data.

    The second run, with another number of steps, needs tables of its own.
    """
    theirs, ours = pair(name, steps, prediction_type=prediction)
    options = {"eta": 0.7} if name == "ddim" else {}
    for count in (steps, steps // 2):
        results, generators = [], []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(count)
            x = normal(0) * float(scheduler.init_noise_sigma)
            # Batches may have a generator per sample.
            generators.append([torch.Generator().manual_seed(seed) for seed in (5, 6)])
            results.append(run(scheduler, x, prediction, generator=generators[-1], **options))
        assert gap(*results) <= (2e-4 if name == "ddpm" else count * 1e-6 * float(x.abs().max()))
        for a, b in zip(*generators):
            assert torch.equal(a.get_state(), b.get_state())


@pytest.mark.parametrize("name", ["euler", "dpmsolver"])
def test_image_to_image_start(name):
    """A start in the middle: with a begin index, and by the first timestep alone."""
    for begin in (True, False):
        theirs, ours = pair(name, 10)
        x = normal(0) * float(theirs.sigmas[4] if name == "euler" else 1)
        results = []
        for scheduler in (theirs, ours):
            if begin:
                scheduler.set_begin_index(4)
            y = x
            for i, t in enumerate(scheduler.timesteps[4:], 4):
                y = scheduler.step(sigma_states(theirs, i, scheduler.scale_model_input(y, t), "epsilon"), t, y).prev_sample
            results.append(y)
            assert scheduler.step_index == 10
        assert gap(*results) <= 6e-6 * float(x.abs().max())


def test_dpmsolver_unknown_timestep_means_the_last():
    theirs, ours = pair("dpmsolver", 10)
    x, output = normal(0), normal(1)
    expected, result = (s.step(output, 123, x).prev_sample for s in (theirs, ours))
    assert ours.step_index == theirs.step_index == 10
    assert_close((result,), (expected,), x)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample_dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_dtypes_and_accuracy(name, sample_dtype, output_dtype, monkeypatch):
    """diffusers' dtypes; against float64, at most diffusers' error, or two roundings of the storage or of float32.

    Two, because x0 of the step before is stored rounded, and the result is.
    """
    for module in (scheduling_ddim, scheduling_ddpm, schedulers):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, dtype, **options: normal(9, dtype=output_dtype).to(dtype))
    for prediction in PREDICTIONS:
        theirs, ours = pair(name, 10, prediction_type=prediction)
        truth = copy.deepcopy(ours)
        options = {"eta": 0.5} if name == "ddim" else {}
        x = (normal(0) * float(theirs.init_noise_sigma)).to(sample_dtype)
        for i, t in enumerate(ours.timesteps[:3]):
            for scheduler in (theirs, ours, truth):
                scheduler.scale_model_input(x, t)
            output = output_at(theirs, i, x.double(), prediction).to(output_dtype)
            expected, result = (s.step(output, t, x, return_dict=False, **options) for s in (theirs, ours))
            values = truth.step(output.double(), t, x.double(), return_dict=False, **options)
            # An epsilon prediction's x0 is a difference of terms 1 / sqrt(a_t) as large as x.
            factor = float(theirs.alphas_cumprod[int(t)]) ** -0.5 if name != "euler" and prediction == "epsilon" else 1.0
            for ours_value, theirs_value, value, grown in zip(result, expected, values, (1.0, factor)):
                assert ours_value.dtype == theirs_value.dtype
                size = max(float(tensor.abs().max()) for tensor in (value, x, output))
                allowed = 2 * torch.finfo(ours_value.dtype).eps * size + max(1e-6, 4 * 2**-24 * grown) * size
                assert gap(ours_value, value) <= max(gap(theirs_value, value), allowed)
            if name == "dpmsolver":
                histories = [[None if m is None else m.dtype for m in s.model_outputs] for s in (theirs, ours)]
                assert histories[0] == histories[1] and theirs.lower_order_nums == ours.lower_order_nums
            x = expected[0].to(sample_dtype)


def test_noise_wider_than_the_state():
    """diffusers promotes the next state to the noise's dtype, and x0 not."""
    theirs, ours = pair("ddim", 10)
    x, output, noise = normal(0, dtype=torch.float16), normal(1, dtype=torch.float16), normal(2)
    expected, result = (s.step(output, 900, x, eta=1.0, variance_noise=noise, return_dict=False) for s in (theirs, ours))
    wide = ours.step(output.float(), 900, x.float(), eta=1.0, variance_noise=noise).prev_sample
    assert [t.dtype for t in result] == [t.dtype for t in expected] == [torch.float32, torch.float16]
    assert torch.equal(result[0], wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_euler_without_x0_is_the_same(dtype):
    """Where x0 is not wanted, half-precision states are not widened in memory; the arithmetic is float32 either way."""
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
    theirs, ours = pair(name, 10)
    t, x, output = ours.timesteps[3], normal(0, shape), normal(1, shape)
    result = ours.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert result.shape == shape
    if name == "ddpm" and len(shape) == 1:
        # diffusers itself looks for a dimension of channels.
        x, output = x[:, None], output[:, None]
    expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    if result.numel():
        assert gap(result, expected.reshape(shape)) <= (2e-4 if name == "ddpm" else 1e-6 * max(1, float(x.abs().max())))


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


# What the kernel does not cover: scheduler, configuration, arguments of step, and a word of the reason.
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
]


@pytest.mark.parametrize(("name", "config", "arguments", "word"), FALLBACKS)
def test_uncovered_configurations_run_diffusers_code(name, config, arguments, word):
    """Bit for bit, the generators included, and one warning in all."""
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
                    # The variance comes as more channels; a learned one is positive.
                    output = torch.cat([output, output.abs()], 1)
                x = scheduler.step(output, t, x, generator=generator, **arguments).prev_sample
            results.append(x)
            states.append(generator.get_state())
    assert torch.equal(results[0].nan_to_num(7), results[1].nan_to_num(7)) and torch.equal(*states)
    ours_said = [str(w.message) for w in caught if "runs diffusers' own code" in str(w.message)]
    assert len(ours_said) == 1 and word in ours_said[0] and type(ours).__qualname__ in ours_said[0]
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
    """A step whose inputs want a gradient is diffusers', differentiable, between fused ones; the histories fit together."""
    theirs, ours = pair(name, 6)
    results, gradients = [], []
    for scheduler in (theirs, ours):
        x, generator = normal(0) * float(scheduler.init_noise_sigma), torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            output = output_at(theirs, i, x, "epsilon")
            with torch.set_grad_enabled(i == 2), warnings.catch_warnings():
                warnings.simplefilter("ignore" if i == 2 else "error")
                x = scheduler.step(output.requires_grad_(i == 2), t, x, generator=generator).prev_sample
                if i == 2:
                    gradients.append(torch.autograd.grad(x.sum(), output)[0])
            x = x.detach()
        results.append(x)
    assert gap(*results) <= (2e-4 if name == "ddpm" else 6e-6 * float(theirs.init_noise_sigma) * 4)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_gradient_warning_names_the_remedy():
    _, ours = pair("ddim", 6)
    with torch.enable_grad(), pytest.warns(UserWarning, match="torch.no_grad"):
        ours.step(normal(0).requires_grad_(), 0, normal(1))
    # Under no_grad parameters may require gradients.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.step(normal(0).requires_grad_(), 0, normal(1))


def test_a_history_that_wants_a_gradient():
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
    """Noise of (seed, index, position in the schedule) instead of a generator's, equal to 2e-6 on every backend."""
    _, ours = pair(name, 5)
    other = copy.deepcopy(ours)
    indices = torch.tensor([7, 2**33])
    ours.set_step_options(seed=11, indices=indices)
    ours.set_timesteps(5)
    x = normal(0)
    for i, t in enumerate(ours.timesteps):
        output = network_at(ours, x, t, "epsilon")
        noise = philox_normal(11, indices, SHAPE[1:], stream="step", step=i)
        monkeypatch.setattr(schedulers, "randn_tensor", lambda *args, **options: noise)
        expected = other.step(output, t, x, **PHILOX[name]).prev_sample
        x = ours.step(output, t, x, **PHILOX[name]).prev_sample
        assert gap(x, expected) <= 4e-6
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
    assert_close((result.prev_sample,), (theirs.step(output, 0, x).prev_sample,), x)
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
    assert_close(ours.step(output, 800, x).to_tuple(), theirs.step(output, 800, x).to_tuple(), x)
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
    if name in ("ddpm", "euler"):
        _, ours = pair(name, 10)
        with pytest.raises(InputError, match="timestep"):
            ours.step(x, 123 if name == "ddpm" else 123.0, x)
    if name in ("euler", "dpmsolver"):
        _, ours = pair(name, 2)
        for t in ours.timesteps:
            x = ours.step(ours.scale_model_input(x, t), t, x).prev_sample
        with pytest.raises(InputError, match="set_timesteps"):
            ours.step(x, t, x)
    if name == "euler":
        with pytest.raises(InputError, match="timestep"):
            pair(name, 10)[1].scale_model_input(x, 123.0)


def test_a_schedule_may_leave_the_range():
    """Euler's timesteps may be log sigmas, or reach T by an offset: what is in the schedule is accepted."""
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
    for name in ("ddim", "dpmsolver"):
        with pytest.raises(ValueError, match="set_timesteps"):
            pair(name, 0)[1].step(x, 0, x)
    with pytest.raises(ValueError, match="integer"):
        pair("euler", 5)[1].step(x, 0, x)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        pair("ddim", 5)[1].step(x, 0, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


@pytest.mark.parametrize("name", NAMES)
def test_steps_do_not_read_tensors(name, monkeypatch):
    """After the first step of a run nothing is read from a tensor on the host: on a GPU that would wait for the device."""
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


@pytest.mark.parametrize("name", NAMES)
def test_tables_follow_what_they_come_from(name):
    """A schedule or configuration that is replaced, or written to in place, is seen."""
    theirs, ours = pair(name, 10)
    x, output, generator = normal(0), normal(1), torch.Generator()

    def both():
        values = []
        for scheduler in (copy.deepcopy(theirs), ours):
            if hasattr(scheduler, "sigmas"):
                scheduler._step_index, scheduler.lower_order_nums = None, 0
                scheduler.set_begin_index(3)
                scheduler.scale_model_input(x, scheduler.timesteps[3])
            values.append(scheduler.step(output, scheduler.timesteps[3], x, generator=generator.manual_seed(0)).prev_sample)
        return values

    first = both()
    for scheduler in (theirs, ours):
        getattr(scheduler, "sigmas" if hasattr(scheduler, "sigmas") else "alphas_cumprod").mul_(0.9)
    second = both()
    for scheduler in (theirs, ours):
        scheduler.register_to_config(prediction_type="v_prediction")
    third = both()
    for expected, result in (first, second, third):
        assert gap(result, expected) <= 2e-4
    assert gap(first[1], second[1]) > 1e-3 < gap(second[1], third[1])


def test_tables_do_not_pile_up():
    """An eta of its own for every step makes a table each; old ones go."""
    _, ours = pair("ddim", 5)
    for i in range(50):
        ours.step(normal(1), 800, normal(0), eta=i / 50)
        assert len(ours._kept) <= schedulers._VARIANTS


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode(name):
    """Tensors made there do not count their changes; the tables then follow replacements only."""
    with torch.inference_mode():
        theirs, ours = pair(name, 5)
        for steps in (5, 4):
            results = []
            for scheduler in (theirs, ours):
                scheduler.set_timesteps(steps)
                x = normal(0) * float(scheduler.init_noise_sigma)
                results.append(run(scheduler, x, generator=torch.Generator().manual_seed(0)))
            assert gap(*results) <= (2e-4 if name == "ddpm" else steps * 1e-6 * float(x.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_files_name_diffusers_class(name, tmp_path):
    """What is saved loads without advkd, and back into the fused class; objects can be pickled and copied."""
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
    """The drop-in line, a run, a saved pipeline that anyone loads, and the fused scheduler put back."""
    published, fused = PAIRS[name]
    kind = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}[name]
    pipe = kind(tiny_unet(), published())
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np", **({"eta": 0.5} if name == "ddim" else {})}
    expected = pipe(generator=torch.Generator().manual_seed(0), **options).images
    pipe.scheduler = fused.from_config(pipe.scheduler.config)
    assert numpy.abs(pipe(generator=torch.Generator().manual_seed(0), **options).images - expected).max() <= 2e-4
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", published.__name__]
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is published
    back = DDPMPipeline.from_pretrained(tmp_path, scheduler=fused.from_pretrained(tmp_path, subfolder="scheduler"))
    assert type(back.scheduler) is fused


def test_import_is_not_paid_for_by_others():
    code = "import sys, advkd, advkd.coefficients; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=process_environment()).returncode == 0


def test_coefficients_by_hand():
    """Simple numbers: alpha_bar 0.64 to 0.8 (signal 0.8, noise 0.6), sigma 2 to 1."""
    assert x0_coefficients(0.64, "epsilon") == pytest.approx((1.25, -0.75))
    assert x0_coefficients(0.64, "v_prediction") == pytest.approx((0.8, -0.6))
    assert noise_coefficients(0.64, "sample") == pytest.approx((1 / 0.6, -0.8 / 0.6))
    step = ddim_coefficients(0.64, 0.8, "epsilon", eta=1.0)
    variance = 0.2 / 0.36 * (1 - 0.64 / 0.8)
    assert (step.c_0, step.c_m, step.c_z) == pytest.approx((0.8**0.5, (0.2 - variance) ** 0.5, variance**0.5))
    # DDIM with eta = 1 is DDPM with the small variance, once the noise is expressed by x and x0.
    same, ddpm = ddim_coefficients(0.64, 0.8, "sample", eta=1.0), ddpm_coefficients(0.64, 0.8, "sample")
    assert (same.c_0 + same.c_m, same.c_x, same.c_z) == pytest.approx((ddpm.c_0, ddpm.c_x, ddpm.c_z))
    clipped = ddim_coefficients(0.64, 0.8, "epsilon", clipped_eps=True)
    assert (clipped.c_0, clipped.c_x, clipped.c_m) == pytest.approx((0.8**0.5 - 0.2**0.5 * 0.8 / 0.6, 0.2**0.5 / 0.6, 0))
    assert ddpm_coefficients(0.64, 0.8, "sample", "fixed_large").c_z == pytest.approx(0.2**0.5)
    assert ddpm_coefficients(0.64, 0.8, "sample", noisy=False).c_z == 0
    euler = euler_coefficients(2.0, 1.0, "sample")
    assert (euler.c_0, euler.c_x) == (0.5, 0.5)
    # To sigma = 0 both solvers return x0 exactly, and first-order DPM-Solver++ is deterministic DDIM.
    for last in (euler_coefficients(2.0, 0.0, "sample"), dpmsolver_coefficients(2.0, 0.0, "sample")):
        assert (last.c_0, last.c_x, last.c_h) == (1, 0, 0)
    first = dpmsolver_coefficients(0.75, 0.5, "sample")
    ddim = ddim_coefficients(0.64, 0.8, "sample")
    assert (first.c_0, first.c_x) == pytest.approx((ddim.c_0 + ddim.c_m, ddim.c_x))
    # Equal gaps h: D1 = x0 - x0_prev, and half of the first-order weight goes to it.
    second = dpmsolver_coefficients(0.5, 0.25, "sample", 1.0)
    weight = dpmsolver_coefficients(0.5, 0.25, "sample").c_0
    assert (second.c_0, second.c_h) == pytest.approx((1.5 * weight, -0.5 * weight))
    # Equal noise levels leave the state alone, as the last step of Karras sigmas to sigma_min does.
    for kind in ("midpoint", "heun"):
        still = dpmsolver_coefficients(0.5, 0.5, "sample", 1.0, kind)
        assert (still.c_0, still.c_x, still.c_h) == pytest.approx((0, 1, 0))


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
