"""Samplers on Gaussian data, where the exact network and the exact answer are known."""

import contextlib
import functools
import itertools
import math

import pytest
import torch

from advkd.data.draws import DataOrder, shift, training_latents
from advkd.diffusion.coefficients import ddim_coefficients, ddpm_coefficients, dpmsolver_coefficients
from advkd.diffusion.loop import SamplingLoop
from advkd.diffusion.program import Evaluation
from advkd.diffusion.renoising import sample_consistency, sample_dpdm
from advkd.diffusion.schedule import Level
from advkd.errors import InputError
from advkd.ops import sampler_step

from ..conftest import DEFAULTS, other_default

MEAN = torch.tensor([0.5, -1.0, 0.25])
# A full covariance with eigenvalues 0.05, 0.4 and 1.5.
BASIS = torch.linalg.qr(torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0], [2.0, 0.3, 1.0]]).double())[0].float()
VARIANCES = torch.tensor([0.05, 0.4, 1.5])
COVARIANCE = BASIS @ torch.diag(VARIANCES) @ BASIS.T
N = 200_000


def linear(function):
    """A function of the covariance's eigenvalues as a matrix."""
    return BASIS @ torch.diag(function(VARIANCES)) @ BASIS.T


def affine(x, matrix):
    """mean + matrix (x - mean) for states (N, 3, 1, 1)."""
    return (MEAN + (x.flatten(1) - MEAN) @ matrix.T).reshape(x.shape)


def assert_moments(x, mean, covariance):
    """Sample moments within five standard errors."""
    x = x.flatten(1).double()
    error = (x.mean(0) - mean).abs()
    assert (error <= 5 * (covariance.diagonal() / len(x)).sqrt()).all()
    found = torch.cov(x.T)
    spread = ((covariance**2 + torch.outer(covariance.diagonal(), covariance.diagonal())) / len(x)).sqrt()
    assert ((found - covariance).abs() <= 5 * spread).all()


def moments(gain, sigmas, weights):
    """Mean and covariance after the sampler's run: algorithm 2 in closed form. The first state has mean 0, not the data's."""
    mean, variance = -(BASIS.T @ MEAN), torch.zeros(3)
    for s, weight in zip(sigmas, weights):
        mean, variance = gain(VARIANCES, s) * mean, gain(VARIANCES, s) ** 2 * (variance + weight**2)
    return MEAN + BASIS @ mean, BASIS @ torch.diag(variance) @ BASIS.T


def test_a_perfect_dpdm_gives_the_data():
    """A denoiser that maps the noisy distribution onto the data's."""
    sigmas, gain = [80.0, 10.0, 1.0, 0.2], lambda v, s: (v / (v + s**2)).sqrt()
    x = sample_dpdm(lambda x, s: affine(x, linear(lambda v: gain(v, s))), sigmas, (N, 3, 1, 1), seed=1)
    wanted = moments(gain, sigmas, sigmas)
    assert_moments(x, *wanted)
    # Only the data's mean in the first state is missing.
    assert (wanted[0] - MEAN).norm() <= MEAN.norm() * 1.5**0.5 / 80 and (wanted[1] - COVARIANCE).abs().max() < 1e-4


def test_dpdm_with_the_posterior_mean_shrinks_as_computed():
    """Taking x_0 = E[x_0 | x] loses variance."""
    sigmas, gain = [2.0, 1.0, 0.5], lambda v, s: v / (v + s**2)
    x = sample_dpdm(lambda x, s: affine(x, linear(lambda v: gain(v, s))), sigmas, (N, 3, 1, 1), seed=2)
    wanted = moments(gain, sigmas, sigmas)
    assert_moments(x, *wanted)
    assert (wanted[1] - COVARIANCE).abs().max() > 0.1


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 5.0, 0.5]])
def test_an_exact_consistency_model_gives_the_data(sigmas):
    """f follows the probability-flow ODE to sigma_min, where the state is the data and that much noise."""
    low = 0.1
    gain = lambda v, s: ((v + low**2) / (v + s**2)).sqrt()  # noqa: E731
    x = sample_consistency(lambda x, s: affine(x, linear(lambda v: gain(v, s))), sigmas, (N, 3, 1, 1), seed=3, sigma_min=low)
    weights = [sigmas[0], *(math.sqrt(s**2 - low**2) for s in sigmas[1:])]
    wanted = moments(gain, sigmas, weights)
    assert_moments(x, *wanted)
    assert (wanted[0] - MEAN).norm() <= MEAN.norm() * (1.5 + low**2) ** 0.5 / 80
    assert (wanted[1] - COVARIANCE - low**2 * torch.eye(3)).abs().max() < 1e-3


