"""The teacher as a v network: an affine one of Gaussian data ends in the closed form; clamped targets; the null class."""

import math

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.sources import Batch, Tensors
from advkd.diffusion.denoiser import Denoiser
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact import GaussianTeacher
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.reparametrize import Reparametrize, ReparametrizeConfig
from advkd.training.denoisers import DenoiserDistiller
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher, tiny_unet
from .test_progressive import tiny_images

MEAN, VARIANCE = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.25, 4.0], dtype=torch.float64)
ALPHA_BARS = torch.tensor([0.97, 0.7, 0.3, 0.04], dtype=torch.float64)


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of a network that begins with the tiny teacher's weights, or with others of its shape."""
    config = ReparametrizeConfig(updates=6, batch_size=4, ema=0.5, checkpoint_every=2, seed=seed)
    teacher = tiny_teacher()
    teacher.unet.double()  # what it finds must not depend on the size of a process's batch
    student = DenoiserStudent.from_teacher(Teacher(tiny_unet(seed=weights), teacher.scheduler))
    return DenoiserDistiller("reparametrize", config, student, out, teacher, tiny_images(), **options)


class AffineByTimestep(torch.nn.Module):
    """v = gain[t] x + offset[t]."""

    def __init__(self, timesteps):
        super().__init__()
        self.gain, self.offset = (torch.nn.Parameter(torch.zeros(timesteps, 2, dtype=torch.float64)) for _ in range(2))

    def forward(self, x, t, condition=None):
        return self.gain[t.long()] * x + self.offset[t.long()]


def test_an_affine_network_ends_in_the_teachers_v(tmp_path):
    """v = sqrt(a) eps - sqrt(1 - a) x0, and of N(m, s) both are affine in x: gain sqrt(a (1 - a)) (1 - s) / (a s + 1 - a)."""
    schedule = Schedule(ALPHA_BARS)
    teacher = GaussianTeacher(MEAN, VARIANCE, schedule)
    a = ALPHA_BARS[:, None]
    gain = (a * (1 - a)).sqrt() * (1 - VARIANCE) / (a * VARIANCE + 1 - a)
    offset = -((1 - a).sqrt() + a.sqrt() * gain) * MEAN
    config = ReparametrizeConfig(updates=3000, batch_size=64, learning_rate=0.03, ema=0.0, clip=0.0)
    method = Reparametrize(config, AffineByTimestep(len(ALPHA_BARS)), schedule)
    source = Tensors(images=teacher.data(256, seed=1))
    found = Trainer(method, source, teacher, tmp_path, dtype=torch.float64, progress=False).run()
    # The target is affine, so that the loss ends at 0, where Adam's steps shrink with the gradient as well as with the cosine.
    # Timesteps reach the network in float32, exactly: they are whole.
    assert torch.allclose(found.gain, gain, rtol=0, atol=1e-9), (found.gain - gain).abs().max()
    assert torch.allclose(found.offset, offset, rtol=0, atol=1e-9), (found.offset - offset).abs().max()


class Recorder:
    """The actions of an update that moves nothing."""

    def __call__(self, name, loss):
        self.loss = loss.item()

    def log(self, **values):
        pass

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


class NoiseFinder:
    """An unconditional teacher that takes every state for noise, a tenth too much of it, and clamps its x0."""

    def __init__(self, schedule, clip):
        self.denoiser = Denoiser(lambda x, t, condition: 1.1 * x, schedule, "epsilon", clip)

    def predict(self, x, sigma, condition=None):
        return self.denoiser.predict(x, sigma, condition)


@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_the_target_of_a_clamped_teacher_is_bounded_at_the_last_timestep(clip):
    """Against a network of zeros the loss is E v^2: about E x0^2 <= 1 where x0 is clamped, and E (0.1 x / alpha)^2 else."""
    schedule = Schedule(Schedule.linear().alpha_bars[-1:])
    method = Reparametrize(ReparametrizeConfig(), torch.nn.Module(), schedule)
    method.student = lambda x, t, condition: torch.zeros_like(x, requires_grad=True)
    method.teacher, step = NoiseFinder(schedule, clip), Recorder()
    images = tiny_images(64).double()
    method.update(step, Batch(images=images), Draw(0, 0, 64, "cpu", torch.float64))
    # alpha is 1 / 157.4: v = alpha eps - noise x0 with |eps| <= (|x| + 1) / noise, |x| < 6, is at most 1 + 7 alpha = 1.05.
    assert step.loss < 1.05**2 if clip == 1 else 200 < step.loss < 300


def test_a_share_of_the_labels_is_the_null_class_for_teacher_and_student():
    schedule = Schedule(ALPHA_BARS)
    method, told = Reparametrize(ReparametrizeConfig(drop=0.25), torch.nn.Module(), schedule), []

    class Labelled(NoiseFinder):
        num_classes, null_class = 3, 3

        def predict(self, x, sigma, condition=None):
            told.append(condition)
            return super().predict(x, sigma)

    def student(x, t, condition):
        told.append(condition)
        return torch.zeros_like(x, requires_grad=True)

    method.student, method.teacher, n = student, Labelled(schedule, 1.0), 4096
    method.null_class = 3
    labels = torch.arange(n) % 3
    method.update(Recorder(), Batch(images=torch.zeros(n, 2), labels=labels), Draw(0, 0, n, "cpu", torch.float32))
    teachers, students = told
    assert torch.equal(teachers, students)
    dropped = students == 3
    # Five deviations of a binomial share.
    assert abs(dropped.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    assert torch.equal(students[~dropped], labels[~dropped]) and set(labels[dropped].tolist()) == {0, 1, 2}
    assert torch.equal(method.dropped(labels, Draw(0, 0, n, "cpu", torch.float32), 0.0), labels)
    assert method.needs().labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"ema": 1.0}, "ema must be in"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Reparametrize(ReparametrizeConfig(**changes), torch.nn.Module(), Schedule(ALPHA_BARS))
