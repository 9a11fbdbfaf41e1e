"""The gradient penalty that keeps a critic 1-Lipschitz (Gulrajani et al. 2017, eq. 3)."""

import torch

from ..errors import InputError
from . import backends


def gradient_penalty(critic, x_hat, *, condition=None, target=1.0, weight=10.0, backend="auto"):
    """weight * mean_i (|grad_x D(x_hat_i)| - target)^2, differentiable in the critic's parameters.

    Args:
        critic: callable ``critic(x)`` or ``critic(x, condition)`` -> ``(N,)``, with no coupling between samples.
        x_hat: ``(N, C, H, W)`` points between real and fake samples; no gradient flows into them.
        condition: second argument of a conditional critic.
        target: the norm that is not penalised.
        weight: lambda.
        backend: ``reference`` or ``auto``: autograd's double backward.

    Returns:
        A scalar. Order of differentiability 1 (in the parameters).
    """
    if x_hat.ndim != 4:
        raise InputError(f"x_hat must have shape (N, C, H, W), got {tuple(x_hat.shape)}")
    backends.choose("gradient_penalty", backend, x_hat.device)
    return gradient_penalty_reference(critic, x_hat, condition, target, weight)


def gradient_penalty_reference(critic, x_hat, condition, target, weight):
    """The specification of :func:`gradient_penalty`."""
    x_hat = x_hat.detach().requires_grad_()
    scores = critic(x_hat) if condition is None else critic(x_hat, condition)
    (gradient,) = torch.autograd.grad(scores.sum(), x_hat, create_graph=True)
    return weight * (gradient.flatten(1).norm(dim=1) - target).square().mean()


backends.implement("gradient_penalty")