def test_samples_depend_on_their_index_alone():
    denoiser = lambda x, s: x / (1 + s**2)  # noqa: E731
    for sampler in (sample_dpdm, sample_consistency):
        whole = sampler(denoiser, [3.0, 1.0, 0.5], (6, 3, 4, 4), seed=5)
        part = sampler(denoiser, [3.0, 1.0, 0.5], (2, 3, 4, 4), seed=5, start=4)
        assert torch.equal(whole[4:], part)
        assert not torch.allclose(whole, sampler(denoiser, [3.0, 1.0, 0.5], (6, 3, 4, 4), seed=6))


@pytest.mark.parametrize("sigmas", [[], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0], [math.inf, 1.0], [math.nan]])
def test_bad_levels_are_refused(sigmas):
    for sampler in (sample_dpdm, sample_consistency):
        with pytest.raises(InputError, match="sigma"):
            sampler(lambda x, s: x, sigmas, (1, 1, 2, 2))
    with pytest.raises(InputError, match="sigma_min"):
        sample_consistency(lambda x, s: x, [1.0, 0.5], (1, 1, 2, 2), sigma_min=0.5)


# Diffusion samplers with the exact noise prediction. Along every eigenvector the state is a scalar.


def levels(steps, first=-4.0, last=4.0):
    """alpha_bar at log-SNR spaced evenly over [first, last], which is where a solver's order shows."""
    return [1 / (1 + math.exp(-2 * (first + (last - first) * i / steps))) for i in range(steps + 1)]


def exact_eps(x, a, mean, variance):
    return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * variance + 1 - a)


def flow(x, a_t, a_s, mean, variance):
    """The probability-flow ODE's solution: (x - mean) / deviation is constant."""
    deviations = [math.sqrt(a * variance + 1 - a) for a in (a_t, a_s)]
    return math.sqrt(a_s) * mean + (x - math.sqrt(a_t) * mean) * deviations[1] / deviations[0]


def ddim(x, steps, mean=0.4, variance=0.3):
    a = levels(steps)
    for a_t, a_s in zip(a, a[1:]):
        x, _, _ = sampler_step(x, exact_eps(x, a_t, mean, variance), ddim_coefficients(a_t, a_s, "epsilon"))
    return x


