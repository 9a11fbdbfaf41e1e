"""Noise schedules of the teachers that are trained here."""

from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from .schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

TIMESTEPS = 1000
"""T of a teacher that is trained here."""

SCHEDULES = ("linear", "cosine", "edm")
"""Names of the schedules."""


def require_schedule(schedule: str) -> None:
    """Raise :class:`InputError` for another ``schedule`` than those of :func:`noise_scheduler`."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def noise_scheduler(
    schedule: str, prediction: str = "epsilon", timesteps: int = TIMESTEPS, clip: bool = True
) -> "DDPMScheduler":
    """A scheduler of a teacher's noise.

    Args:
        schedule: ``linear`` (Ho et al. 2020), ``cosine`` (Nichol and Dhariwal 2021) or ``edm``: alpha_bar = 1 / (1 + sigma^2)
            at levels that ascend from 0.002 to 80 as those of Karras et al. 2022 (rho = 7).
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        timesteps: T, at least 2.
        clip: x0 is clamped to [-1, 1] when a teacher draws; latents are not.

    Returns:
        diffusers' scheduler with T values of ``alphas_cumprod``, float32.

    Raises:
        InputError: another schedule.
    """
    from diffusers import DDPMScheduler

    require_schedule(schedule)
    cosine, edm = {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": _edm_betas(timesteps)}
    betas = {"linear": {}, "cosine": cosine, "edm": edm}[schedule]
    return DDPMScheduler(num_train_timesteps=timesteps, prediction_type=prediction, clip_sample=clip, **betas)


def _edm_betas(timesteps):
    """beta_i = 1 - alpha_bar_i / alpha_bar_(i-1) as a list, which diffusers' configuration keeps; alpha_bar_(-1) = 1."""
    alpha_bars = Schedule.edm(timesteps).alpha_bars
    before = torch.cat([torch.ones_like(alpha_bars[:1]), alpha_bars[:-1]])
    return (1 - alpha_bars / before).tolist()
