"""Diff-Instruct: the gradient of the integral divergence in closed form, the generator's moments, modes that are kept."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from advkd import Student
from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.data.trajectories import Trajectories
from advkd.diffusion.denoiser import Denoiser, noised, vp_weights
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact import GaussianTeacher, MixtureTeacher
from advkd.diffusion.loading import Classes
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError, TrainingError
from advkd.methods.diff_instruct import DiffInstruct, DiffInstructConfig, critic_condition, numbers_of
from advkd.methods.dpdm import DPDMConfig
from advkd.methods.pairs import PairsConfig
from advkd.methods.score import DIRECTIONS, OWN_ERROR
from advkd.models.denoiser import DenoiserNetwork
from advkd.runtime.files import digest
from advkd.training.denoisers import distill_denoiser
from advkd.training.distillation import Distiller, distill
from advkd.training.trainer import Trainer

from ..conftest import tiny_student, tiny_teacher, tiny_unet
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
    teacher = tiny_teacher(clip_sample=False)
    teacher.unet.double()  # its rounding must not depend on the size of a process's batch
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

    What is left is the score's lag, which its further updates take away: of three seeds and all weights the furthest number
    was 0.036 off with one update of the score, and 0.005 with five.
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
    tolerance = {1: 0.05, 5: 0.01}[score_updates]
    assert torch.allclose(network.offset, MEAN, rtol=0, atol=tolerance)
    assert torch.allclose(network.gain.abs(), VARIANCE.sqrt(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_pairs_hold_the_sign_that_a_divergence_leaves_open(bound, tmp_path):
    """x = offset - gain z has the same distribution; the squared error on pairs tells them apart.

    A generator of latents draws a third of them.
    """
    z = normal(512, 2)
    pairs = Tensors(z=z, images=MEAN - VARIANCE.sqrt() * z)
    config = DiffInstructConfig(
        updates=1000,
        batch_size=64,
        learning_rate=0.02,
        final_learning_rate=0.01,
        score_learning_rate=0.03,
        regression=1.0,
        clip=0.0,
    )
    run = run_of(config, TEACHER, AffineGenerator(), GaussianScore(SCHEDULE), tmp_path, pairs, "pairs")
    run.method.bound = bound
    network = run.run()
    assert torch.allclose(bound * network.gain, -VARIANCE.sqrt(), rtol=0, atol=0.05)
    assert torch.allclose(bound * network.offset, MEAN, rtol=0, atol=0.05)


class Centres(nn.Module):
    """Generator of as many normal distributions as the mixture has: the first number of z chooses among them."""

    latent_numel = 3

    def __init__(self, centres, spread):
        super().__init__()
        self.centres = nn.Parameter(centres.clone())
        self.log_spread = nn.Parameter(torch.tensor(spread, dtype=torch.float64).log())

    def forward(self, z):
        chosen = (torch.special.ndtr(z[:, 0]) * len(self.centres)).long().clamp_max(len(self.centres) - 1)
        return self.centres[chosen] + self.log_spread.exp() * z[:, 1:]


class MixtureScore(nn.Module):
    """The posterior mean of such a generator's images: the exact form of its score."""

    def __init__(self, schedule, centres, spread):
        super().__init__()
        self.schedule, self.centres = schedule, nn.Parameter(centres.clone())
        self.log_variance = nn.Parameter(torch.tensor(spread**2, dtype=torch.float64).log())

    def forward(self, x, t, condition):
        alpha, noise = (w[:, None] for w in vp_weights(self.schedule.sigma(t)))
        variance = self.log_variance.exp()
        spread = alpha**2 * variance + noise**2
        squares = torch.cdist(x, torch.zeros(1, 2, dtype=x.dtype)) ** 2 - 2 * alpha * x @ self.centres.T
        squares = squares + alpha**2 * self.centres.square().sum(1)
        centre = torch.softmax(-squares / (2 * spread), dim=1) @ self.centres
        return centre + alpha * variance / spread * (x - alpha * centre)


