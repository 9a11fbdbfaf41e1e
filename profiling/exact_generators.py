"""Small generators whose own distributions, and with these their exact scores, are known; and score networks for them.

The posterior mean D* = E[x0 | x_t] of an affine generator's images is a closed form, that of a generator of one number a
quadrature over its noise z.
"""

import math

import torch
from torch import nn

from advkd.diffusion.denoiser import noised, vp_weights
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.exact_teacher import ExactTeacher
from advkd.diffusion.schedule import Schedule

SCHEDULE = Schedule.edm(20, 0.1, 10.0)
NODES = 2001
"""Nodes of the trapezoidal rule over z in [-8, 8]."""


class Affine(nn.Module):
    """Generator x = offset + gain z."""

    def __init__(self, gain=(1.2, 0.7), offset=(-0.5, 0.3)):
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in (gain, offset))

    def forward(self, z):
        return self.offset + self.gain * z


class GaussianScore(nn.Module):
    """Posterior mean of N(mean, exp(log_variance)): the exact form of an affine generator's score."""

    def __init__(self, mean, variance):
        super().__init__()
        self.mean, self.log_variance = nn.Parameter(mean.clone()), nn.Parameter(variance.log())

    def forward(self, x, t, condition):
        alpha, noise = (w[:, None] for w in vp_weights(SCHEDULE.sigma(t)))
        variance = self.log_variance.exp()
        return self.mean + alpha * variance / (alpha**2 * variance + noise**2) * (x - alpha * self.mean)


class Perceptron(nn.Module):
    """Two hidden layers in float64, drawn by a seed."""

    def __init__(self, inputs, outputs, width, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = (nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.layers = nn.Sequential(*hidden, nn.Linear(width, outputs)).double()

    def forward(self, x):
        return self.layers(x)


class PerceptronScore(nn.Module):
    """Posterior mean by a perceptron of the state and log sigma, behind the skip of N(0, deviation^2) (Karras et al. 2022)."""

    def __init__(self, dimensions, deviation, seed):
        super().__init__()
        self.deviation, self.inner = deviation, Perceptron(dimensions + 1, dimensions, 64, seed)

    def forward(self, x, t, condition):
        sigma = SCHEDULE.sigma(t)[:, None]
        y, scale = x * torch.hypot(sigma, torch.ones_like(sigma)), torch.hypot(sigma, torch.full_like(sigma, self.deviation))
        found = self.inner(torch.cat((y / scale, sigma.log() / 4), dim=1))
        return (self.deviation / scale) ** 2 * y + self.deviation * sigma / scale * found


class Pushforward(ExactTeacher):
    """Images g(z) of one number by a generator of one number, z standard normal, by the trapezoidal rule over z in [-8, 8].

    Args:
        generator: module of ``(N, 1)``.
        nodes: of the rule.
    """

    @torch.no_grad()
    def __init__(self, generator, nodes=NODES):
        super().__init__((1,), SCHEDULE)
        z = torch.linspace(-8, 8, nodes, dtype=torch.float64)
        self.images = generator(z[:, None])[:, 0]
        self.log_weights = (-z.square() / 2).log_softmax(0)

    def x0(self, x, alpha, noise, labels=None):
        """sum_i w_i g(z_i) N(x; alpha g(z_i), noise^2) / sum_i w_i N(x; alpha g(z_i), noise^2); see the base class."""
        exponents = self.log_weights - (x - alpha * self.images).square() / (2 * noise**2)
        return exponents.softmax(1) @ self.images[:, None]

    def log_density(self, x, sigma):
        """Log density of states ``(N, 1)`` at one noise level: ``(N,)``."""
        alpha, noise = vp_weights(torch.as_tensor(sigma, dtype=torch.float64))
        return mixture_log_density(x, alpha * self.images, self.log_weights, noise**2)


def mixture_log_density(x, centres, log_weights, variance):
    """Log density ``(N,)`` of numbers ``(N, 1)`` under Gaussians of one variance around ``(K,)`` centres."""
    exponents = log_weights - (x - centres).square() / (2 * variance)
    return exponents.logsumexp(1) - 0.5 * torch.log(2 * math.pi * variance)


def gaussian_of(generator):
    """The distribution of an affine generator's images."""
    return GaussianTeacher(generator.offset.detach(), generator.gain.detach().square(), SCHEDULE)


def gaussian_divergence(generator, teacher):
    """KL divergence of an affine generator's states from the teacher's at the lowest noise level."""
    alpha, noise = vp_weights(SCHEDULE.sigma(0.0))
    data, covariance = teacher.mean, teacher.covariance.diag()
    own, wanted = (alpha**2 * variance + noise**2 for variance in (generator.gain.detach().square(), covariance))
    shift = (alpha * (generator.offset.detach() - data)).square()
    return 0.5 * (own / wanted + shift / wanted - 1 - (own / wanted).log()).sum().item()


def mixture_divergence(generator, teacher):
    """KL divergence of a generator's states from a mixture's at the lowest noise level, by the trapezoidal rule."""
    own, (alpha, noise) = Pushforward(generator), vp_weights(SCHEDULE.sigma(0.0))
    low, high = (alpha * own.images.aminmax()[i].item() + side for i, side in ((0, -1.0), (1, 1.0)))
    x = torch.linspace(low, high, NODES, dtype=torch.float64)
    log_q = own.log_density(x[:, None], SCHEDULE.sigma(0.0))
    spread = alpha**2 * teacher.variance + noise**2
    log_p = mixture_log_density(x[:, None], alpha * teacher.means[:, 0], teacher.weights.log(), spread)
    return torch.trapezoid(log_q.exp() * (log_q - log_p), x).item()


@torch.no_grad()
def refinement(generator):
    """Largest change of D* at all levels when the nodes are doubled, at noised images of z and eps from -4 to 4."""
    axes = (torch.linspace(-4, 4, n, dtype=torch.float64) for n in (17, 5))
    z, eps, sigma = (column[:, None] for column in torch.cartesian_prod(*axes, SCHEDULE.sigma(torch.arange(len(SCHEDULE)))).T)
    x = noised(generator(z), eps, sigma[:, 0])
    coarse, fine = (Pushforward(generator, nodes).predict(x, sigma[:, 0])[0] for nodes in (NODES, 2 * NODES - 1))
    return (coarse - fine).abs().max().item()
