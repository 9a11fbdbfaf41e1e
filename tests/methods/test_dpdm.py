"""DPDM: the images of every level's denoiser are distributed as the data; one level throughout an update."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.sources import Tensors
from advkd.diffusion.denoiser import Denoiser, noised, vp_weights
from advkd.diffusion.denoiser_student import DenoiserStudent, Sampler
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.solvers import Solver
from advkd.errors import InputError, TrainingError
from advkd.methods.dpdm import DPDM, DPDMConfig
from advkd.training.denoisers import DenoiserDistiller, distill_denoiser
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher
from .test_progressive import Affine, normal, tiny_images, tiny_student

FLOAT64 = {"dtype": torch.float64, "progress": False}
COUNT, LOWEST, HIGHEST = 9, 0.02, 5.0
MEAN, VARIANCE = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.3, 2.0]).double()
TEACHER = GaussianTeacher(MEAN, VARIANCE, Schedule.edm(COUNT, LOWEST, HIGHEST))


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates with two score updates each, on states of the student's own sampler."""
    config = DPDMConfig(updates=6, batch_size=4, inputs="simulated", steps=3, score_updates=2, checkpoint_every=2, seed=seed)
    teacher = tiny_teacher(clip_sample=False)
    teacher.unet.double()  # its rounding must not depend on the size of a process's batch
    return DenoiserDistiller("dpdm", config, tiny_student(weights), out, teacher, **options)


def velocities(image_of):
    """An :class:`Affine` network whose image at every level is a given affine function of the state x0 + sigma eps."""
    network = Affine(COUNT)
    with torch.no_grad():
        for t in range(COUNT):
            sigma = TEACHER.schedule.sigma(float(t))
            alpha, noise = vp_weights(sigma)
            # v = (alpha x - D) / noise.
            constant, one = image_of(torch.zeros(2).double(), sigma), image_of(torch.ones(2).double() / alpha, sigma)
            network.offset[t] = -constant / noise
            network.gain[t] = (alpha - (one - constant)) / noise
    return network


def posterior_mean(y, sigma):
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (y - MEAN)


def recovery(y, sigma):
    """The affine denoiser whose images have the data's moments."""
    return MEAN + (VARIANCE / (VARIANCE + sigma**2)).sqrt() * (y - MEAN)


def trained(config, student, out, data=None):
    method = DPDM(config, student, TEACHER.schedule, Affine(COUNT, 0.3))
    method.given = "none" if data is None else "images"
    return method, Trainer(method, data or Tensors(), TEACHER, out, **FLOAT64)


def moments(network, level, n=20_000):
    """Mean and deviation of the data after noise and one denoising."""
    sigma = TEACHER.schedule.sigma(float(level))
    x = noised(TEACHER.data(n), normal(n, 2, seed=3), sigma.expand(n))
    with torch.no_grad():
        image, _ = Denoiser(network, TEACHER.schedule, "v_prediction").predict(x, sigma)
    return image.mean(0), image.std(0)


def test_every_levels_images_end_with_the_datas_moments(tmp_path):
    """Begun at the posterior mean, whose images lack deviation: at the highest level a tenth of it is left in one direction.

    The tolerances are five standard errors of the moments of 2^14 images learnt from and 20,000 measured.
    """
    config = DPDMConfig(
        updates=2500,
        batch_size=1024,
        learning_rate=0.01,
        final_learning_rate=0.01,
        score_learning_rate=0.03,
        score_updates=3,
        score_ema=0.9,
        steps=8,
        clip=0.0,
    )
    student = velocities(posterior_mean)
    before = {level: moments(student, level)[1] / VARIANCE.sqrt() for level in (6, 8)}
    assert torch.allclose(before[8], (VARIANCE / (VARIANCE + HIGHEST**2)).sqrt(), rtol=0.05)
    _, run = trained(config, student, tmp_path, Tensors(images=TEACHER.data(2**14)))
    network = run.run()
    error = 5 * math.sqrt(1 / 2**14 + 1 / 20_000)
    for level in range(3, COUNT):
        mean, deviation = moments(network, level)
        assert ((deviation / VARIANCE.sqrt() - 1).abs() < error / math.sqrt(2)).all(), (level, deviation)
        assert ((mean - MEAN).abs() < error * VARIANCE.sqrt()).all(), (level, mean)
    assert before[8].max() < 0.3 and before[8].min() < 0.11 and before[6].max() < 0.8


