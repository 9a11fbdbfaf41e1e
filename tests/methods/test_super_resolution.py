"""Super-resolution models by optimisation: affine networks end at the exact posterior mean, if they are told the level."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from advkd.data.sources import Tensors
from advkd.diffusion.cascade import SuperResolution
from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.exact_cascade import GaussianSuperResolution
from advkd.diffusion.low_images import LowImages
from advkd.diffusion.schedule import Schedule
from advkd.diffusion.teacher import Teacher
from advkd.errors import InputError
from advkd.methods.consistency import Consistency, ConsistencyConfig, heun_step
from advkd.methods.denoising import Denoising, TeacherTrainingConfig
from advkd.methods.dpdm import DPDMConfig
from advkd.methods.guided import GuidedConfig
from advkd.methods.progressive import ProgressiveConfig
from advkd.methods.reparametrize import ReparametrizeConfig
from advkd.models.denoiser import LowImage, beside, with_condition
from advkd.training.denoisers import distill_denoiser
from advkd.training.teacher import train_teacher
from advkd.training.trainer import Trainer

from ..conftest import tiny_teacher, tiny_unet
from .test_progressive import normal, tiny_images, tiny_student

LEVELS = 3
"""Levels of the low images' noise: none, and two of the schedule's."""


class Affine(torch.nn.Module):
    """An affine function of state and low image, 2 x 2 and 1 x 1 pixels, by timestep and, where it is told it, by level."""

    def __init__(self, timesteps, told=True):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(timesteps, LEVELS, 4, 8, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.zeros(timesteps, LEVELS, 4, dtype=torch.float64))
        self.told = told

    def forward(self, x, t, condition):
        if isinstance(condition, LowImage):
            x, condition = beside(x, condition)
        place = t.long(), condition[:, 0].long() * self.told
        return (self.gain[place] @ x.flatten(1)[:, :, None] + self.offset[place][:, :, None]).reshape(-1, 1, 2, 2)


def images(count, seed=0):
    """Correlated images of 2 x 2 pixels, of a mean that is not 0, and the model of their very moments."""
    mix = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [0.3, -0.4, 0.7, 0], [-0.2, 0.6, 0.1, 0.4]], dtype=torch.float64)
    return (normal(count, 4, seed=seed) @ mix.T + torch.tensor([0.5, -0.5, 1.0, 0.2])).reshape(-1, 1, 2, 2)


def exact(data, schedule):
    flat = data.flatten(1)
    return GaussianSuperResolution(flat.mean(dim=0).reshape(1, 2, 2), torch.cov(flat.T, correction=0), 1, schedule)


def taught(data, told, out):
    """An affine network after the real trainer's run, with its schedule."""
    config = TeacherTrainingConfig(
        steps=1500, batch_size=1024, learning_rate=0.05, warmup=0, ema=0.99, super_resolution=1, truncation=LEVELS - 1
    )
    scheduler = DDPMScheduler(num_train_timesteps=2, beta_start=0.2, beta_end=0.6)
    method = Denoising(config, Affine(2, told), scheduler, low=LowImages(1, LEVELS - 1))
    network = Trainer(method, Tensors(images=data), None, out, dtype=torch.float64, progress=False).run()
    return network, Schedule(scheduler.alphas_cumprod)


def least_losses(model):
    """Least mean squared error of an affine eps given (x_t, low): with the level, and for all levels together."""
    a, flat = model.schedule.alpha_bars, model.average
    found = {True: [], False: []}
    for kept in a:
        seconds, means = [], []
        for low in (1.0, *a[: LEVELS - 1].tolist()):
            seen = torch.cat((kept.sqrt() * torch.eye(4), low**0.5 * flat))
            spread = torch.cat(((1 - kept).expand(4), torch.tensor([1 - low]))).diag()
            seconds.append(seen @ model.covariance @ seen.T + spread)
            means.append(seen @ model.mean)
        cross = torch.cat(((1 - kept).sqrt() * torch.eye(4), torch.zeros(1, 4))).double()
        apart = torch.stack(means) - torch.stack(means).mean(dim=0)
        mixed = torch.stack(seconds).mean(dim=0) + apart.T @ apart / LEVELS
        errors = [1 - (cross.T @ torch.linalg.solve(c, cross)).trace().item() / 4 for c in (*seconds, mixed)]
        found[True].append(sum(errors[:-1]) / LEVELS)
        found[False].append(errors[-1])
    return {told: sum(errors) / 2 for told, errors in found.items()}


