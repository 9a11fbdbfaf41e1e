"""One posterior mean behind networks of every kind of output, coordinates of both kinds, levels of every sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkd.diffusion.denoiser import COORDINATES, Denoiser
from advkd.diffusion.exact import MixtureTeacher
from advkd.diffusion.prediction import PREDICTIONS, eps_weights, require_prediction, x0_weights
from advkd.diffusion.schedule import Schedule
from advkd.errors import InputError

from .runs import double

SCHEDULE = Schedule.linear()
TEACHER = MixtureTeacher.from_preset("8-gaussians", SCHEDULE)
SIGMAS = double([0.02, 0.3, 1.0, 4.0, 90.0])
UNIT = 2**-53


def weights_of(sigma, x):
    scale = torch.sqrt(1 + sigma**2).reshape(-1, *[1] * (x.ndim - 1))
    return 1 / scale, sigma.reshape(scale.shape) / scale


def states(coordinates="vp"):
    """Noised data at :data:`SIGMAS`, and the exact posterior means there."""
    x0 = TEACHER.data(len(SIGMAS), seed=1)
    alpha, noise = weights_of(SIGMAS, x0)
    x = alpha * x0 + noise * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = TEACHER.x0(x, alpha, noise)
    return (x if coordinates == "vp" else x / alpha), mean, (x - alpha * mean) / noise


def output(prediction, x, t, condition=None):
    """The output of a network of that kind which knows the posterior mean; told nothing but what networks are told."""
    x = x.double()
    alpha, noise = weights_of(output.sigmas, x)
    x0 = TEACHER.x0(x, alpha, noise)
    eps = (x - alpha * x0) / noise
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - noise * x0,
        "flow_prediction": eps - x0,
    }[prediction]


def denoiser(prediction, sigmas=SIGMAS, **options):
    output.sigmas = sigmas
    return Denoiser(lambda x, t, condition: output(prediction, x, t), SCHEDULE, prediction, **options)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_kind_of_output_gives_the_same(prediction, coordinates):
    x, mean, noise = states(coordinates)
    x0, eps = denoiser(prediction, coordinates=coordinates).predict(x, SIGMAS)
    # x0 from the noise is multiplied by 1 / alpha, the noise from x0 by 1 / sigma.
    assert ((x0 - mean).abs().amax(1) <= 64 * UNIT * (1 + SIGMAS)).all()
    assert ((eps - noise).abs().amax(1) <= 64 * UNIT * (1 + 1 / SIGMAS)).all()
    alpha, share = weights_of(SIGMAS, x)
    assert (alpha * x0 + share * eps - (x if coordinates == "vp" else alpha * x)).abs().max() <= 1e-12
    exact = MixtureTeacher.from_preset("8-gaussians", SCHEDULE, coordinates).predict(x, SIGMAS)
    assert torch.allclose(x0, exact[0], atol=1e-12, rtol=0) and torch.allclose(eps, exact[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_level_for_all_is_one_of_each(prediction):
    x, _, _ = states()
    whole = denoiser(prediction, double([1.0] * len(x)))
    for pair in zip(whole.predict(x, 1.0), whole.predict(x, torch.ones(len(x)))):
        assert torch.equal(*pair)
    together = denoiser(prediction).predict(x, SIGMAS)
    for i in range(len(x)):
        alone = denoiser(prediction, SIGMAS[i : i + 1]).predict(x[i : i + 1], SIGMAS[i].item())
        assert all(
            torch.allclose(one, both[i : i + 1], atol=1e-13 * (1 + 1 / SIGMAS[i]), rtol=1e-13)
            for one, both in zip(alone, together)
        )


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping(prediction, coordinates):
    """The image is clamped; the noise goes with it, or stays the network's own."""
    x, mean, noise = states(coordinates)
    clamped = mean.clamp(-1, 1)
    assert (clamped != mean).any()
    alpha, share = weights_of(SIGMAS, x)
    state = x if coordinates == "vp" else alpha * x
    for clipped_eps, wanted in ((True, (state - alpha * clamped) / share), (False, noise)):
        x0, eps = denoiser(prediction, clip=1.0, clipped_eps=clipped_eps, coordinates=coordinates).predict(x, SIGMAS)
        assert torch.allclose(x0, clamped, atol=1e-12, rtol=0) and torch.allclose(eps, wanted, atol=1e-12, rtol=0)