def dpmsolver(x, steps, mean=0.4, variance=0.3):
    a, previous, before = levels(steps), None, None
    sigmas = [math.sqrt((1 - v) / v) for v in a]
    for i, a_t in enumerate(a[:-1]):
        c = dpmsolver_coefficients(sigmas[i], sigmas[i + 1], "epsilon", before)
        options = {"previous_x0": previous} if before is not None else {}
        x, previous, _ = sampler_step(x, exact_eps(x, a_t, mean, variance), c, return_x0=True, **options)
        before = sigmas[i]
    return x


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmsolver, 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    x = torch.linspace(-2, 2, 9).double()[:, None]
    a = levels(1)
    wanted = flow(x, a[0], a[1], 0.4, 0.3)
    errors = [float((sampler(x, steps) - wanted).abs().max()) for steps in (20, 40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 2**order * 0.8 < coarse / fine < 2**order * 1.25, errors
    assert errors[-1] < (2e-2, 4e-4)[order - 1]


def ancestral(steps, variance, mean=0.4):
    """Mean and variance after DDPM's run, from the steps' own gain, offset and noise (they are affine)."""
    a = levels(steps)
    m, v = math.sqrt(a[0]) * mean, a[0] * variance + 1 - a[0]
    for a_t, a_s in zip(a, a[1:]):
        c = ddpm_coefficients(a_t, a_s, "epsilon")
        x = torch.tensor([[0.0], [1.0]]).double()
        z = torch.zeros_like(x)
        (offset,), (one,) = sampler_step(x, exact_eps(x, a_t, mean, variance), c, noise=z)[0].tolist()
        m, v = offset + (one - offset) * m, (one - offset) ** 2 * v + c.c_z**2
    return m, v, a[-1]


def test_the_ancestral_sampler_converges_at_first_order():
    errors = []
    for steps in (40, 80, 160, 320):
        m, v, a = ancestral(steps, 0.3)
        assert abs(m - math.sqrt(a) * 0.4) < 0.2
        errors.append(abs(v - (a * 0.3 + 1 - a)))
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.6 < coarse / fine < 2.5, errors


def test_ancestral_samples_have_the_computed_moments():
    """Samples drawn with the kernel's own noise against the recursion."""
    steps, variance, mean = 12, 0.3, 0.4
    a = levels(steps)
    indices = torch.arange(N // 100)
    x = math.sqrt(a[0]) * mean + math.sqrt(a[0] * variance + 1 - a[0]) * torch.randn(
        N // 100, 1, 10, 10, generator=torch.Generator().manual_seed(0)
    )
    for i, (a_t, a_s) in enumerate(zip(a, a[1:])):
        c = ddpm_coefficients(a_t, a_s, "epsilon")
        sampler_step(x, exact_eps(x, a_t, mean, variance), c, noise=(7, indices, i), out=x)
    m, v, _ = ancestral(steps, variance)
    assert_moments(x.reshape(-1, 1), torch.tensor([m]).double(), torch.tensor([[v]]).double())


# Torch's default dtype, default device and inference mode must not change the results below.


def looped(run=None, make=None):
    """Results of two steps of the teacher's loop with noise and averages, and the network's inputs."""
    places = [Level(t, math.sqrt(a), math.sqrt(1 - a), a) for t, a in ((700.0, 0.3), (300.0, 0.6), (0.0, 0.9))]
    pairs, seen = list(itertools.pairwise(places)), []
    program = [Evaluation(a, ddpm_coefficients(a.alpha_bar, b.alpha_bar, "epsilon"), b) for a, b in pairs]
    x_T = torch.linspace(-1, 1, 32, dtype=torch.float32, device="cpu").reshape(2, 1, 4, 4)

    def network(x, place):
        seen.append(place.t.clone())
        return 0.5 * x + place.t.float() / 1000

    with make or contextlib.nullcontext():
        loop = SamplingLoop(network, (2, 1, 4, 4), program, 5, "cpu")
    with run or contextlib.nullcontext():
        loop.start(x_T, 3)
        averages = [loop.step(2).clone() for _ in program]
    loop.start(x_T, 3)
    again = [loop.step(2).clone() for _ in program]
    assert not any(t.is_inference() for t in (loop.x, loop._table, loop._timesteps, loop._indices, loop._counter))
    return [*averages, *again, loop.x, *seen]


@pytest.mark.parametrize("where", ["run", "make"])
def test_the_loop_in_other_modes(where):
    wanted = looped()
    assert wanted[0].dtype == torch.float32 and torch.cat(wanted[-4:]).tolist() == [700, 300] * 2
    for mode in (torch.inference_mode, torch.enable_grad, *(functools.partial(other_default, other) for other in DEFAULTS)):
        for a, b in zip(looped(**{where: mode()}), wanted, strict=True):
            assert (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)


@pytest.mark.parametrize("other", DEFAULTS, ids=str)
def test_torch_defaults_change_no_samples_and_no_draws(other):
    images = torch.linspace(0, 1, 128, dtype=torch.float32, device="cpu").reshape(2, 1, 8, 8)

    def results():
        arguments = (lambda x, s: x / (1 + s**2), [3.0, 1.0], (2, 1, 4, 4))
        samples = [sample_dpdm(*arguments), sample_consistency(*arguments)]
        return [*samples, training_latents(0, 5, 3, 7), shift(images, 0, 5, 1, 2)], DataOrder(9, 1).rows(3, 12)

    wanted, rows = results()
    with other_default(other):
        found, found_rows = results()
    assert found_rows == rows
    for a, b in zip(found, wanted, strict=True):
        assert a.device.type == "cpu" and a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_samples_are_float32_whatever_a_denoiser_gives(dtype):
    for sampler in (sample_dpdm, sample_consistency):
        x = sampler(lambda x, s: (x / (1 + s**2)).to(dtype), [3.0, 1.0, 0.5], (2, 1, 4, 4))
        wanted = sampler(lambda x, s: (x / (1 + s**2)).to(dtype).float(), [3.0, 1.0, 0.5], (2, 1, 4, 4))
        assert x.dtype == torch.float32 and torch.equal(x, wanted)
