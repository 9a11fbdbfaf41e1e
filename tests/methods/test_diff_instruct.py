"""Diff-Instruct: the gradient of the integral divergence in closed form, the generator's moments, modes that are kept."""

import copy
import math

import pytest
import torch
from torch import nn

from advkd import Student
from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import vp_weights
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.schedule import Schedule
from advkd.errors import InputError, TrainingError
from advkd.methods.diff_instruct import DiffInstruct, DiffInstructConfig, critic_condition, numbers_of
from advkd.methods.score import DIRECTIONS, OWN_ERROR
from advkd.models.denoiser import DenoiserNetwork
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.distillation import Distiller, distill
from advkd.training.trainer import Trainer

from ..conftest import TINY_STUDENT, conditional_student, tiny_student, tiny_teacher, tiny_unet
from .test_progressive import normal, tiny_images
from .test_progressive import tiny_student as tiny_denoiser

FLOAT64 = {"dtype": torch.float64, "progress": False}
MEAN, VARIANCE = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.3, 2.0]).double()
SCHEDULE = Schedule.edm(40, 0.05, 10.0)
TEACHER = GaussianTeacher(MEAN, VARIANCE, SCHEDULE)


class AffineGenerator(nn.Module):
    """x = offset + gain z."""

    def __init__(self, gain=(1.2, 0.7), offset=(-0.5, 0.3)):
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.tensor(values).double()) for values in (gain, offset))

    def forward(self, z):
        return self.offset + self.gain * z


class GaussianScore(nn.Module):
    """The posterior mean of N(mean, exp(log_variance)) data at any timestep: the exact form of an affine generator's score."""

    def __init__(self, schedule, mean=(0.0, 0.0), variance=(1.0, 1.0)):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(mean).double())
        self.log_variance = nn.Parameter(torch.tensor(variance).double().log())

    def forward(self, x, t, condition):
        alpha, noise = (w[:, None] for w in vp_weights(self.schedule.sigma(t)))
        variance = self.log_variance.exp()
        return self.mean + alpha * variance / (alpha**2 * variance + noise**2) * (x - alpha * self.mean)


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of a one-pass student on pairs with two score updates each and a critic: all three modules move."""
    config = DiffInstructConfig(
        updates=6, batch_size=4, score_updates=2, gan=0.1, critic_channels=4, score_ema=0.5, checkpoint_every=2, seed=seed
    )
    from advkd.data.trajectories import Trajectories

    teacher = tiny_teacher()
    student = tiny_student(weights)
    return Distiller(Trajectories(data), student, config, out, teacher=teacher, method="diff-instruct", **options)


def run_of(config, teacher, generator, score, out, data=None, given="none", **options):
    method = DiffInstruct(config, generator, score=score)
    method.given = given
    return Trainer(method, data or Tensors(), teacher, out, **{**FLOAT64, **options})


def test_the_gradient_is_that_of_the_integral_divergence(tmp_path):
    """For Gaussians d KL / d m = (m - mu) / (v + sigma^2), d KL / d c = c / (v + sigma^2) - c / (c^2 + sigma^2), by dimension.

    With the exact score of the generator in place, the update's own loss on 2^18 draws: D_q - D_p is sigma^2 of the scores'
    difference, and the mean over dimensions halves it. Five standard errors, estimated from sixteen parts.
    """
    generator = AffineGenerator()
    m, c = generator.offset.detach(), generator.gain.detach()
    config = DiffInstructConfig(updates=1, batch_size=2**14)
    run = run_of(config, TEACHER, generator, GaussianScore(SCHEDULE, m.tolist(), c.square().tolist()), tmp_path)
    method, found, wanted = run.method, [], []
    for part in range(16):
        draw = Draw(0, part * 2**14, 2**14, "cpu", torch.float64)
        sigma = method.noise_levels(draw, "level")
        x = generator(draw.normal("z", 2))
        loss = (method.direction(x, draw, sigma) * x).mean()
        found.append(torch.stack(torch.autograd.grad(loss, (generator.offset, generator.gain))))
        s = (sigma**2)[:, None]
        by_mean = s * (m - MEAN) / (VARIANCE + s)
        by_gain = s * (c / (VARIANCE + s) - c / (c**2 + s))
        wanted.append(torch.stack([by_mean.mean(0), by_gain.mean(0)]) / 2)
    found, wanted = torch.stack(found), torch.stack(wanted)
    error = (found - wanted).std(0) / 4
    assert ((found - wanted).mean(0).abs() < 5 * error).all()
    assert (found.mean(0).abs() > 20 * error).all()


@pytest.mark.parametrize("weight", DIRECTIONS)
@pytest.mark.parametrize("score_updates", [1, 5])
def test_the_generator_ends_with_the_datas_moments(weight, score_updates, tmp_path):
    """Mean and deviation of an affine generator on Gaussian data, whose score network has the exact form.

    What is left is the lag of the score and the noise of the last, small updates, a few hundredths.
    """
    config = DiffInstructConfig(
        updates=800,
        batch_size=256,
        learning_rate=0.02,
        final_learning_rate=0.01,
        score_learning_rate=0.03,
        score_updates=score_updates,
        ema=0.99,
        clip=0.0,
        weight=weight,
    )
    network = run_of(config, TEACHER, AffineGenerator(), GaussianScore(SCHEDULE), tmp_path).run()
    assert torch.allclose(network.offset, MEAN, rtol=0, atol=0.05)
    assert torch.allclose(network.gain.abs(), VARIANCE.sqrt(), rtol=0, atol=0.05)


def test_pairs_hold_the_sign_that_a_divergence_leaves_open(tmp_path):
    """x = offset - gain z has the same distribution; the squared error on pairs tells them apart."""
    z = normal(512, 2)
    pairs = Tensors(z=z, images=MEAN - VARIANCE.sqrt() * z)
    config = DiffInstructConfig(
        updates=1000, batch_size=64, learning_rate=0.02, final_learning_rate=0.01, score_learning_rate=0.03, regression=1.0, clip=0.0
    )
    network = run_of(config, TEACHER, AffineGenerator(), GaussianScore(SCHEDULE), tmp_path, pairs, "pairs").run()
    assert torch.allclose(network.gain, -VARIANCE.sqrt(), rtol=0, atol=0.05)
    assert torch.allclose(network.offset, MEAN, rtol=0, atol=0.05)


class Perceptron(nn.Module):
    """Generator or x0-network of two dimensions."""

    def __init__(self, inputs, width=64, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
            ).double()

    def forward(self, x):
        return self.layers(x)


class Denoising(nn.Module):
    """x0 by the state and log sigma, with EDM's skip of data of deviation 1.4."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.inner = schedule, Perceptron(3, 96, seed=1)

    def forward(self, x, t, condition):
        sigma = self.schedule.sigma(t)[:, None]
        y = x * torch.hypot(sigma, torch.ones_like(sigma))
        scale = torch.hypot(sigma, torch.full_like(sigma, 1.4))
        correction = self.inner(torch.cat((y / scale, sigma.log() / 4), dim=1))
        return (1.4 / scale) ** 2 * y + 1.4 * sigma / scale * correction


