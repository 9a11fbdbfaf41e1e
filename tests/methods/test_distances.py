"""Distances by hand."""

import math

import torch

from advkd.methods.distances import DISTANCES, HUBER, diversity, entropy, feature_kl


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


def test_entropy_and_diversity_of_three_classes():
    """Uniform, certain and mixed batches; certain predictions of all classes have the entropy 0 and the largest diversity."""
    certain = 800 * torch.eye(3, dtype=torch.float64)
    uniform, third, half = torch.zeros(4, 3, dtype=torch.float64), math.log(3), math.log(2)
    mixed = torch.tensor([[0.0, 0, -800], [0, -800, -800]], dtype=torch.float64)  # (1/2, 1/2, 0) and (1, 0, 0)
    together = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for logits, each, mean in (
        (uniform, third, third),
        (certain, 0.0, third),
        (certain[:1].expand(5, 3), 0.0, 0.0),
        (certain[:2], 0.0, half),
        (mixed, half / 2, together),
    ):
        for shift in (0.0, 7.0):
            assert math.isclose(entropy(logits + shift).item(), each, rel_tol=1e-12, abs_tol=1e-12)
            assert math.isclose(diversity(logits + shift).item(), mean, rel_tol=1e-12, abs_tol=1e-12)
    for measure in (entropy, diversity):
        logits = certain.clone().requires_grad_()
        assert torch.autograd.grad(measure(logits), logits)[0].isfinite().all()


def test_feature_kl_by_hand():
    """p = (3/4, 1/4), after its features are halved, and q = (1/2, 1/2), for samples of any shape; the direction matters."""
    half = torch.tensor([3.0, 1.0], dtype=torch.float64).log().reshape(1, 2, 1)
    target = 2 * half
    features = torch.full((1, 2, 1), 5.0, dtype=torch.float64)
    forth = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert math.isclose(feature_kl(features, target, 2.0).item(), forth, rel_tol=1e-12)
    assert math.isclose(feature_kl(half, features, 2.0).item(), back, rel_tol=1e-12)
    both = feature_kl(torch.cat([features, half]), torch.cat([target, target]), 2.0)
    assert math.isclose(both.item(), forth / 2, rel_tol=1e-12)