def modes(generator, teacher):
    """Modes of the mixture that a centre lies within two deviations of."""
    near = torch.cdist(generator.centres.detach(), teacher.means).min(dim=1)
    return set(near.indices[near.values < 2 * math.sqrt(teacher.variance)].tolist())


GRID = MixtureTeacher.from_preset("25-gaussians", Schedule.edm(50, 0.05, 3.0))


def run_on_the_grid(centres, out, score_updates, pairs=None, rate=0.01):
    config = DiffInstructConfig(
        updates=600,
        batch_size=256,
        learning_rate=rate,
        final_learning_rate=0.01,
        score_learning_rate=2 * rate,
        score_updates=score_updates,
        clip=0.0,
        **({} if pairs is None else {"regression": 1.0}),
    )
    score, given = MixtureScore(GRID.schedule, centres, 0.15), "none" if pairs is None else "pairs"
    return run_of(config, GRID, Centres(centres, 0.15), score, out, pairs, given).run()


@pytest.mark.parametrize("score_updates", [1, 5])
def test_modes_of_25_gaussians_that_a_generator_has_are_kept(score_updates, tmp_path):
    """Centres that begin within 0.35 of the modes end at them, all 25, with the mixture's deviation."""
    network = run_on_the_grid(GRID.means + 0.15 * normal(25, 2).clamp(-2, 2), tmp_path, score_updates)
    assert len(modes(network, GRID)) == 25
    assert network.log_spread.exp().item() == pytest.approx(0.05, rel=0.2)


def test_pairs_find_the_modes_that_a_divergence_leaves_out(tmp_path):
    """Centres that begin together share some modes and leave others out; the squared error on pairs sends each to its own."""
    start, z = 0.5 * normal(25, 2, seed=5), normal(4096, 3, seed=6)
    pairs = Tensors(z=z, images=Centres(GRID.means, 0.05)(z).detach())
    alone = run_on_the_grid(start, tmp_path / "alone", 1, rate=0.03)
    beside = run_on_the_grid(start, tmp_path / "pairs", 1, pairs, rate=0.03)
    assert len(modes(alone, GRID)) < 22
    assert len(modes(beside, GRID)) == 25


def generator_run(student, out, data=None, teacher=None, **changes):
    config = DiffInstructConfig(**{"updates": 2, "batch_size": 4, "checkpoint_every": 2, **changes})
    return Distiller(
        None, student, config, out, teacher=teacher or tiny_teacher(), method="diff-instruct", images=data, progress=False
    )


def test_a_one_pass_student_needs_no_data(tmp_path):
    """A fresh one learns its batch norm's statistics; a trained one keeps those it came with, unless it is told otherwise."""
    student = distill(
        None,
        tiny_student(),
        DiffInstructConfig(updates=2, batch_size=4),
        tmp_path / "fresh",
        teacher=tiny_teacher(),
        method="diff-instruct",
        progress=False,
    )
    assert student.training_record["samples"] == [] and (tmp_path / "fresh" / "samples-stage-01.png").is_file()
    run = student.training_record["runs"][-1]
    # An update: the student, the score network twice and the teacher forward; the student and the score network backward.
    assert run["method"] == "diff-instruct" and run["cost"] == {"forward": 32, "backward": 16}
    assert run["teacher"]["name"] == "tiny"
    loaded = Student.from_pretrained(tmp_path / "fresh")
    assert torch.equal(loaded.sample(2, seed=1), student.sample(2, seed=1))
    for name, norm, moved in (("kept", "", False), ("moved", "batch", True)):
        start = copy.deepcopy(loaded)
        start.training_record = loaded.training_record
        before = start.submodules[0].norm1.running_mean.clone()
        weight = start.submodules[0].convolution1.weight.clone()
        again = generator_run(start, tmp_path / name, norm=norm).run()
        assert torch.equal(again.submodules[0].norm1.running_mean, before) != moved
        assert not torch.equal(again.submodules[0].convolution1.weight, weight)
        assert len(again.training_record["runs"]) == 2


