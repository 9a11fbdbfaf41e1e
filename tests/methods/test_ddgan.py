"""DDGAN: with q(x0 | x_t) any number of steps gives the data, and the trained generator is q(x0 | x_t)."""

import math
import os
from typing import NamedTuple

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.data.trajectories import Trajectories
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.loop import SamplingLoop
from advkd.diffusion.recorder import record_trajectories
from advkd.diffusion.schedule import IMAGE, Schedule
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.errors import BackendUnavailableError, InputError
from advkd.methods import ddgan
from advkd.methods.base import Stage
from advkd.methods.ddgan import DDGAN, DDGANConfig
from advkd.models.denoiser import embedding_of, pack
from advkd.ops.critic.update import critic_gradients
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_recording, tiny_teacher
from .test_progressive import tiny_images, tiny_student

SEED = int(os.environ.get("SEED", 0))
FLOAT64 = {"dtype": torch.float64, "progress": False}
MEAN, VARIANCE = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.3, 2.0]).double()
DATA = GaussianTeacher(MEAN, VARIANCE)
THREE = Schedule(torch.tensor([0.5, 0.1, 4e-5]).double())


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates in three steps, with two updates of the critic each, every third of which has the penalty."""
    config = DDGANConfig(
        updates=6, batch_size=4, steps=3, latent=5, critic_updates=2, r1_every=3, ema=0.5, checkpoint_every=2, seed=seed
    )
    return DenoiserDistiller("ddgan", config, tiny_student(weights), out, None, tiny_images(), **options)


def posterior(alpha_bar):
    """Gain, offset and deviation of q(x0 | x_t) = N(gain x_t + offset, deviation^2)."""
    variance = alpha_bar * VARIANCE + 1 - alpha_bar
    gain = math.sqrt(alpha_bar) * VARIANCE / variance
    return gain, MEAN - gain * math.sqrt(alpha_bar) * MEAN, (VARIANCE * (1 - alpha_bar) / variance).sqrt()


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(c_0 x0 + c_x x_t, c_z^2)."""

    c_0: float
    c_x: float
    c_z: float


def coefficients(alpha_bars):
    """The posteriors of the steps between levels, the last to the image."""
    found = []
    for a, b in zip(alpha_bars, [*alpha_bars[1:], 1.0]):
        c_0, c_x = math.sqrt(b) * (1 - a / b) / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a)
        found.append(Posterior(c_0, c_x, math.sqrt((1 - b) / (1 - a) * (1 - a / b))))
    return found


def moments(alpha_bars, affine, exact=False):
    """Mean and variance of samples that begin as N(0, 1), or as x_T itself, and go through steps of an affine generator."""
    mean, variance = torch.zeros(2).double(), torch.ones(2).double()
    if exact:
        mean, variance = math.sqrt(alpha_bars[0]) * MEAN, alpha_bars[0] * VARIANCE + 1 - alpha_bars[0]
    for step, (gain, offset, deviation) in zip(coefficients(alpha_bars), affine, strict=True):
        mean, variance = (
            step.c_0 * (gain * mean + offset) + step.c_x * mean,
            (step.c_0 * gain + step.c_x) ** 2 * variance + (step.c_0 * deviation) ** 2 + step.c_z**2,
        )
    return mean, variance


class Generator(torch.nn.Module):
    """Gain, offset and deviation of x0 by step and dimension, in the place of a network that gives v."""

    def __init__(self, alpha_bars, schedule):
        super().__init__()
        self.alpha_bars = torch.tensor(alpha_bars).double()
        self.times = schedule.t((1 / self.alpha_bars - 1).sqrt())
        self.affine = torch.nn.Parameter(torch.tensor([0.1, 0.0, 1.0]).double()[:, None, None].repeat(1, len(alpha_bars), 2))

    def forward(self, x, t, condition):
        k = (t[:, None] - self.times).abs().argmin(1)
        gain, offset, deviation = self.affine[:, k, :, None, None]
        a = self.alpha_bars[k, None, None, None]
        image = gain * x + offset + deviation * condition[:, :2, None, None]
        return (a.sqrt() * x - image) / (1 - a).sqrt()


class Quadratic(torch.nn.Module):
    """All products of x_s and x_t of a dimension, by step: it has the logarithm of two Gaussians' ratio among its values."""

    def __init__(self, steps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(steps, 6, 2).double())

    def forward(self, x, condition):
        x, x_t, k = x.flatten(1), condition[:, :2].flatten(1), condition[:, 2:, 0, 0].argmax(1)
        products = torch.stack((torch.ones_like(x), x, x_t, x * x, x * x_t, x_t * x_t), dim=1)
        return (products * self.weight[k]).sum((1, 2))


