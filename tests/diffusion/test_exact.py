"""Teachers whose denoiser is known: their formulas against densities, integrals and sums written out here."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from advkd.diffusion.exact import ExactTeacher, FiniteSetTeacher, GaussianTeacher, MixtureTeacher
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError

from ..conftest import DEFAULTS, other_default
from .runs import DETERMINISTIC, double, fine_flow, log_snr_schedule

COVARIANCE = double([[1.5, 0.4, 0.0], [0.4, 0.6, -0.1], [0.0, -0.1, 0.05]])
MEANS = double([[-1.0, 0.4], [0.8, -0.2], [0.1, 1.5]])
IMAGES = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
CLASSES = torch.arange(12) % 3
SIGMAS = double([0.1, 0.5, 1.0, 3.0, 20.0])


def gaussian(coordinates="vp"):
    return GaussianTeacher(double([0.5, -1.0, 0.25]), COVARIANCE, coordinates=coordinates)


def mixture(coordinates="vp"):
    return MixtureTeacher(MEANS, [1.0, 2.0, 5.0], 0.2, coordinates=coordinates)


def grouped(coordinates="vp"):
    """Two components of class 0, one of class 1, and one of class 2."""
    means, labels = torch.cat((MEANS, -MEANS[:1])), torch.tensor([0, 1, 0, 2])
    return MixtureTeacher(means, [1.0, 2.0, 5.0, 2.0], 0.2, coordinates=coordinates, labels=labels)


def finite_set(coordinates="vp"):
    return FiniteSetTeacher(IMAGES, CLASSES, coordinates=coordinates)


def gaussian_density(x, alpha, noise, label):
    return MultivariateNormal(alpha * gaussian().mean, alpha**2 * COVARIANCE + noise**2 * torch.eye(3).double()).log_prob(x)


def log_mixture(x, centres, shares, alpha, spread):
    """Log density of a mixture of spherical Gaussians around alpha times the centres, up to what is no function of x."""
    squares = (x.flatten() - alpha * centres.flatten(1)).square().sum(1)
    return torch.logsumexp(shares.log() - squares / (2 * spread), dim=0)


def mixture_density(x, alpha, noise, label):
    shares = double([1.0, 2.0, 5.0]) if label in (None, 3) else torch.nn.functional.one_hot(torch.tensor(label), 3).double()
    return log_mixture(x, MEANS, shares, alpha, alpha**2 * 0.2 + noise**2)


def grouped_density(x, alpha, noise, label):
    means, shares = grouped().means, double([1.0, 2.0, 5.0, 2.0])
    shares = shares if label in (None, 3) else torch.where(torch.tensor([0, 1, 0, 2]) == label, shares, 0.0)
    return log_mixture(x, means, shares, alpha, alpha**2 * 0.2 + noise**2)


def finite_set_density(x, alpha, noise, label):
    shares = torch.ones(12).double() if label in (None, 3) else (CLASSES == label).double()
    return log_mixture(x, IMAGES, shares, alpha, noise**2)


CASES = {
    "gaussian": (gaussian, gaussian_density),
    "mixture": (mixture, mixture_density),
    "grouped": (grouped, grouped_density),
    "set": (finite_set, finite_set_density),
}


def states(teacher, coordinates="vp"):
    """A state at each of :data:`SIGMAS`."""
    z = torch.randn(len(SIGMAS), *teacher.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sigmas = SIGMAS.reshape(-1, *[1] * len(teacher.shape))
    y = teacher.data(len(SIGMAS), seed=3) + sigmas * z
    return y if coordinates == "ve" else y / (1 + sigmas**2).sqrt()


@pytest.mark.parametrize("label", [None, 0, 2, 3])
@pytest.mark.parametrize("coordinates", ["vp", "ve"])
@pytest.mark.parametrize("case", CASES)
def test_tweedie(case, coordinates, label):
    """The score is the gradient of the log density, one level a sample; label 3 stands for no class."""
    make, density = CASES[case]
    teacher = make(coordinates)
    x = states(teacher, coordinates)
    labels = None if label is None or case == "gaussian" else torch.full((len(x),), label)
    score, (x0, eps) = teacher.score(x, SIGMAS, labels), teacher.predict(x, SIGMAS, labels)
    for i, sigma in enumerate(SIGMAS.tolist()):
        alpha, noise = (1.0, sigma) if coordinates == "ve" else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
        state = x[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(density(state, alpha, noise, label), state)
        bound = 1e-12 * (1 + 1 / noise**2)
        assert (score[i] - gradient).abs().max() <= bound and (eps[i] + noise * gradient).abs().max() <= bound
        assert (alpha * x0[i] + noise * eps[i] - x[i]).abs().max() <= 1e-13 * (1 + sigma)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_posterior_mean_by_quadrature(sigma):
    teacher = MixtureTeacher.from_preset("two-gaussians", coordinates="ve")
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    prior = sum(torch.exp(-((grid - c) ** 2) / 0.2) for c in (-1, 1))
    x = double([-1.3, -0.2, 0.0, 0.7, 2.5])
    # The trapezoidal rule on smooth functions that vanish at both ends is exact to rounding.
    weight = prior * torch.exp(-((x[:, None] - grid) ** 2) / (2 * sigma**2))
    wanted = (weight * grid).sum(1) / weight.sum(1)
    assert (teacher.predict(x[:, None], sigma)[0][:, 0] - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("coordinates", ["vp", "ve"])
def test_flow(coordinates):
    teacher = gaussian(coordinates)
    scale = lambda s: 1.0 if coordinates == "ve" else math.hypot(1, s)  # noqa: E731
    x = states(teacher, coordinates)[:1].expand(4, 3) + torch.arange(4).double()[:, None]
    there = teacher.flow(x, 2.0, 0.5)
    wanted = fine_flow(gaussian(), x * scale(2.0) / math.hypot(1, 2.0), 2.0, 0.5) * math.hypot(1, 0.5) / scale(0.5)
    assert (there - wanted).abs().max() <= 1e-9
    assert torch.allclose(teacher.flow(teacher.flow(x, 2.0, 0.9), 0.9, 0.5), there, rtol=0, atol=1e-13)
    assert torch.allclose(teacher.flow(there, 0.5, 2.0), x, rtol=0, atol=1e-12)
    each = teacher.flow(x, double([2.0] * 4), double([0.5, 0.1, 2.0, 0.0]))
    assert torch.allclose(each[0], there[0], rtol=0, atol=1e-14) and torch.allclose(each[2], x[2], rtol=0, atol=1e-14)
    assert torch.allclose(each[3], teacher.flow(x, 2.0, 0.0)[3], rtol=0, atol=1e-14)


def test_flow_takes_noise_to_the_data():
    """The marginal at sigma becomes that of the data: covariances of a map that is linear."""
    teacher, sigma = gaussian("ve"), 3.0
    columns = teacher.flow(torch.eye(3).double() + teacher.mean, sigma, 0.0) - teacher.mean
    found = columns.T @ (COVARIANCE + sigma**2 * torch.eye(3).double()) @ columns
    assert torch.allclose(found, COVARIANCE, rtol=0, atol=1e-13)


def test_finite_set_is_a_softmax():
    teacher, x = finite_set(), states(finite_set())
    for i, sigma in enumerate(SIGMAS.tolist()):
        alpha, noise = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        logits = [-((x[i] - alpha * image) ** 2).sum() / (2 * noise**2) for image in IMAGES]
        for label, chosen in ((None, range(12)), (1, range(1, 12, 3)), (3, range(12))):
            share = torch.softmax(torch.stack([logits[j] for j in chosen]), 0)
            wanted = sum(s * IMAGES[j] for s, j in zip(share, chosen))
            labels = None if label is None else torch.tensor([label])
            assert torch.allclose(teacher.predict(x[i : i + 1], sigma, labels)[0][0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_does_not_depend_on_its_batch(case):
    teacher = CASES[case][0]()
    x, labels = states(teacher), None if case == "gaussian" else torch.tensor([0, 3, 1, 2, 3])
    for sigma in (1.0, SIGMAS):
        together = teacher.predict(x, sigma, labels)
        for i in range(len(x)):
            one = teacher.predict(
                x[i : i + 1], SIGMAS[i].item() if sigma is SIGMAS else sigma, None if labels is None else labels[i : i + 1]
            )
            assert all(torch.allclose(a[0], b[i], rtol=0, atol=1e-12) for a, b in zip(one, together))


@pytest.mark.parametrize("case", ["mixture", "set"])
def test_the_classifiers_gradient(case):
    """grad log p(class | x) against the classes' densities and their shares."""
    make, density = CASES[case]
    teacher = make()
    x, labels = states(teacher), torch.tensor([0, 1, 2, 0, 3])
    found = teacher.log_probability_gradient(x, 1 / (1 + SIGMAS**2), labels)
    for i, sigma in enumerate(SIGMAS.tolist()):
        state, (alpha, noise) = x[i].clone().requires_grad_(), (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
        log_p = density(state, alpha, noise, labels[i].item()) - density(state, alpha, noise, None)
        (wanted,) = torch.autograd.grad(log_p, state)
        assert (found[i] - wanted).abs().max() <= 1e-12 * (1 + 1 / noise**2)
    assert torch.equal(found[4], torch.zeros_like(found[4]))
    one = teacher.log_probability_gradient(x[:1], 1 / (1 + SIGMAS[0].item() ** 2), labels[:1])
    assert torch.allclose(one, found[:1], rtol=1e-10, atol=0)


N = 40_000


def assert_mean(values, wanted):
    """Six standard errors: 2e-9 for a false alarm in each of the few dozen numbers compared here."""
    assert ((values.mean(0) - wanted).abs() <= 6 * values.std(0) / math.sqrt(len(values))).all()


def test_data_of_a_gaussian():
    teacher = gaussian()
    x = teacher.data(N, seed=5)
    centred = x - teacher.mean
    assert_mean(x, teacher.mean)
    assert_mean((centred[:, :, None] * centred[:, None]).flatten(1), COVARIANCE.flatten())


def test_data_of_a_mixture():
    teacher = mixture()
    x = teacher.data(N, seed=5)
    assert_mean(x, (teacher.weights[:, None] * MEANS).sum(0))
    second = (teacher.weights[:, None, None] * MEANS[:, :, None] * MEANS[:, None]).sum(0) + 0.2 * torch.eye(2).double()
    assert_mean((x[:, :, None] * x[:, None]).flatten(1), second.flatten())


def test_data_of_a_set():
    x = finite_set().data(N, seed=5)
    drawn = (x.flatten(1)[:, None] == IMAGES.flatten(1)).all(2)
    assert (drawn.sum(1) == 1).all()
    assert_mean(drawn.double(), torch.full((12,), 1 / 12).double())


@pytest.mark.parametrize("make", [gaussian, mixture])
def test_data_and_noise_of_one_seed_are_independent(make):
    """Noised data of one seed has the marginal's variance: neither draws the other's numbers again."""
    teacher = make()
    x0, noise = teacher.data(N, seed=7), teacher.noise(N, seed=7)
    assert_mean(((x0 - x0.mean(0))[:, :, None] * noise[:, None]).flatten(1), torch.zeros(teacher.shape[0] ** 2).double())


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_noise_power(sigma):
    """E|eps|^2 / d in closed form, by quadrature, and by the base class's draws."""
    level = Schedule.linear().at_sigma(sigma)
    teacher = gaussian()
    exact = (sigma**2 / (torch.linalg.eigvalsh(COVARIANCE) + sigma**2)).mean().item()
    assert math.isclose(teacher.noise_power(level), exact, rel_tol=1e-12)
    # |eps|^2 / d of a sample has a deviation below 2 / sqrt(d), and there are 4,096.
    assert abs(ExactTeacher.noise_power(teacher, level) - exact) <= 6 * 2 / math.sqrt(3 * 4096)
    pair = MixtureTeacher.from_preset("two-gaussians")
    y = torch.linspace(-12 - 8 * sigma, 12 + 8 * sigma, 20_001, dtype=torch.float64)
    density = sum(torch.exp(-((y - c) ** 2) / (2 * (0.1 + sigma**2))) for c in (-1, 1))
    eps = (y - MixtureTeacher.from_preset("two-gaussians", coordinates="ve").predict(y[:, None], sigma)[0][:, 0]) / sigma
    wanted = ((density * eps**2).sum() / density.sum()).item()
    assert abs(pair.noise_power(level) - wanted) <= 6 * math.sqrt(2 / 4096)


def test_presets():
    grid, ring, pair = (MixtureTeacher.from_preset(name) for name in ("25-gaussians", "8-gaussians", "two-gaussians"))
    assert sorted(map(tuple, grid.means.tolist())) == [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    assert torch.allclose(ring.means.norm(dim=1), double([2.0] * 8), rtol=0, atol=1e-15) and len(ring.means.unique(dim=0)) == 8
    assert pair.means.tolist() == [[-1], [1]] and (grid.variance, ring.variance, pair.variance) == (0.05**2, 0.1**2, 0.1)
    assert all(torch.equal(teacher.weights, teacher.weights[:1].expand(teacher.num_classes)) for teacher in (grid, ring, pair))
    assert pair.null_class == 2 and gaussian().null_class is None


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in ("deis-2", "deis-3")])
def test_samples_of_a_set_are_of_the_set(name):
    """The last step is to the posterior mean at sigma = 0.01, which is one image: the others are 1 apart or more.

    (DEIS extrapolates the noise there.)
    """
    teacher = finite_set()
    assert torch.pdist(IMAGES.flatten(1)).min() > 1
    x = teacher.sample(20, seed=1, solver=Solver(name, "karras"), steps=12)
    nearest = torch.cdist(x.flatten(1), IMAGES.flatten(1)).min(1)
    assert nearest.values.max() <= 1e-12 and len(nearest.indices.unique()) > 3
    only = teacher.sample(8, seed=1, solver=Solver(name, "karras"), steps=12, labels=2)
    assert (CLASSES[torch.cdist(only.flatten(1), IMAGES.flatten(1)).argmin(1)] == 2).all()