def test_what_a_network_is_told():
    """The variance-preserving state, float32 timesteps between whole ones, and the condition as it is."""
    told = []

    def network(x, t, condition):
        told.append((x, t, condition))
        return x

    condition, x = object(), torch.ones(3, 2)
    Denoiser(network, SCHEDULE, "sample", coordinates="ve").predict(x, SCHEDULE.sigma(10.5), condition)
    ((state, t, given_condition),) = told
    assert given_condition is condition and t.dtype == torch.float32 and t.tolist() == [10.5] * 3
    assert state.dtype == x.dtype and torch.allclose(state, SCHEDULE.alpha_bar(10.5).sqrt().float() * x)


def test_gradients_and_dtypes():
    x = states()[0].requires_grad_()
    x0, eps = denoiser("epsilon").predict(x, SIGMAS)
    assert x0.dtype == eps.dtype == torch.float64 and torch.autograd.grad(x0.sum() + eps.sum(), x)[0].isfinite().all()
    single = denoiser("v_prediction").predict(x.detach().float(), SIGMAS)
    assert all(tensor.dtype == torch.float32 for tensor in single)
    # The network rounds its state, alpha and output to float32; at the lowest level the responsibilities multiply that.
    assert torch.allclose(single[0].double(), x0, atol=1e-3, rtol=0)


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(PREDICTIONS), st.floats(1e-3, 1), st.floats(1e-3, 1), st.floats(-10, 10), st.floats(-10, 10), st.booleans()
)
def test_conversions_are_inverse(prediction, alpha, noise, x0, eps, tensors):
    if tensors:
        alpha, noise = double(alpha), double(noise)
    x, scale = alpha * x0 + noise * eps, (alpha**2 + noise**2) ** 0.5
    m = {"epsilon": eps, "sample": x0, "v_prediction": (alpha * eps - noise * x0) / scale, "flow_prediction": eps - x0}
    (k_x, k_m), (e_x, e_m) = (weights(alpha, noise, prediction) for weights in (x0_weights, eps_weights))
    # Roundings of x and m, at most 20 or so, times weights of at most 1 / alpha or 1 / noise.
    bound = 64 * UNIT * (abs(x0) + abs(eps) + 1)
    assert abs(k_x * x + k_m * m[prediction] - x0) <= bound / alpha
    assert abs(e_x * x + e_m * m[prediction] - eps) <= bound / noise


def test_refusals():
    kinds = "epsilon, sample, v_prediction, flow_prediction"
    with pytest.raises(InputError, match=f"prediction must be one of {kinds}, got 'noise'"):
        Denoiser(None, SCHEDULE, "noise")
    for weights in (x0_weights, eps_weights):
        with pytest.raises(InputError, match="prediction must be one of"):
            weights(0.5, 0.5, "noise")
    with pytest.raises(InputError, match="prediction must be one of epsilon, sample, got 'v_prediction'"):
        require_prediction("v_prediction", ("epsilon", "sample"))
    with pytest.raises(InputError, match="coordinates must be one of vp, ve, got 'sub'"):
        Denoiser(None, SCHEDULE, "sample", coordinates="sub")
    for clip in (-1.0, math.nan):
        with pytest.raises(InputError, match="clip must not be negative"):
            Denoiser(None, SCHEDULE, "sample", clip=clip)
    for sigma in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(InputError, match=r"sigma must be a number or one per sample \(2\), got shape"):
            denoiser("sample").predict(torch.zeros(2, 2), sigma)
    with pytest.raises(InputError, match="no x0 at alpha_bar = 0"):
        x0_weights(0.0, 1.0, "epsilon")
    with pytest.raises(InputError, match="no noise at alpha_bar = 1"):
        eps_weights(1.0, 0.0, "sample")