def made(steps, schedule=DATA.schedule, **changes):
    """A method on Gaussian images of two channels and one pixel, with an affine generator and a quadratic critic."""
    config = DDGANConfig(**{"steps": steps, "latent": 2, "critic_backend": "autograd", "r1": 0.0, **changes})
    student = Generator(DDGAN(config, torch.nn.Identity(), schedule).alpha_bars, schedule)
    return DDGAN(config, student, schedule, Quadratic(steps))


def images(n):
    return Tensors(images=DATA.data(n)[:, :, None, None])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_with_the_true_posterior_any_number_of_steps_gives_the_data(steps):
    """Without the latent, by posterior means, hardly any deviation is left: the reason for the method."""
    method = made(steps)
    oracle = [posterior(a) for a in method.alpha_bars]
    mean, variance = moments(method.alpha_bars, oracle, exact=True)
    assert torch.allclose(mean, MEAN, rtol=0, atol=1e-12) and torch.allclose(variance, VARIANCE, rtol=0, atol=1e-12)
    mean, variance = moments(method.alpha_bars, oracle)
    # Noise alone is taken for x_T, whose mean and variance differ from it by less than sqrt(alpha_bar) = 0.0064.
    assert torch.allclose(mean, MEAN, rtol=0, atol=0.01) and torch.allclose(variance, VARIANCE, rtol=1e-4)
    means = [(gain, offset, 0 * deviation) for gain, offset, deviation in oracle]
    assert (moments(method.alpha_bars, means)[1] < {1: 1e-4, 2: 0.2, 4: 0.5}[steps] * VARIANCE).all()
    # The product's own sampler, on the same generator.
    with torch.no_grad():
        method.student.affine.copy_(torch.stack([torch.stack(part) for part in zip(*oracle)]))
    found = drawn(method, 40_000)
    error = 5 / math.sqrt(len(found))
    assert torch.allclose(found.mean(0), mean, rtol=0, atol=error * VARIANCE.max().sqrt())
    assert torch.allclose(found.var(0), variance, rtol=error * math.sqrt(2))


def drawn(method, n, start=0):
    """Samples by the sampler of the method's students."""
    sampler = method.sampler(Stage(1, 1, 1))
    program = sampler.solver.program(DATA.schedule, sampler.steps, "v_prediction")
    network = lambda x, place: method.student(x, place.t.float().expand(len(x)), pack(latent=place.latent).double())  # noqa: E731
    loop = SamplingLoop(network, (n, 2, 1, 1), program, 7, "cpu", dtype=torch.float64, latent=2)
    loop.start(DATA.noise(n, 3, start)[:, :, None, None], start)
    for _ in range(sampler.steps):
        loop.step()
    return loop.x.flatten(1).clone()


def test_latents_are_those_of_the_sample_and_of_the_step():
    method = made(3)
    whole = drawn(method, 6)
    assert torch.equal(whole[4:], drawn(method, 2, start=4)) and not torch.equal(whole[:2], whole[4:])
    seen = []
    network = lambda x, place: seen.append(place.latent) or torch.zeros_like(x)  # noqa: E731
    program = Solver("ddpm", alpha_bars=method.alpha_bars).program(DATA.schedule, 3, "v_prediction")
    loop = SamplingLoop(network, (4, 2), program, 7, "cpu", latent=1000)
    loop.start(torch.zeros(4, 2), 0)
    for _ in range(3):
        loop.step()
    told = torch.stack(seen)
    assert told.shape == (3, 4, 1000) and len(torch.unique(told)) > 0.99 * told.numel()
    assert told.mean().abs() < 5 / math.sqrt(told.numel()) and abs(told.var() - 1) < 5 * math.sqrt(2 / told.numel())


