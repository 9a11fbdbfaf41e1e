"""Conversions between a network's output, the image x0 and the noise eps, for a state x = alpha x0 + noise eps.

``alpha`` and ``noise`` are the weights of image and noise: sqrt(alpha_bar) and sqrt(1 - alpha_bar) on a variance-preserving
path, 1 and sigma on a variance-exploding one, 1 - sigma and sigma on a straight one. The network's output m is one of
:data:`PREDICTIONS`, named as diffusers does; a ``v_prediction`` (Salimans and Ho 2022) is that of the state scaled to unit
weights, x / sqrt(alpha^2 + noise^2), and ``flow_prediction`` is the velocity eps - x0 of a straight path.
"""

from typing import TypeVar

import torch

from ..errors import InputError

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
"""Meanings of a network's output: the noise, the image, sqrt(a) eps - sqrt(1 - a) x0, or eps - x0."""

Weight = TypeVar("Weight", float, torch.Tensor)


def require_prediction(prediction: str, known: tuple[str, ...] = PREDICTIONS) -> None:
    """Refuse a kind of output that is not among ``known``."""
    if prediction not in known:
        raise InputError(f"prediction must be one of {', '.join(known)}, got {prediction!r}")


def x0_weights(alpha: Weight, noise: Weight, prediction: str) -> tuple[Weight, Weight]:
    """Weights of the state and of the network's output in x0.

    Args:
        alpha: weight of the image in the state, a float or a float64 tensor.
        noise: weight of the noise in the state, of the same type.
        prediction: one of :data:`PREDICTIONS`.

    Returns:
        ``(k_x, k_m)`` with x0 = k_x x + k_m m.

    Raises:
        InputError: another ``prediction``, or ``epsilon`` where ``alpha`` is the float 0: the state holds no image.
    """
    if prediction == "epsilon":
        if isinstance(alpha, float) and alpha == 0:
            raise InputError("an epsilon prediction has no x0 at alpha_bar = 0 (zero terminal SNR)")
        return 1 / alpha, -noise / alpha
    if prediction == "v_prediction":
        square = alpha * alpha + noise * noise
        return alpha / square, -noise / square**0.5
    if prediction == "flow_prediction":
        return 1 / (alpha + noise), -noise / (alpha + noise)
    require_prediction(prediction)
    return 0 * alpha, 0 * alpha + 1


def eps_weights(alpha: Weight, noise: Weight, prediction: str) -> tuple[Weight, Weight]:
    """Weights of the state and of the network's output in the noise eps.

    Args:
        alpha: weight of the image in the state, a float or a float64 tensor.
        noise: weight of the noise in the state, of the same type.
        prediction: one of :data:`PREDICTIONS`.

    Returns:
        ``(e_x, e_m)`` with eps = e_x x + e_m m.

    Raises:
        InputError: another ``prediction``, or ``sample`` where ``noise`` is the float 0: the state holds no noise.
    """
    if prediction == "epsilon":
        return 0 * alpha, 0 * alpha + 1
    if prediction == "v_prediction":
        square = alpha * alpha + noise * noise
        return noise / square, alpha / square**0.5
    if prediction == "flow_prediction":
        return 1 / (alpha + noise), alpha / (alpha + noise)
    require_prediction(prediction)
    if isinstance(noise, float) and noise == 0:
        raise InputError("a sample prediction has no noise at alpha_bar = 1")
    return 1 / noise, -alpha / noise