def loss(network, model, count=50_000):
    """Mean squared error of eps over fresh data, and its standard error."""
    x, noise = model.data(count, seed=1), normal(count, 1, 2, 2, seed=2)
    t, level = (torch.randint(most, (count,), generator=torch.Generator().manual_seed(3 + most)) for most in (2, LEVELS))
    kept = model.schedule.alpha_bars[t].reshape(-1, 1, 1, 1)
    low = model.low.trained(x, level, normal(count, 1, 1, 1, seed=4), model.schedule)
    with torch.no_grad():
        errors = (network(kept.sqrt() * x + (1 - kept).sqrt() * noise, t, low) - noise).square().flatten(1).mean(dim=1)
    return errors.mean().item(), errors.std().item() / math.sqrt(count)


def test_an_affine_network_becomes_the_posterior_mean_given_the_noised_low_image(tmp_path):
    """Within the error of Adam; untold, the least loss is another one, by ten standard errors at least."""
    data = images(50_000)
    network, schedule = taught(data, True, tmp_path / "told")
    model = exact(data, schedule)
    for t in range(2):
        for level in range(LEVELS):
            low = LowImage(normal(50, 1, 1, 1), torch.full((50,), level))
            x, sigma = normal(50, 1, 2, 2, seed=1), schedule.sigma(t).expand(50)
            wanted = model.predict(x, sigma, low)[1]
            with torch.no_grad():
                found = network(x, torch.full((50,), t), low)
            assert (found - wanted).abs().max() < 0.1, (t, level)
    untold, _ = taught(data, False, tmp_path / "untold")
    least = least_losses(model)
    (with_level, spread), (without, _) = loss(network, model), loss(untold, model)
    assert abs(with_level - least[True]) < 5 * spread and abs(without - least[False]) < 5 * spread
    assert least[False] - least[True] > 10 * spread


def test_the_distilled_student_is_the_composition_of_the_teachers_steps_given_the_low_image(tmp_path):
    """One evaluation, for every level of the low image's noise; for another level the composition is elsewhere."""
    schedule, data = Schedule.edm(4, 0.05, 20.0), images(4096)
    teacher = exact(data, schedule)
    teacher.low = LowImages(1, LEVELS - 1)
    config = ConsistencyConfig(
        updates=1000, batch_size=48, learning_rate=0.05, clip=0.0, ema=0.0, levels=4, distance="mse", target=0.9
    )
    method = Consistency(config, Affine(4), schedule)
    method.low = teacher.low
    f = method.function(Trainer(method, Tensors(images=data), teacher, tmp_path, dtype=torch.float64, progress=False).run())
    sigmas, low = method.sigmas(0), normal(50, 1, 1, 1)
    y = sigmas[-1] * normal(50, 1, 2, 2, seed=1)
    given = {level: LowImage(low, torch.full((50,), level)) for level in range(LEVELS)}
    for level, condition in given.items():
        state = y
        for j in (3, 2, 1):
            state = heun_step(teacher, state, sigmas[j].expand(50), sigmas[j - 1].expand(50), condition)
        with torch.no_grad():
            found = {other: f(y, sigmas[-1].expand(50), given[other]) for other in given}
        assert (found[level] - state).abs().max() < 0.01, level
        assert all((found[other] - state).abs().max() > 0.1 for other in given if other != level)


def enlarging_teacher(level=1000, seed=0, prediction="v_prediction"):
    """A tiny teacher that enlarges images of 4 x 4 pixels."""
    torch.manual_seed(seed)
    unet = with_condition(tiny_unet(), low_size=4, low_level=level)
    return Teacher(unet, DDPMScheduler(prediction_type=prediction), "tiny-sr")


def test_a_network_that_is_told_low_images_begins_as_it_was():
    plain, told = tiny_teacher(), enlarging_teacher()
    told.unet.conv_in.load_state_dict(with_condition(plain.unet, low_size=4).conv_in.state_dict())
    unet = with_condition(plain.unet, low_size=4, low_level=1000)
    low = LowImage(torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 1000]))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 900])
    changed, packed = beside(x, low)
    assert torch.equal(changed[:, 1:, 2:4, 6:], low.image[:, :, 1:2, 3:].expand(3, 1, 2, 2))
    with torch.no_grad():
        assert torch.allclose(unet(changed, t, packed).sample, plain.unet(x, t).sample, atol=1e-6)