def test_one_level_noises_denoises_and_is_that_of_both_scores(tmp_path):
    seen = []

    class Spy(Affine):
        def forward(self, x, t, condition):
            seen.append((t, x))
            return super().forward(x, t, condition)

    config = DPDMConfig(updates=1, batch_size=50, steps=8)
    method = DPDM(config, Spy(COUNT, 0.1), TEACHER.schedule, Spy(COUNT, 0.3))
    taught, original = [], TEACHER.predict

    class Watched(GaussianTeacher):
        def predict(self, x, sigma, condition=None):
            taught.append((sigma, x))
            return original(x, sigma, condition)

    teacher = Watched(MEAN, VARIANCE, TEACHER.schedule)
    run = Trainer(method, Tensors(images=TEACHER.data(50)), teacher, tmp_path, **FLOAT64)
    seen.clear()  # of the check of the score network's states
    run.run()
    levels = [TEACHER.schedule.t(taught[0][0]).float(), *(t for t, _ in seen)]
    assert len(seen) == 3 and len(taught) == 1 and all(torch.equal(level, levels[0]) for level in levels)
    assert len(levels[0].unique()) > 3
    # Both scores see one state, the score network learns on another one.
    (_, entered), (_, learnt), (_, compared) = seen
    assert torch.equal(compared, taught[0][1]) and not torch.equal(learnt, compared) and not torch.equal(entered, learnt)


@pytest.mark.parametrize("options", [{"weight": "dmd"}, {"weight": "edm", "sigma_data": 0.3}])
def test_the_loss_is_along_the_difference_of_the_scores(options, tmp_path):
    config = DPDMConfig(updates=1, batch_size=20, steps=8, **options)
    student = velocities(posterior_mean)
    method, run = trained(config, student, tmp_path, Tensors(images=TEACHER.data(20)))
    start = {name: tensor.clone() for name, tensor in method.student.state_dict().items()}
    draw = Draw(0, 0, 20, "cpu", torch.float64)
    images = run.data.batch(run.rows(0, 20), (), torch.device("cpu"), torch.float64).images
    sigma = TEACHER.schedule.sigma(draw.integers("level", COUNT))
    x = noised(images, draw.normal("x_t", 2), sigma)
    image = posterior_mean(x / vp_weights(sigma)[0][:, None], sigma[:, None])
    found = run.step()
    state = noised(image, draw.normal("noise", 2), sigma)
    score = run.running["score"].part.module
    with torch.no_grad():
        ours = Denoiser(score, TEACHER.schedule, "sample").predict(state, sigma)[0]
    theirs = TEACHER.predict(state, sigma)[0]
    by_dmd, by_edm = 1 / (image - theirs).abs().mean(1), (sigma**2 + 0.3**2) / (sigma * 0.3) ** 2
    direction = (by_dmd if options["weight"] == "dmd" else by_edm)[:, None] * (ours - theirs)
    assert found["loss"] == pytest.approx((direction * image).mean().item(), rel=1e-9)
    assert found["difference"] == pytest.approx(direction.square().mean().item(), rel=1e-9)
    assert any(not torch.equal(start[name], tensor) for name, tensor in method.student.state_dict().items())


def test_simulated_inputs_are_states_of_the_sampler(tmp_path):
    """Variances of y = x0 + sigma eps by recursion: that of the images before, plus sigma^2; levels come equally often."""
    config, levels = DPDMConfig(updates=1, batch_size=8000, inputs="simulated", steps=COUNT), range(COUNT - 1, -1, -1)
    method, _ = trained(config, velocities(recovery), tmp_path)
    method._sigmas = sigmas = TEACHER.schedule.sigma(torch.tensor(levels, dtype=torch.float64))  # the network knows no others
    x, sigma = method._simulated(SimpleNamespace(autocast=nullcontext), Draw(0, 0, 40_000, "cpu", torch.float64), None)
    mean, variance = torch.zeros(2).double(), torch.full((2,), 1 + HIGHEST**2).double()
    for k, s in enumerate(sigmas):
        here = x[sigma == s] / vp_weights(s)[0]
        assert abs(len(here) - 40_000 / COUNT) < 5 * math.sqrt(40_000 / COUNT)
        bound = 5 / math.sqrt(len(here))
        assert ((here.std(0) / variance.sqrt() - 1).abs() < bound).all(), k
        assert ((here.mean(0) - mean).abs() < bound * variance.sqrt()).all(), k
        gain = (VARIANCE / (VARIANCE + s**2)).sqrt()
        mean, variance = MEAN + gain * (mean - MEAN), gain**2 * variance + (sigmas[k + 1] ** 2 if k + 1 < COUNT else 0)


