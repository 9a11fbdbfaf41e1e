"""The one step against diffusers' schedulers, for every prediction type, with and without clipping."""

import dataclasses

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import StepCoefficients, sampler_step

from ..conftest import tiny_teacher

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
# The first step, two in the middle, and the last, which goes to alpha_bar = 1.
DDIM_STEPS = [(980, 960), (500, 480), (20, 0), (0, None)]


def states():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 5, 7, generator=generator) for _ in range(3))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("t", "following"), DDIM_STEPS)
def test_ddim_is_diffusers_ddim(t, following, prediction, clip):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(prediction_type=prediction, clip_sample=clip, set_alpha_to_one=True)
    theirs.set_timesteps(50)
    teacher = tiny_teacher(prediction_type=prediction, clip_sample=clip)
    x, output, _ = states()
    expected = theirs.step(output, t, x)
    ours, x0, _ = sampler_step(x, output, teacher.coefficients(t, following, "ddim"), return_x0=True)
    scale = max(1.0, float(x.abs().max()), float(expected.prev_sample.abs().max()))
    assert (ours - expected.prev_sample).abs().max() <= 2e-6 * scale
    scale = max(1.0, float(expected.pred_original_sample.abs().max()))
    assert (x0 - expected.pred_original_sample).abs().max() <= 5e-5 * scale


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_ddpm_is_diffusers_ddpm(t, prediction, variance, monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    theirs = DDPMScheduler(prediction_type=prediction, variance_type=variance)
    theirs.set_timesteps(1000)
    teacher = tiny_teacher(prediction_type=prediction, variance_type=variance)
    x, output, noise = states()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **options: noise)
    expected = theirs.step(output, t, x).prev_sample
    coefficients = teacher.coefficients(t, t - 1 if t else None, "ddpm")
    ours, _, _ = sampler_step(x, output, coefficients, noise=noise)
    # diffusers computes the coefficients in float32.
    assert (ours - expected).abs().max() <= 2e-4


def test_ddpm_mean_is_the_posterior_mean():
    """Ho et al. 2020, eq. 7, in float64."""
    teacher = tiny_teacher(clip_sample=False, prediction_type="sample")
    x, x0, _ = (tensor.double() for tensor in states())
    t = 600
    a, b = float(teacher.alpha_bars[t]), float(teacher.alpha_bars[t - 1])
    beta = 1 - a / b
    mean = b**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - b) / (1 - a) * x
    ours, _, _ = sampler_step(x, x0, dataclasses.replace(teacher.coefficients(t, t - 1, "ddpm"), c_z=0.0))
    assert (ours - mean).abs().max() < 1e-12


def test_pool_history_noise_and_dtype():
    coefficients = StepCoefficients(k_x=0.5, k_m=-0.25, c_0=2.0, c_x=0.1, c_m=0.2, c_h=0.3, c_z=0.4, clip=0.7)
    generator = torch.Generator().manual_seed(1)
    x, m, previous, z = (torch.randn(2, 1, 8, 8, generator=generator).bfloat16() for _ in range(4))
    x_next, x0, pooled = sampler_step(x, m, coefficients, previous_x0=previous, noise=z, pool=4, return_x0=True)
    x64, m64, p64, z64 = (tensor.double() for tensor in (x, m, previous, z))
    x0_64 = (0.5 * x64 - 0.25 * m64).clamp(-0.7, 0.7)
    next_64 = 2 * x0_64 + 0.1 * x64 + 0.2 * m64 + 0.3 * p64 + 0.4 * z64
    # float32 arithmetic, one rounding to bfloat16 (relative 2^-8 of the largest value).
    assert x_next.dtype == torch.bfloat16
    assert (x_next - next_64).abs().max() <= 2**-8 * next_64.abs().max()
    assert (x0 - x0_64).abs().max() <= 2**-8
    assert (pooled - torch.nn.functional.avg_pool2d(next_64, 4)).abs().max() <= 2**-8 * next_64.abs().max()
    assert sampler_step(x, m, coefficients, previous_x0=previous, noise=z, return_x0=False)[1:] == (None, None)


def test_channels_last_and_empty():
    coefficients = StepCoefficients(1.0, -0.5, 0.9, 0.1)
    x, m, _ = states()
    dense, _, _ = sampler_step(x, m, coefficients)
    last, _, _ = sampler_step(x.to(memory_format=torch.channels_last), m.to(memory_format=torch.channels_last), coefficients)
    assert torch.equal(dense, last)
    assert sampler_step(x[:0], m[:0], coefficients)[0].shape == (0, 3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_output": torch.zeros(1, 1, 4, 5)}, "model_output"),
        ({"model_output": torch.zeros(1, 1, 4, 4).int()}, "model_output"),
        ({"noise": torch.zeros(1)}, "noise"),
        ({"coefficients": StepCoefficients(1, 1, 1, c_z=1.0)}, "noise"),
        ({"coefficients": StepCoefficients(1, 1, 1, c_h=1.0)}, "previous_x0"),
        ({"pool": 3}, "pool"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    x = torch.zeros(1, 1, 4, 4)
    arguments = {"x": x, "model_output": x, "coefficients": StepCoefficients(1, 1, 1), **changes}
    with pytest.raises(InputError, match=name):
        sampler_step(**arguments)


def test_no_gradient_and_no_other_backend():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        sampler_step(x.clone().requires_grad_(), x, StepCoefficients(1, 1, 1))
    with pytest.raises(BackendUnavailableError, match="not written"):
        sampler_step(x, x, StepCoefficients(1, 1, 1), backend="cuda")


def test_zero_terminal_snr():
    epsilon = tiny_teacher(rescale_betas_zero_snr=True)
    # diffusers leaves 2^-24 at the end for epsilon's sake; an exact zero must be refused.
    epsilon.alpha_bars[999] = 0.0
    with pytest.raises(InputError, match="alpha_bar = 0"):
        epsilon.coefficients(999, 998, "ddim")
    v = tiny_teacher(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    v.alpha_bars[999] = 0.0
    x, m, _ = states()
    assert torch.isfinite(sampler_step(x, m, v.coefficients(999, 980, "ddim"))[0]).all()
