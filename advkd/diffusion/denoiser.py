"""A network as a denoiser: the posterior means of the image and of the noise at any noise level."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InputError
from .prediction import eps_weights, require_prediction, x0_weights
from .schedule import Schedule

COORDINATES = ("vp", "ve")
"""Coordinates of states: sqrt(a) x0 + sqrt(1 - a) eps, or x0 + sigma eps."""


class Denoiser:
    """E[x0 | state] and E[eps | state] by a network of any kind of output.

    Args:
        network: function of the variance-preserving state ``(N, ...)``, timesteps ``(N,)`` float32 and a condition that gives
            the network's output, in the state's shape.
        schedule: noise schedule that the network was trained with.
        prediction: meaning of the output, one of :data:`~advkd.diffusion.prediction.PREDICTIONS`.
        clip: x0 is clamped to [-clip, clip]; infinity clamps nothing.
        clipped_eps: derive eps from the clamped x0, so that the pair makes up the state; else it is the network's own.
        coordinates: of the states, one of :data:`COORDINATES`.

    Raises:
        InputError: another prediction or other coordinates, or a negative ``clip``.

    Examples:
        >>> x0, eps = Denoiser(lambda x, t, condition: x, Schedule.linear(), "epsilon").predict(torch.zeros(2, 1, 8, 8), 0.5)
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor],
        schedule: Schedule,
        prediction: str,
        clip: float = math.inf,
        clipped_eps: bool = True,
        coordinates: str = "vp",
    ):
        require_prediction(prediction)
        require_coordinates(coordinates)
        if not clip >= 0:
            raise InputError(f"clip must not be negative, got {clip}")
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.clip, self.clipped_eps, self.coordinates = clip, clipped_eps, coordinates

    def predict(self, x: torch.Tensor, sigma: float | torch.Tensor, condition: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means at states of any noise levels.

        Args:
            x: ``(N, ...)`` states in the denoiser's coordinates, float32 or float64.
            sigma: noise level, a number for all samples or ``(N,)``, one per sample; positive and within the schedule's.
            condition: what the network is told beside, handed on as it is; None for nothing.

        Returns:
            ``(x0, eps)``, both ``(N, ...)`` in ``x``'s dtype; differentiable as the network is.

        Raises:
            InputError: ``sigma`` of another length, or a network that gives another shape.
        """
        levels = levels_of(x, sigma)
        alpha, noise = vp_weights(levels.reshape(-1, *[1] * (x.ndim - 1)))
        state = x if self.coordinates == "vp" else (alpha * x).to(x.dtype)
        output = self.network(state, self.schedule.t(levels).float(), condition).to(x.dtype)
        if output.shape != state.shape:
            raise InputError(
                f"the network gives {tuple(output.shape)} for states {tuple(state.shape)}: it must give their shape"
            )
        k_x, k_m = (weight.to(x.dtype) for weight in x0_weights(alpha, noise, self.prediction))
        x0 = (k_x * state + k_m * output).clamp(-self.clip, self.clip)
        if self.clipped_eps and math.isfinite(self.clip):
            e_x, e_m = eps_weights(alpha, noise, "sample")
            return x0, e_x.to(x.dtype) * state + e_m.to(x.dtype) * x0
        e_x, e_m = eps_weights(alpha, noise, self.prediction)
        return x0, e_x.to(x.dtype) * state + e_m.to(x.dtype) * output


def require_coordinates(coordinates: str) -> None:
    """Refuse coordinates that are not among :data:`COORDINATES`."""
    if coordinates not in COORDINATES:
        raise InputError(f"coordinates must be one of {', '.join(COORDINATES)}, got {coordinates!r}")


def levels_of(x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """Noise levels as one per sample.

    Args:
        x: ``(N, ...)`` states.
        sigma: a number for all samples, or ``(N,)``.

    Returns:
        ``(N,)`` float64 on the states' device.

    Raises:
        InputError: ``sigma`` of another length, or below 0.
    """
    levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    if levels.ndim > 1 or (levels.ndim == 1 and len(levels) != len(x)):
        raise InputError(f"sigma must be a number or one per sample ({len(x)}), got shape {tuple(levels.shape)}")
    if not (levels >= 0).all():
        raise InputError(f"sigma must be at least 0, got {levels.min().item()}")
    return levels.expand(len(x))


def over(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weights of samples in a shape and the dtype that multiply states.

    Args:
        x: ``(N, ...)`` states.
        weight: ``(N,)`` weights.

    Returns:
        ``(N, 1, ...)`` in ``x``'s dtype.
    """
    return weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def vp_weights(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``(alpha, noise)`` of image and noise in a variance-preserving state of a noise level.

    Args:
        sigma: noise levels, float64, of any shape; infinity for noise alone.

    Returns:
        1 / sqrt(1 + sigma^2) and sigma / sqrt(1 + sigma^2), of that shape.
    """
    scale = torch.hypot(sigma, torch.ones_like(sigma))
    # Infinity over infinity, where no image is left.
    return 1 / scale, torch.where(sigma.isinf(), 1.0, sigma / scale)


def noised(x0: torch.Tensor, eps: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """Variance-preserving states of images at noise levels.

    Args:
        x0: ``(N, ...)`` images, float32 or float64.
        eps: ``(N, ...)`` standard normal noise.
        sigma: noise level, a number or ``(N,)``; infinity for noise alone.

    Returns:
        ``(N, ...)`` x0 / sqrt(1 + sigma^2) + sigma eps / sqrt(1 + sigma^2), in ``x0``'s dtype; differentiable in both.

    Raises:
        InputError: ``sigma`` of another length, or below 0.
    """
    alpha, noise = vp_weights(levels_of(x0, sigma).reshape(-1, *[1] * (x0.ndim - 1)))
    return alpha.to(x0.dtype) * x0 + noise.to(x0.dtype) * eps