def test_the_score_network_learns_alone_at_first(tmp_path):
    config = DPDMConfig(updates=3, batch_size=8, steps=8, score_first=2, score_updates=2)
    _, run = trained(config, velocities(posterior_mean), tmp_path, Tensors(images=TEACHER.data(32)))
    student, score = (run.running[name].part.module for name in ("student", "score"))
    start = student.gain.clone()
    for _ in range(2):
        before = score.gain.clone()
        run.step()
        assert torch.equal(student.gain, start) and not torch.equal(score.gain, before)
    run.step()
    assert not torch.equal(student.gain, start)


def test_the_saved_student_draws_in_any_number_of_steps(tmp_path):
    config, teacher = DPDMConfig(updates=2, batch_size=4, steps=6, level="lognormal"), tiny_teacher()
    student = distill_denoiser("dpdm", config, tiny_student(), tmp_path, teacher=teacher, data=tiny_images(), progress=False)
    loaded = DenoiserStudent.from_pretrained(tmp_path)
    assert loaded.sampler == student.sampler == Sampler(Solver("dpdm"), 6) and loaded.evaluations == 6
    assert loaded.training_record["runs"][-1]["cost"] == {"forward": 32, "backward": 16}
    assert loaded.sample(2, seed=1, steps=4).shape == (2, 1, 8, 8)
    assert [level.sigma for level in Solver("dpdm").levels(loaded.model.schedule, 4)][-1] == pytest.approx(0.3)


def test_bad_numbers_and_data_are_refused(tmp_path):
    wrong = {"inputs": "noise", "steps": 0, "drop": 1.0, "score_updates": 0, "score_first": 1000, "score_learning_rate": 0.0}
    wrong |= {"score_ema": 1.0, "level": "normal", "level_mean": math.nan, "level_deviation": 0.0, "weight": "snr"}
    wrong |= {"guidance": -1.0, "betas": (0.0, 1.0)}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"^{name} must be"):
            DPDM(DPDMConfig(**{name: value}), Affine(1000), Schedule.linear())
    with pytest.raises(InputError, match="level_deviation does nothing without level lognormal"):
        DPDM(DPDMConfig(level_deviation=2.0), Affine(1000), Schedule.linear())
    with pytest.raises(InputError, match="steps must be between 1 and the schedule's 9 timesteps, got 10"):
        DPDM(DPDMConfig(steps=10), Affine(9), TEACHER.schedule)
    config, out = DPDMConfig(updates=1, batch_size=2), tmp_path / "out"
    with pytest.raises(InputError, match="needs a teacher"):
        distill_denoiser("dpdm", config, tiny_student(), out, data=tiny_images())
    with pytest.raises(InputError, match="needs images: name them by --data"):
        distill_denoiser("dpdm", config, tiny_student(), out, teacher=tiny_teacher())
    with pytest.raises(InputError, match="inputs simulated needs no images: leave --data out"):
        simulated = DPDMConfig(updates=1, batch_size=2, inputs="simulated")
        distill_denoiser("dpdm", simulated, tiny_student(), out, teacher=tiny_teacher(), data=tiny_images())
    with pytest.raises(InputError, match="the teacher draws images"):
        distill_denoiser("dpdm", config, tiny_student(), out, teacher=tiny_teacher(channels=3), data=tiny_images())
    with pytest.raises(InputError, match="guidance: teacher tiny is unconditional"):
        guided = DPDMConfig(updates=1, batch_size=2, guidance=1.0)
        distill_denoiser("dpdm", guided, tiny_student(), out, teacher=tiny_teacher(), data=tiny_images())
    assert not out.exists()


def test_a_score_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    config = DPDMConfig(updates=4, batch_size=4, checkpoint_every=2)
    run = DenoiserDistiller("dpdm", config, tiny_student(), tmp_path, tiny_teacher(), tiny_images(), progress=False)
    for _ in range(2):
        run.step()
    run._write_checkpoint(None)
    with torch.no_grad():
        next(run.running["score"].part.module.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match="the score's loss or gradient is not finite at stage 1, update 2; the last checkp"):
        run.step()
    again = DenoiserDistiller(
        "dpdm", config, tiny_student(), tmp_path, tiny_teacher(), tiny_images(), resume=True, progress=False
    )
    assert again.update == 2
    again.run()
