"""Distances between a student's images and their targets."""

import math

import torch
from torch import nn


class Scales(nn.Module):
    """Logarithms of the standard deviations s of the divergence's normal distributions, one per level."""

    def __init__(self, depth: int):
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(depth))


def kl_divergence(squared: torch.Tensor, log_s: torch.Tensor, floor: float) -> torch.Tensor:
    """KL(N(x', floor^2 I) || N(y, s^2 I)) per dimension; with s learned its minimum is s^2 = floor^2 + mse."""
    variance = torch.exp(2 * log_s)
    return log_s - math.log(floor) + (floor * floor + squared) / (2 * variance) - 0.5
