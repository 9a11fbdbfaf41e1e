"""Noise schedules of the teachers that are trained here."""

from typing import TYPE_CHECKING

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

SCHEDULES = ("linear", "cosine", "edm")
LEAST, MOST, RHO = 0.002, 80.0, 7.0
"""Levels and curvature of the grid of Karras et al. 2022, eq. 5."""


def require_schedule(schedule: str) -> None:
    """Raise :class:`InputError` for another ``schedule`` than those of :func:`noise_scheduler`."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def noise_scheduler(schedule: str, prediction: str = "epsilon", timesteps: int = 1000) -> "DDPMScheduler":
    """A scheduler that clips x0 to [-1, 1].

    Args:
        schedule: ``linear`` (Ho et al. 2020), ``cosine`` (Nichol and Dhariwal 2021) or ``edm``: alpha_bar = 1 / (1 + sigma^2)
            at levels that ascend from 0.002 to 80 as those of Karras et al. 2022 (rho = 7).
        prediction: ``epsilon``, ``v_prediction`` or ``sample``.
        timesteps: T, at least 2.

    Returns:
        diffusers' scheduler with T values of ``alphas_cumprod``, float32.

    Raises:
        InputError: another schedule.
    """
    from diffusers import DDPMScheduler

    require_schedule(schedule)
    cosine, edm = {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": _edm_betas(timesteps)}
    betas = {"linear": {}, "cosine": cosine, "edm": edm}[schedule]
    return DDPMScheduler(num_train_timesteps=timesteps, prediction_type=prediction, clip_sample=True, **betas)


def _edm_betas(timesteps):
    """beta_i = 1 - alpha_bar_i / alpha_bar_(i-1) as a list, which diffusers' configuration keeps; alpha_bar_(-1) = 1."""
    ramp = torch.linspace(0, 1, timesteps, dtype=torch.float64, device="cpu")
    least, most = LEAST ** (1 / RHO), MOST ** (1 / RHO)
    alpha_bars = 1 / (1 + (least + ramp * (most - least)) ** (2 * RHO))
    before = torch.cat([torch.ones_like(alpha_bars[:1]), alpha_bars[:-1]])
    return (1 - alpha_bars / before).tolist()
