"""Distances between a student's output and its target, as training losses."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

HUBER = 0.00054
"""Width of the pseudo-Huber distance by the square root of a sample's numbers (Song and Dhariwal 2024)."""


def mean_square(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of squares.

    Args:
        output: ``(N, ...)``.
        target: ``(N, ...)``.
        weight: ``(N,)`` weights of the samples; None: 1.

    Returns:
        Mean over samples and their numbers, a scalar; differentiable of any order.
    """
    if weight is None:
        return F.mse_loss(output, target)
    return (weight * (output - target).square().flatten(1).mean(dim=1)).mean()


def pseudo_huber(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """sqrt(|output - target|^2 + c^2) - c with c = 0.00054 sqrt(d), by sample (Song and Dhariwal 2024, eq. 8).

    Args:
        output: ``(N, ...)``, of d numbers a sample.
        target: ``(N, ...)``.
        weight: ``(N,)`` weights of the samples; None: 1.

    Returns:
        Mean over samples, a scalar; differentiable of any order.
    """
    squares = (output - target).flatten(1).square()
    width = HUBER * squares.shape[1] ** 0.5
    distances = (squares.sum(1) + width**2).sqrt() - width
    return (distances if weight is None else weight * distances).mean()


DISTANCES: dict[str, Callable[..., torch.Tensor]] = {"mse": mean_square, "huber": pseudo_huber}
"""Distances of ``(N, ...)`` tensors by name: the mean of squares, or :func:`pseudo_huber`; weights of samples are optional."""


def feature_kl(features: torch.Tensor, target: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """KL(softmax(target / tau) || softmax(features)) by sample (Sun et al. 2023): below 1, tau sharpens the target.

    Args:
        features: ``(N, ...)``.
        target: ``(N, ...)``.
        tau: temperature of the target, positive.

    Returns:
        Mean over samples, a scalar; 0 exactly where ``features`` are ``target / tau`` but for one number for all of a sample's.
    """
    ours, theirs = (F.log_softmax(f.flatten(1), dim=1) for f in (features, target / tau))
    return (theirs.exp() * (theirs - ours)).sum(dim=1).mean()


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """-sum_c p_c log p_c of each sample's prediction p = softmax(logits).

    Args:
        logits: ``(N, classes)``.

    Returns:
        Mean over samples, a scalar.
    """
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def diversity(logits: torch.Tensor) -> torch.Tensor:
    """-sum_c m_c log m_c of the mean m of all samples' predictions softmax(logits).

    Args:
        logits: ``(N, classes)``.

    Returns:
        Scalar, which is no mean over samples: parts of a batch do not tell it.
    """
    log_mean = F.log_softmax(logits, dim=1).logsumexp(dim=0) - math.log(len(logits))
    return -(log_mean.exp() * log_mean).sum()


class Scales(nn.Module):
    """Logarithms of the standard deviations s of the divergence's normal distributions, one per level."""

    def __init__(self, depth: int):
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(depth))


def kl_divergence(squared: torch.Tensor, log_s: torch.Tensor, floor: float) -> torch.Tensor:
    """KL(N(x', floor^2 I) || N(y, s^2 I)) per dimension; with s learned its minimum is s^2 = floor^2 + mse."""
    variance = torch.exp(2 * log_s)
    return log_s - math.log(floor) + (floor * floor + squared) / (2 * variance) - 0.5