def test_an_update_is_the_sum_of_its_three_losses(tmp_path):
    """Divergence on fresh noise, squared error on pairs, critic: the student before its update, the others after theirs."""
    teacher, images = tiny_teacher(clip_sample=False), tiny_images(6).double()
    pairs = Tensors(z=normal(6, 1, 8, 8, seed=2), images=images)
    student = tiny_denoiser()
    config = DiffInstructConfig(updates=1, batch_size=6, regression=0.5, gan=0.3, entry=2.0, critic_channels=4, ema=0.0)
    method = DiffInstruct(config, DenoiserNetwork(student.model.unet), student.model.schedule)
    method.given = "pairs"
    run = Trainer(method, pairs, teacher, tmp_path, **FLOAT64)
    network, critic = copy.deepcopy(run.running["student"].part.module), run.running["critic"].part.module
    draw = Draw(0, 0, 6, "cpu", torch.float64)
    batch = pairs.batch(run.rows(0, 6), (), torch.device("cpu"), torch.float64)
    found = run.step()
    score, schedule = run.running["score"].part.module, student.model.schedule
    with torch.no_grad():
        generator = Denoiser(network, schedule, "v_prediction")
        fresh, paired = (generator.predict(z, 2.0)[0] for z in (draw.normal("z", 1, 8, 8), batch.z))
        sigma = method.noise_levels(draw, "level")
        x = noised(fresh, draw.normal("noise", 1, 8, 8), sigma)
        direction = Denoiser(score, schedule, "epsilon").predict(x, sigma)[0] - teacher.predict(x, sigma)[0]
        sigma = method.noise_levels(draw, "critic level")
        fake = noised(fresh, draw.normal("fake noise", 1, 8, 8), sigma)
        judged = -critic(fake, critic_condition(sigma, None, 0, torch.float64)).mean()
        wanted = (direction * fresh).mean() + 0.5 * (paired - batch.images).square().mean() + 0.3 * judged
    # The teacher rounds in float32.
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert method.evaluations(run.stage) == (5, 3)


def test_a_denoiser_student_is_entered_at_one_level(tmp_path):
    config, teacher = DiffInstructConfig(updates=2, batch_size=4, entry=2.0, score_updates=2), tiny_teacher()
    student = distill_denoiser("diff-instruct", config, tiny_denoiser(), tmp_path, teacher=teacher, progress=False)
    loaded, z = DenoiserStudent.from_pretrained(tmp_path), normal(2, 1, 8, 8, dtype=torch.float32)
    assert loaded.evaluations == 1 and loaded.sampler.solver.alpha_bars == (0.2,)
    denoiser = Denoiser(DenoiserNetwork(loaded.model.unet), loaded.model.schedule, "v_prediction")
    with torch.no_grad():
        wanted = denoiser.predict(z, 2.0)[0].clamp(-1, 1)
    assert torch.allclose(loaded.draw(z), wanted, rtol=0, atol=1e-5)
    assert torch.equal(student.draw(z), loaded.draw(z))


def conditional_teacher():
    return Teacher(tiny_unet(num_class_embeds=4), tiny_teacher().scheduler, "told", Classes(("a", "b", "c"), 3))


def test_classes_reach_both_scores_by_the_teachers_numbers(tmp_path):
    """Students know some of the teacher's classes, in an order of their own."""
    teacher = conditional_teacher()
    student = tiny_student(classes=("c", "a"))
    told = []
    original = teacher.predict
    teacher.predict = lambda x, sigma, labels, *weights: told.append((labels, *weights)) or original(x, sigma, labels, *weights)
    run = generator_run(student, tmp_path, teacher=teacher, batch_size=200, updates=1, guidance=1.5)
    labels, score = [], run.method._score
    run.running["score"].part.module.register_forward_pre_hook(lambda module, inputs: labels.append(inputs[2]))
    run.step()
    assert set(told[0][0].tolist()) == {0, 2} and torch.equal(told[0][1], torch.full((200,), 1.5).to(told[0][1]))
    assert len(labels) == 2 and all(torch.equal(given.long(), told[0][0]) for given in labels) and score is not None
    with pytest.raises(InputError, match="does not know the student's classes z"):
        generator_run(Student(replace(student.config, classes=("z", "a"))), tmp_path / "other", teacher=teacher)