def test_a_saved_student_enlarges_as_the_loaded_one_does(tmp_path):
    """Shape, low images and largest level come back; images do not depend on the split into batches."""
    student = DenoiserStudent.from_teacher(enlarging_teacher(level=300))
    student.save_pretrained(tmp_path)
    loaded = DenoiserStudent.from_pretrained(tmp_path)
    assert loaded.model.low == LowImages(4, 300) and loaded.image_channels == 1
    stage, low = SuperResolution(loaded), torch.rand(5, 1, 4, 4)
    whole = stage.sample(low, 300, seed=1)
    assert whole.shape == (5, 1, 8, 8) and whole.abs().max() <= 1
    assert torch.equal(whole, SuperResolution(student).sample(low, 300, seed=1))
    parts = [stage.sample(low[:2], 300, 1), stage.sample(low[2:], 300, 1, start=2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    with pytest.raises(InputError, match="level must be at most 300"):
        stage.sample(low, 301)


CONFIGS = {
    "consistency": lambda: ConsistencyConfig(updates=6, batch_size=4, levels=4, checkpoint_every=2),
    "progressive": lambda: ProgressiveConfig(updates=3, rounds=(2, 1), batch_size=4, checkpoint_every=2),
    "reparametrize": lambda: ReparametrizeConfig(updates=6, batch_size=4, checkpoint_every=2),
}


def distilled(name, out, **options):
    teacher = enlarging_teacher()
    start = DenoiserStudent.from_teacher(teacher)
    images = tiny_images()
    return distill_denoiser(name, CONFIGS[name](), start, out, teacher=teacher, data=images, progress=False, **options)


class Stop(Exception):
    pass


def stopping(monkeypatch, at):
    """Let the low images of an update be the last ones."""
    trained, calls = LowImages.trained, []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise Stop
        return trained(*arguments)

    monkeypatch.setattr(LowImages, "trained", counting)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distillation_that_was_stopped_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    whole = distilled(name, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(patch, 4)
        distilled(name, tmp_path / "run")
    resumed = distilled(name, tmp_path / "run", resume=True)
    wanted, found = (s.model.unet.state_dict() for s in (whole, resumed))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    began = enlarging_teacher().unet.class_embedding.level[2].weight
    assert not torch.equal(wanted["class_embedding.level.2.weight"], began)  # the level is heard


def test_a_teachers_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    numbers = {"size": 8, "channels": (8, 8), "steps": 5, "batch_size": 4, "checkpoint_every": 2}
    config = TeacherTrainingConfig(super_resolution=4, truncation=200, **numbers)
    whole = Teacher.from_pretrained(train_teacher(config, tmp_path / "whole", progress=False))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(patch, 4)
        train_teacher(config, tmp_path / "run", progress=False)
    resumed = Teacher.from_pretrained(train_teacher(config, tmp_path / "run", resume=True, progress=False))
    assert whole.low == LowImages(4, 200) and whole.identity()["takes_low"] == [4, 200]
    assert resumed.identity()["weights_sha256"] == whole.identity()["weights_sha256"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"truncation": 100}, "truncation is of the low images' noise: give --super-resolution, too"),
        ({"super_resolution": 4, "truncation": 1001}, r"truncation must be in \[0, 1000\]"),
        ({"super_resolution": -1}, "super_resolution must be the side of the low images, got -1"),
        ({"super_resolution": 4, "conditional": True}, "the low image has the class: leave --conditional out"),
        ({"super_resolution": 3, "size": 8, "channels": (8, 8)}, "super_resolution: .* must divide .* got 3 and 8"),
        ({"super_resolution": 8, "size": 8, "channels": (8, 8)}, "super_resolution: .* got 8 and 8"),
        ({"super_resolution": 12}, "super_resolution: .* must divide .* got 12 and 32"),
        ({"super_resolution": 16, "data": "nowhere"}, "nowhere"),
    ],
)
def test_trainings_that_cannot_be_are_refused(values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train_teacher(TeacherTrainingConfig(**values), tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def test_other_methods_and_other_low_images_are_refused(tmp_path):
    teacher, plain = enlarging_teacher(), tiny_teacher(prediction_type="v_prediction")
    student, images = DenoiserStudent.from_teacher(teacher), tiny_images()

    def refused(message, name, config, start, **inputs):
        with pytest.raises(InputError, match=message):
            distill_denoiser(name, config, start, tmp_path / "out", data=images, progress=False, **inputs)
        assert not (tmp_path / "out").exists()

    for name, config in (("dpdm", DPDMConfig()), ("guided", GuidedConfig())):
        refused(f"takes a low image, which {name} does not give: continue it by consistency", name, config, student)
    refused("takes a low image, which this method does not give", "dpdm", DPDMConfig(), tiny_student(), teacher=teacher)
    consistency = CONFIGS["consistency"]()
    refused("low images are none, the student's 4 pixels, level 1000", "consistency", consistency, student, teacher=plain)
    other = DenoiserStudent.from_teacher(enlarging_teacher(level=300))
    refused("are 4 pixels, level 1000, the student's 4 pixels, level 300", "consistency", consistency, other, teacher=teacher)
