"""Progressive distillation: affine students of Gaussian data keep the sampler's map by rounds; folders run in diffusers."""

import pytest
import torch

from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.diffusion.teacher import Teacher
from advkd.methods.progressive import ProgressiveConfig
from advkd.training.denoisers import DenoiserDistiller

from ..conftest import tiny_unet


def tiny_student(seed=0, timesteps=1000, **options):
    """A tiny network of v prediction, as it begins."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=timesteps, prediction_type="v_prediction")
    return DenoiserStudent.from_teacher(Teacher(tiny_unet(seed=seed, **options), scheduler))


def tiny_images(n=20):
    return 2 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


def tiny_run(data, out, seed=0, weights=0, **options):
    """Two rounds of three updates; the killed run goes on within the second one."""
    config = ProgressiveConfig(updates=3, rounds=(2, 1), batch_size=4, ema=0.5, checkpoint_every=2, seed=seed)
    return DenoiserDistiller("progressive", config, tiny_student(weights), out, None, tiny_images(), **options)