def test_pairs_and_score_are_of_one_guidance_and_the_record_names_both_teachers(labelled_paths, conditional, tmp_path):
    recorded, teacher = Trajectories(labelled_paths), Teacher.from_pretrained(conditional)
    student = tiny_student(classes=("a", "c"))

    def run(out, **changes):
        config = DiffInstructConfig(updates=2, batch_size=4, score_first=1, **changes)
        return Distiller(recorded, student, config, tmp_path / out, teacher=teacher, method="diff-instruct", progress=False)

    with pytest.raises(
        InputError, match="guidance 0: the pairs were recorded with 1.5, .* give --guidance 1.5, or record others"
    ):
        run("other")
    assert not (tmp_path / "other").exists()
    with torch.no_grad():
        next(teacher.unet.parameters()).add_(0.1)
    begun = digest(student.state_dict())
    record = run("same", guidance=1.5).run().training_record["runs"][-1]
    assert record["recorded_by"] == recorded.info.teacher and record["teacher"] == teacher.identity() != record["recorded_by"]
    assert record["norm"] == "batch" and record["init"] == begun and record["guidance"] == 1.5
    # 24 paths of ten guided steps; of two updates of 4 samples one trains the student, which takes the pairs too.
    assert record["cost"] == {"forward": 480 + 8 * 5 + 4, "backward": 8 + 2 * 4}


def test_critics_are_told_level_and_class():
    sigma = torch.tensor([1.0, math.e**4], dtype=torch.float64)
    planes = critic_condition(sigma, torch.tensor([2, 0]), 3, torch.float64)
    assert planes.shape == (2, 4, 4, 4) and torch.equal(planes[:, :, 1, 2], planes[:, :, 0, 0])
    assert torch.allclose(planes[:, :, 0, 0], torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]]).double())
    assert numbers_of(("c", "a"), ("a", "b", "c")).tolist() == [2, 0] and numbers_of((), ("a",)) is None


@pytest.mark.parametrize("prediction", OWN_ERROR)
def test_the_weight_of_x0_gives_the_error_of_the_networks_own_output(prediction):
    sigma = torch.tensor([0.02, 0.5, 3.0, 100.0], dtype=torch.float64)
    x, first, second = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    images = [Denoiser(lambda *_, out=out: out, Schedule.linear(), prediction).predict(x, sigma)[0] for out in (first, second)]
    error = OWN_ERROR[prediction](sigma) * (images[0] - images[1]).square().mean(1)
    assert torch.allclose(error, (first - second).square().mean(1), rtol=1e-9)


