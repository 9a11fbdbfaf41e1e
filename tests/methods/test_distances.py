"""Distances by hand."""

import math

import torch

from advkd.methods.distances import DISTANCES, HUBER


def test_pseudo_huber_is_a_square_near_zero_and_a_length_far_from_it():
    """sqrt(|d|^2 + c^2) - c by sample, c = 0.00054 sqrt(4)."""
    c, distance = HUBER * 2, DISTANCES["huber"]
    zero, small, large = torch.zeros(2, 1, 2, 2, dtype=torch.float64), 1e-6, 3.0
    assert math.isclose(HUBER, 0.00054)
    for size in (small, large):
        moved = zero.clone()
        moved[0] = size
        wanted = (math.sqrt(4 * size**2 + c**2) - c) / 2
        assert math.isclose(distance(moved, zero).item(), wanted, rel_tol=1e-6)
    near = zero + small
    assert math.isclose(distance(near, zero).item(), 4 * small**2 / (2 * c), rel_tol=1e-4)
    assert DISTANCES["mse"](zero + large, zero).item() == large**2