def test_the_generator_ends_as_the_posterior(tmp_path):
    """Three steps: gains, offsets and deviations of q(x0 | x_t) at each, and the data's moments at the end.

    Errors are those of x_s, which is what the critic sees, in units of its deviation; their tolerance is what a batch of 1,024
    tells apart, its own error of a mean. Over three seeds the furthest was 0.012, that of a moment 0.016, that of x0 0.053.
    """
    config = {"updates": 3000, "batch_size": 1024, "learning_rate": 3e-3, "final_learning_rate": 0.01, "ema": 0.995}
    method = made(3, THREE, **config, critic_learning_rate=3e-2, r1=0.05, r1_every=5, clip=0.0)
    Trainer(method, images(2**16), None, tmp_path, **FLOAT64).run()
    found = method.averages["student"].affine.detach()
    for k, (a, after) in enumerate(zip(method.alpha_bars, (*method.alpha_bars[1:], 1.0))):
        state, deviation = ((level * VARIANCE + 1 - level).sqrt() for level in (a, after))
        (gain, offset, spread), wanted = found[:, k], posterior(a)
        errors = torch.stack(((gain - wanted[0]) * state, offset - wanted[1], spread.abs() - wanted[2]))
        assert (coefficients(method.alpha_bars)[k].c_0 * errors / deviation).abs().max() < 1 / 32, (k, errors)
        assert (errors.abs() / VARIANCE.sqrt()).max() < 0.08, (k, errors)
    mean, variance = moments(method.alpha_bars, found.unbind(1))
    assert ((mean - MEAN) / VARIANCE.sqrt()).abs().max() < 0.03 and (variance / VARIANCE - 1).abs().max() < 0.03


def test_the_pair_is_of_the_chain(tmp_path):
    """x_s - c_0 x0 - c_x x_t is the posterior's noise: of its variance, and independent of x_t."""
    seen = []

    class Spy(Quadratic):
        def forward(self, x, condition):
            seen.append((x.detach(), condition))
            return super().forward(x, condition)

    n, config = 50_000, {"updates": 1, "batch_size": 50_000}
    method = made(4, **config)
    method._critic = Spy(4)
    run = Trainer(method, images(n), None, tmp_path, **FLOAT64)
    x0 = run.data.batch(run.rows(0, n), (), torch.device("cpu"), torch.float64).images
    run.step()
    (fake, told), (x_s, same), *_ = seen  # the specification of critic_gradients scores the generated samples first
    assert torch.equal(told, same) and not torch.equal(fake, x_s)
    k = told[:, 2:, 0, 0].argmax(1)
    assert torch.equal(k, Draw(0, 0, n, "cpu", torch.float64).integers("step", 4))
    for number, step in enumerate(coefficients(method.alpha_bars)):
        on = k == number
        rest, x_t = (x_s - step.c_0 * x0 - step.c_x * told[:, :2])[on].flatten(1), told[on, :2].flatten(1)
        if not step.c_z:
            assert torch.allclose(x_s[on], x0[on])
            continue
        error = 5 / math.sqrt(len(rest))
        assert torch.allclose(rest.var(0), torch.full((2,), step.c_z**2).double(), rtol=math.sqrt(2) * error)
        assert ((rest * x_t).mean(0) / (rest.std(0) * x_t.std(0))).abs().max() < error
        # The generator gives 0.1 x_t + u at first: its own x_s has the posterior's coefficients and noise, too.
        x0_hat = fake[on].flatten(1) - (0.1 * step.c_0 + step.c_x) * x_t
        wanted = torch.full((2,), step.c_0**2 + step.c_z**2).double()
        assert torch.allclose(x0_hat.var(0), wanted, rtol=math.sqrt(2) * error)
        assert ((x0_hat * x_t).mean(0) / (x0_hat.std(0) * x_t.std(0))).abs().max() < error and len(rest) > n / 5