def test_bad_numbers_and_data_are_refused(tmp_path):
    wrong = {"regression": -1.0, "gan": math.inf, "gradient_penalty": -1.0, "entry": 0.0, "critic_learning_rate": 0.0}
    wrong |= {"critic_channels": 0, "norm": "group", "score_updates": 0, "weight": "snr"}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"^{name} must be"):
            DiffInstruct(DiffInstructConfig(**{name: value}), nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"critic_channels does nothing without a critic \(--gan\)"):
        DiffInstruct(DiffInstructConfig(critic_channels=8), nn.Linear(2, 2))
    with pytest.raises(InputError, match="critic_channels must be at most critic_max_channels, 128, got 256"):
        DiffInstruct(DiffInstructConfig(gan=0.1, critic_channels=256), nn.Linear(2, 2))
    with pytest.raises(InputError, match="entry is of a denoiser student"):
        DiffInstruct(DiffInstructConfig(entry=2.0), nn.Linear(2, 2))
    with pytest.raises(InputError, match="norm is of a one-pass student"):
        DiffInstruct(DiffInstructConfig(norm="batch"), nn.Linear(2, 2), SCHEDULE)
    with pytest.raises(InputError, match="entry must be within the schedule's levels, 0.05 to 10, got 11"):
        DiffInstruct(DiffInstructConfig(entry=11.0), nn.Linear(2, 2), SCHEDULE)
    out, wide = tmp_path / "out", tiny_unet()
    wide.register_to_config(sample_size=12)
    wide = Teacher(wide, tiny_teacher().scheduler)
    for options, message in (
        ({"gan": 0.1}, "gan compares with images: name them by --data"),
        (
            {"gan": 0.1, "teacher": wide, "data": tiny_images()},
            "gan: there is no critic of the teacher's images, .*12.*: leave gan out",
        ),
        ({"data": tiny_images()}, "images are for the critic: give --gan a weight"),
        ({"teacher": conditional_teacher()}, "the teacher is told classes and the student knows none"),
        ({"guidance": 1.0}, "guidance: teacher tiny is unconditional"),
        ({"teacher": tiny_teacher(channels=3)}, r"draws \(3, 8, 8\), the student \(1, 8, 8\): choose another by --preset"),
        ({"data": torch.zeros(4, 3, 8, 8), "gan": 0.1}, r"data holds images \(3, 8, 8\), the student draws \(1, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            generator_run(tiny_student(), out, **options)
    with pytest.raises(InputError, match="diff-instruct needs a teacher: name it by --teacher"):
        Distiller(None, tiny_student(), DiffInstructConfig(), out, method="diff-instruct", images=None)
    with pytest.raises(InputError, match="trains a denoiser, not a student that draws in one pass"):
        Distiller(None, tiny_student(), DPDMConfig(), out, method="dpdm")
    with pytest.raises(InputError, match="name recorded trajectories by --trajectories"):
        Distiller(None, tiny_student(), PairsConfig(), out, method="pairs")
    assert not out.exists()


def test_a_score_network_of_another_shape_is_refused(tmp_path):
    class Wide(nn.Linear):
        def forward(self, x, t, condition):
            return super().forward(x)

    wide = Wide(2, 4, dtype=torch.float64)
    with pytest.raises(InputError, match=r"score: .* states \(2,\) as the teacher does \(the network gives \(1, 4\) for"):
        run_of(DiffInstructConfig(batch_size=4), TEACHER, AffineGenerator(), wide, tmp_path / "run")
    with pytest.raises(InputError, match=r"score: .* as the teacher does \(.*shapes cannot be multiplied.*leave it out"):
        run_of(DiffInstructConfig(batch_size=4), TEACHER, AffineGenerator(), Wide(4, 2).double(), tmp_path / "run")
    with pytest.raises(InputError, match="score: the teacher has no network to begin with a copy of: give one"):
        run_of(DiffInstructConfig(batch_size=4), TEACHER, AffineGenerator(), None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_schedule_without_signal_at_its_end_is_learnt_at_its_finite_levels(tmp_path):
    """Zero terminal SNR: the last timestep has an infinite noise level, of which scores have no difference."""
    teacher = tiny_teacher(20, rescale_betas_zero_snr=True)
    assert teacher.schedule.sigma(19.0) == math.inf
    run = generator_run(
        tiny_student(), tmp_path, teacher=teacher, batch_size=64, gan=0.1, critic_channels=4, data=tiny_images(64)
    )
    assert run.method.noise_levels(Draw(0, 0, 1000, "cpu", torch.float32), "level").max() == teacher.schedule.sigma(18.0)
    assert all(math.isfinite(value) for value in run.step().values())


@pytest.mark.parametrize("part", ["score", "critic"])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(part, tmp_path):
    options = {"gan": 0.1, "updates": 4, "critic_channels": 4, "data": tiny_images()}
    run = generator_run(tiny_student(), tmp_path, **options)
    for _ in range(2):
        run.step()
    run._write_checkpoint(None)
    with torch.no_grad():
        next(run.running[part].part.module.parameters()).fill_(math.nan)
    with pytest.raises(
        TrainingError, match=f"the {part}'s loss or gradient is not finite at stage 1, update 2; the last checkp"
    ):
        run.step()
    assert (tmp_path / "checkpoint.safetensors").is_file()
