"""Arguments of students, schedulers, samplers, measures and data that cannot work are refused by name."""

import numpy as np
import pytest
import torch

from advkd.data.images import load_images
from advkd.diffusion import renoising
from advkd.errors import InputError
from advkd.evaluation import metrics
from advkd.evaluation.evaluate import EvaluationConfig
from advkd.methods.adv_kd import recipe
from advkd.models.critic import CriticConfig
from advkd.models.shape import StudentConfig
from advkd.ops.latents import project

from ..conftest import tiny_student

NO_NUMBERS = [None, "text", b"3", [], 1.5, 1j, torch.zeros(2)]


@pytest.mark.parametrize("source", [None, 3, [], object(), b"digits"])
def test_images_come_from_a_path(source):
    with pytest.raises(InputError, match="source"):
        load_images(source)


@pytest.mark.parametrize("value", ["text", [], 1.5, -1, 0, 2**40])
def test_sizes_of_images(value):
    for name in ("size", "channels"):
        with pytest.raises(InputError, match=name):
            load_images("digits", **{name: value})


def test_latents_are_of_whole_numbers_and_a_device():
    student = tiny_student()
    fused = student.fuse("reference")
    for device in ("nonsense", [], "cuda:99", object()):
        with pytest.raises(InputError, match="device"):
            student.latents(1, device=device)
    for model in (student, fused):
        for name in ("n", "start", "seed"):
            for value in (*NO_NUMBERS, -1):
                with pytest.raises(InputError, match=name):
                    model.latents(**{"n": 1, name: value})
        for name in ("n", "seed", "batch_size", "start"):
            for value in NO_NUMBERS:
                with pytest.raises(InputError, match=name):
                    model.sample(**{"n": 0, name: value})
        with pytest.raises(InputError, match="start"):
            model.latents(5, start=2**63 - 2)
        with pytest.raises(InputError, match="start"):
            model.latents(1, start=2**63 - 1)
        for n in (2**63, 2**70):
            with pytest.raises(InputError, match="^n must be at least 0 and below 9223372036854775808"):
                model.sample(n)
        assert model.latents(1, start=2**63 - 2).shape[0] == 1


def test_students_take_dense_latents():
    student = tiny_student()
    z = student.latents(1)
    for bad in (None, "z", 3, z.numpy(), z.tolist(), z.to(torch.int64), z.to(torch.complex64), z.to_sparse(), z.to("meta")):
        with pytest.raises(InputError, match=r"\bz\b"):
            student(bad)


@pytest.mark.parametrize("field", ["image_size", "image_channels", "channels", "latent_size", "slope", "detail_noise"])
def test_fields_of_a_student(field):
    good = {"image_size": 16, "image_channels": 1, "channels": (4, 4, 4, 4, 4, 4), "latent_size": 1, "slope": 0.2}
    for value in ("3", "x", "abcd", None, 1.5, True, [None], {}, torch.zeros(2)):
        if field == "detail_noise" and value is True:
            continue
        with pytest.raises(InputError, match=field):
            StudentConfig(**{**good, field: value})
    if field in ("image_size", "image_channels", "latent_size"):
        found = getattr(StudentConfig(**{**good, field: np.int64(good[field])}), field)
        assert found == good[field] and type(found) is int


def test_fields_of_a_critic_an_evaluation_and_a_recipe():
    for name, value in {"image_size": 24, "channels": 0, "condition_channels": -1, "slope": 1.0}.items():
        with pytest.raises(InputError, match=name):
            CriticConfig(**{name: value})
    for name, value in {"num": 10**9 + 1, "resamples": 19, "processes": 0, "dtype": "int8", "seed": 2**64}.items():
        with pytest.raises(InputError, match=f"^{name} must be"):
            EvaluationConfig(**{name: value}).validate()
    with pytest.raises(InputError, match="recipe must be one of joint, digits, paper, got 'fast'"):
        recipe("fast")


def test_engines_take_dense_latents():
    fused = tiny_student().fuse("reference")
    z = fused.latents(1)
    for bad in (None, "z", 3, z.numpy(), z.tolist(), z.to(torch.int64), z.to(torch.complex64), z.to_sparse(), z.to("meta")):
        with pytest.raises(InputError, match=r"\bz\b"):
            fused(bad)
    for folder in (True, None, 3):
        with pytest.raises(InputError, match="folder"):
            fused.save_pretrained(folder)
    for dtype in (None, [], "uint8", torch.float64):
        with pytest.raises(InputError, match="dtype"):
            fused.stream(1, dtype=dtype)


def test_projections_are_of_square_floating_point_images():
    x = torch.zeros(2, 1, 8, 8)
    for bad in (None, 3, x.numpy(), x[0], x.int(), x.to_sparse(), x[..., :0], x[..., :6, :6], x[..., :4]):
        with pytest.raises(InputError, match="x_T"):
            project(bad)
    assert project(x[:0]).shape == (0, 16) and project(x[:0], detail_noise=True).shape == (0, 64)