class LinearCritic(torch.nn.Module):
    """Scores that are linear in x_s, whose penalty is known."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 1)).double()

    def forward(self, x, condition):
        return self.layers(torch.cat((x, condition), dim=1)).squeeze(1)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_penalty_is_lazy_and_counts_as_often_as_it_waits(updates, tmp_path, monkeypatch):
    config = {"updates": 6, "batch_size": 8, "critic_updates": updates, "critic_backend": "auto"}
    method, seen = made(3, r1=0.5, r1_every=3, **config), []
    method._critic = critic = LinearCritic()

    def watched(*arguments, **options):
        slope = critic.layers[1].weight.detach()[0, :2].square().sum().item()
        seen.append((slope, critic_gradients(*arguments, **options)))
        return seen[-1][1]

    monkeypatch.setattr(ddgan, "critic_gradients", watched)
    run = Trainer(method, images(64), None, tmp_path, **FLOAT64)
    run.run()
    assert len(seen) == 6 * updates and method.evaluations(run.stages[0]) == (updates, 1)
    for number, (slope, found) in enumerate(seen):
        wanted = 0.5 / 2 * 3 * slope if number % 3 == 0 else 0.0
        assert found.penalty.item() == pytest.approx(wanted, rel=1e-12), number


def told_student(steps=4, classes=False, out=None):
    teacher = tiny_teacher(prediction_type="v_prediction") if not classes else None
    if classes:
        from .test_guided import tiny_teacher as conditional_teacher

        teacher = conditional_teacher()
    start = DenoiserStudent.from_teacher(teacher)
    config = DDGANConfig(updates=2, batch_size=4, steps=steps, latent=6, learning_rate=0.01, ema=0.0)
    data = (tiny_images(), torch.arange(20) % 3) if classes else tiny_images()
    return start, distill_denoiser("ddgan", config, start, out, data=data, progress=False)


def test_a_student_draws_in_steps_that_divide_its_own(tmp_path):
    start, student = told_student(4, out=tmp_path / "s")
    again = DenoiserStudent.from_pretrained(tmp_path / "s")
    assert again.evaluations == 4 and again.model.latent == 6 and embedding_of(again.model.unet).config.latent == 6
    whole = again.sample(4, seed=3)
    assert torch.equal(whole, student.sample(4, seed=3))
    assert torch.allclose(whole[2:], again.sample(2, seed=3, start=2), rtol=0, atol=1e-5)
    assert not torch.equal(again.sample(2, steps=2), again.sample(2, steps=1))
    with pytest.raises(InputError, match="steps must divide the 4 levels that are given, got 3"):
        again.sample(2, steps=3)
    with pytest.raises(InputError, match="guidance: .* draws with a latent and is not guided: leave it out"):
        again.sample(2, labels=[0, 0], guidance=1.0)
    # Another latent, another image of the same start noise: the embedding has been trained from zero.
    x_T = again.latents(2, seed=3)
    assert not torch.equal(again.draw(x_T, 1, seed=3), again.draw(x_T, 1, seed=4))
    untrained = start.told_more(0, latent=6)
    untrained.sampler = again.sampler
    assert torch.equal(untrained.draw(x_T, 1, seed=3), untrained.draw(x_T, 1, seed=4))


def test_a_conditional_student_is_told_its_class(tmp_path):
    _, student = told_student(2, classes=True, out=tmp_path / "s")
    assert student.model.num_classes == 3
    drawn = [student.sample(1, seed=1, labels=label) for label in (0, 1, None)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_what_fits_no_other_method_is_refused(tmp_path):
    _, student = told_student(2, out=tmp_path / "s")
    other = DDGANConfig(updates=1, batch_size=4, latent=7)
    with pytest.raises(InputError, match="latent must be 6, that of the student's own training, got 7"):
        distill_denoiser("ddgan", other, student, tmp_path / "out", data=tiny_images())
    from advkd.methods.consistency import ConsistencyConfig

    config = ConsistencyConfig(updates=1, batch_size=4)
    with pytest.raises(InputError, match="takes a latent, which consistency does not give: continue it by ddgan"):
        distill_denoiser("consistency", config, student, tmp_path / "out", data=tiny_images())
    with pytest.raises(InputError, match="--teacher takes a latent itself: name the teacher that it was distilled from"):
        distill_denoiser("consistency", config, tiny_student(), tmp_path / "out", teacher=student.model, data=tiny_images())
    assert not (tmp_path / "out").exists()


class OfFeatures(torch.nn.Module):
    """A critic of vectors, with scores of its own number."""

    def __init__(self, features, scores):
        super().__init__()
        self.layer = torch.nn.Linear(features, scores)

    def forward(self, x, condition):
        return self.layer(x.flatten(1)).squeeze(1)


def test_a_critic_that_does_not_fit_is_refused(tmp_path):
    student = torch.nn.Linear(1, 1)
    images = r"critic: it does not take images \(1, 8, 8\) and their conditions \(.*\): leave it out"
    for critic, message in (
        (torch.nn.Flatten(), images),
        (Two(), images),
        (OfFeatures(8, 1), images),
        (OfFeatures(64, 2), r"it gives \(2, 2\) for 2 images, not one"),
    ):
        method = DDGAN(DDGANConfig(), student, Schedule.linear(), critic)
        method.shape = (1, 8, 8)
        with pytest.raises(InputError, match=message):
            Trainer(method, Tensors(images=tiny_images()), None, tmp_path / "out", progress=False)
    for shape, message in (
        ((1, 24, 24), r"there is no critic of images \(1, 24, 24\) \(image_size must be 4 \* 2\^k, got 24\): resize them"),
        ((), r"critic: there is none of samples \(\), which are no images: name one"),
    ):
        method = DDGAN(DDGANConfig(), student, Schedule.linear())
        method.shape = shape
        with pytest.raises(InputError, match=message):
            Trainer(method, Tensors(images=tiny_images()), None, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_kernels_that_cannot_run_here_are_named_before_the_folder_is_made(tmp_path):
    config = DDGANConfig(updates=2, batch_size=4, steps=3, critic_backend="cuda")
    with pytest.raises(BackendUnavailableError, match=r"critic_backend cuda cannot run on cpu \(.*\): take auto or autograd"):
        DenoiserDistiller("ddgan", config, tiny_student(0), tmp_path / "out", None, tiny_images())
    assert not (tmp_path / "out").exists()


class Two(torch.nn.Module):
    """A critic without parameters that gives two tensors."""

    def forward(self, x, condition):
        return x, condition


def test_a_frozen_part_of_the_critic_stays(tmp_path):
    method = made(3, updates=1, batch_size=8, critic_backend="auto")
    method._critic = critic = LinearCritic()
    critic.layers[1].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    Trainer(method, images(64), None, tmp_path, **FLOAT64).run()
    after = critic.state_dict()
    assert torch.equal(before["layers.1.weight"], after["layers.1.weight"])
    assert not torch.equal(before["layers.1.bias"], after["layers.1.bias"])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_student_draws_by_the_steps_that_it_learnt(variance, tmp_path):
    """The posterior's variance, and no clamped x0 on the way, whatever the teacher's scheduler says."""
    teacher = tiny_teacher(prediction_type="v_prediction", variance_type=variance)
    config = DDGANConfig(updates=1, batch_size=4, steps=3, latent=2)
    start = DenoiserStudent.from_teacher(teacher)
    distill_denoiser("ddgan", config, start, tmp_path / "s", data=tiny_images(), progress=False)
    student = DenoiserStudent.from_pretrained(tmp_path / "s")
    program = student.model.program(student.sampler.solver, 3)
    alpha_bars = student.sampler.solver.alpha_bars
    assert start.model.clip == 1 and student.model.clip == math.inf and alpha_bars[0] == pytest.approx(4.0e-5, rel=0.02)
    for evaluation, wanted in zip(program, coefficients(alpha_bars), strict=True):
        found = evaluation.step
        assert (found.c_0, found.c_x, found.c_z) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert student.sample(4).abs().max() <= 1


def test_recordings_of_a_teacher_told_a_latent_are_no_pairs(tmp_path):
    _, student = told_student(2, out=tmp_path / "s")
    config = tiny_recording(num=8, steps=2, solver="ddim", spacing="trailing")
    record_trajectories(Teacher.from_pretrained(tmp_path / "s"), config, tmp_path / "paths", progress=False)
    with pytest.raises(InputError, match=r"unpaired \(a teacher told a latent: x_0 is not a function of z\): record another's"):
        Trajectories(tmp_path / "paths").require_paired()
    with pytest.raises(InputError, match="takes a guidance weight or a latent already: begin with one"):
        student.told_more(0, guidance=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"critic_updates": 0}, "critic_updates must be at least 1, got 0"),
        ({"r1": -1.0}, "r1 must be at least 0 and finite, got -1.0"),
        ({"r1_every": 0}, "r1_every must be at least 1, got 0"),
        ({"betas": (0.5, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.5, 1.0\)"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate must be positive and finite, got 0.0"),
        ({"critic_channels": 256}, "critic_channels must be at most critic_max_channels, 128, got 256"),
        ({"critic_backend": "none"}, "critic_backend must be one of autograd, auto, .*, got 'none'"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_that_cannot_work_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        DDGAN(DDGANConfig(**changes), torch.nn.Identity(), Schedule.linear())


def test_more_steps_than_levels_are_refused():
    with pytest.raises(InputError, match="steps must be between 1 and the schedule's 10 timesteps, got 11"):
        DDGAN(DDGANConfig(steps=11), torch.nn.Identity(), Schedule.linear(10))
    assert DDGAN(DDGANConfig(steps=10), torch.nn.Identity(), Schedule.linear(10)).alpha_bars[0] < IMAGE.alpha_bar