@pytest.mark.parametrize("other", DEFAULTS)
def test_torch_defaults_change_nothing(other):
    schedule = log_snr_schedule(-2, 4, 20)

    def numbers():
        teachers = [MixtureTeacher.from_preset(name, schedule) for name in ("25-gaussians", "8-gaussians", "two-gaussians")]
        runs = [teacher.sample(2, solver="unipc", steps=4, labels=1, guidance=1.0) for teacher in teachers]
        return [tensor.tolist() for teacher in teachers for tensor in (teacher.means, teacher.data(3))], [
            x.tolist() for x in runs
        ]

    wanted = numbers()
    with other_default(other):
        assert numbers() == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianTeacher(torch.zeros(2), torch.ones(3)),
            r"covariance must be \(2,\) or a symmetric \(2, 2\), got \(3,\)",
        ),
        (lambda: GaussianTeacher(torch.zeros(2), double([[1, 0.5], [0, 1]])), "covariance must be .* symmetric"),
        (
            lambda: GaussianTeacher(torch.zeros(2), torch.tensor([1.0, 0.0])),
            "covariance must be positive definite, its least variance is 0",
        ),
        (lambda: MixtureTeacher(MEANS, [1.0, 2.0], 0.1), "weights must be 3 positive numbers and variance positive"),
        (lambda: MixtureTeacher(MEANS, [1.0, 2.0, 0.0], 0.1), "weights must be 3 positive numbers"),
        (lambda: MixtureTeacher(MEANS, [1.0, 2.0, 3.0], 0.0), "variance positive"),
        (lambda: MixtureTeacher(MEANS, [1.0, 2.0, 3.0], 0.1, labels=torch.arange(2)), r"labels must be \(3,\), one for each"),
        (lambda: MixtureTeacher(MEANS, [1.0, 2.0, 3.0], 0.1, labels=torch.tensor([0, 2, 0])), "labels must be whole numbers 0"),
        (lambda: MixtureTeacher.from_preset("9-gaussians"), "name must be one of 25-gaussians, .*, got '9-gaussians'"),
        (lambda: FiniteSetTeacher(torch.zeros(0, 3)), r"images must be \(M, ...\) with M >= 1"),
        (lambda: FiniteSetTeacher(IMAGES, CLASSES[:3]), r"labels \(M,\)"),
        (
            lambda: FiniteSetTeacher(IMAGES, 2 * CLASSES),
            r"labels must be whole numbers 0 .. K - 1, each of them of an image, got \[0, 2, 4\]",
        ),
        (lambda: FiniteSetTeacher(IMAGES, CLASSES - 1), "labels must be whole numbers 0 .. K - 1"),
        (lambda: FiniteSetTeacher(IMAGES, CLASSES * 0.5), "labels must be whole numbers 0 .. K - 1"),
        (lambda: FiniteSetTeacher(torch.zeros(2, 3).byte()), "images must be finite floating-point numbers, got torch.uint8"),
        (lambda: FiniteSetTeacher(torch.full((2, 3), torch.nan)), "images must be finite"),
        (lambda: GaussianTeacher(torch.zeros(1), torch.tensor([torch.nan])), "mean and covariance must be finite numbers"),
        (lambda: gaussian("sub"), "coordinates must be one of vp, ve, got 'sub'"),
        (lambda: gaussian().predict(torch.zeros(2, 3), torch.ones(3)), r"sigma must be a number or one per sample \(2\)"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()