def modes_kept(network, teacher, n=4000):
    """Share of the mixture's components that at least a fifth of their share of samples lie within three deviations of."""
    with torch.no_grad():
        x = network(normal(n, 2, seed=9))
    distances = torch.cdist(x, teacher.means)
    near = distances.min(dim=1)
    counts = torch.bincount(near.indices[near.values < 3 * math.sqrt(teacher.variance)], minlength=len(teacher.means))
    return (counts > 0.2 * n / len(teacher.means)).double().mean().item()


@pytest.mark.slow
def test_pairs_keep_modes_of_25_gaussians(tmp_path):
    """A small generator by the divergence alone loses modes; the teacher's pairs beside it keep more."""
    teacher = MixtureTeacher.from_preset("25-gaussians", Schedule.edm(100, 0.05, 10.0))
    z = normal(4096, 2)
    pairs = Tensors(z=z, images=teacher.sample(4096, solver="ddim", steps=50))
    kept = {}
    for name, regression in (("alone", 0.0), ("pairs", 1.0)):
        config = DiffInstructConfig(
            updates=2000, batch_size=256, learning_rate=2e-3, score_learning_rate=2e-3, score_updates=2, regression=regression
        )
        given = (pairs, "pairs") if regression else (None, "none")
        network = run_of(config, teacher, Perceptron(2), Denoising(teacher.schedule), tmp_path / name, *given).run()
        kept[name] = modes_kept(network, teacher)
    assert kept["pairs"] >= kept["alone"], kept