def test_measures_take_seeds_and_levels():
    a, b = torch.randn(8, 2), torch.randn(8, 2)
    for seed in (2**64, -1, None, 0.5, "1"):
        with pytest.raises(InputError, match="seed"):
            metrics.kernel_distance(a, b, subsets=1, seed=seed)
    for level in (None, "0.9", 0, 1, float("nan")):
        with pytest.raises(InputError, match="level"):
            metrics.frechet_interval(a, b, resamples=2, level=level)
    with pytest.raises(InputError, match=r"subsets must be below 2\^31"):
        metrics.kernel_distance(a, b, subsets=2**40)
    with pytest.raises(InputError, match="generated"):
        metrics.frechet_distance(torch.nested.nested_tensor([a, b]), b)


@pytest.mark.parametrize("sampler", [renoising.sample_dpdm, renoising.sample_consistency])
def test_samplers(sampler):
    good = {"denoiser": lambda x, sigma: x, "sigmas": [1.0], "shape": (1, 1, 2, 2), "start": 0, "device": "cpu"}
    bad = {"denoiser": 3, "sigmas": ["text"], "shape": 3, "start": -1, "device": "nonsense"}
    assert sampler(**good).shape == (1, 1, 2, 2)
    for name, value in bad.items():
        with pytest.raises(InputError, match=name):
            sampler(**{**good, name: value})
    for name, value in (("start", 2**63 - 1), ("sigmas", [1e300]), ("sigmas", 3.0), ("denoiser", lambda x, sigma: None)):
        with pytest.raises(InputError, match=name):
            sampler(**{**good, name: value})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device"):
            sampler(**{**good, "device": "cuda"})
    for sigmas in (range(3, 0, -1), np.array([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0]), iter([3.0, 2.0, 1.0])):
        assert torch.equal(sampler(**{**good, "sigmas": sigmas}), sampler(**{**good, "sigmas": [3.0, 2.0, 1.0]}))


@pytest.mark.parametrize("kind", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_schedulers(kind):
    pytest.importorskip("diffusers")
    from advkd.diffusion import schedulers

    scheduler = getattr(schedulers, f"Fused{kind}Scheduler")()
    scheduler.set_timesteps(4)
    x, t = torch.zeros(2, 3, 4, 4), scheduler.timesteps[0]
    for name in ("model_output", "sample"):
        for bad in (None, 3, "text", x.numpy(), x.to_sparse(), x.bool(), x.to(torch.float8_e4m3fn), x[..., :3]):
            with pytest.raises(InputError, match=name):
                scheduler.step(**{"model_output": x, "sample": x, "timestep": t, name: bad})
    for bad in (x.to("meta"), x[0, 0, 0, 0]):
        with pytest.raises(InputError, match="model_output"):
            scheduler.step(bad, t, x)
    if kind == "DDIM":
        for eta in (None, "1", float("nan"), 1e300):
            with pytest.raises(InputError, match="eta"):
                scheduler.step(x, t, x, eta=eta)
    with pytest.raises(InputError, match="return_dict"):
        scheduler.step(x, t, x, return_dict="text")
    with pytest.raises(InputError, match="timestep"):
        scheduler.step(x, torch.tensor(3.0).to(torch.float8_e4m3fn), x)
    assert isinstance(scheduler.step(x, t, x, return_dict=False), tuple)
    for generator in (3, "text", [], [None], (torch.Generator(),)):
        with pytest.raises(InputError, match="generator"):
            scheduler.step(x, t, x, generator=generator)
    with pytest.raises(InputError, match="model_output"):
        scheduler.step(torch.cat((x, x), dim=1), t, x)
    for option, value in (("return_x0", None), ("return_x0", "no"), ("backend", np.array([1, 2])), ("backend", 3)):
        with pytest.raises(InputError, match=option):
            scheduler.set_step_options(**{option: value})


@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep"])
def test_noise_fits_the_sample(kind):
    pytest.importorskip("diffusers")
    from advkd.diffusion import schedulers

    scheduler = getattr(schedulers, f"Fused{kind}Scheduler")()
    scheduler.set_timesteps(4)
    x, t = torch.zeros(1, 3, 4, 4), scheduler.timesteps[0]
    for bad in (x.to("meta"), x[None], x.expand(2, 3, 4, 4), x[..., :3], x.int(), 3):
        with pytest.raises(InputError, match="variance_noise"):
            scheduler.step(x, t, x, variance_noise=bad)
    scheduler.step(x, t, x, variance_noise=x[0, :1])


def test_churn():
    pytest.importorskip("diffusers")
    from advkd.diffusion.schedulers import FusedEulerDiscreteScheduler

    scheduler, x = FusedEulerDiscreteScheduler(), torch.zeros(2, 3, 4, 4)
    scheduler.set_timesteps(4)
    for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
        for bad in (None, "1", [], torch.zeros(2)):
            with pytest.raises(InputError, match=name):
                scheduler.step(x, scheduler.timesteps[0], x, **{name: bad})
