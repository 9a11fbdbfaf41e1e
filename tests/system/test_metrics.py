"""The measures of two sets, where the answer is known."""

import math

import pytest
import scipy.linalg
import torch

from advkd import metrics
from advkd.errors import InputError


def gaussian(n, dimension=6, seed=0, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_is_the_formula():
    a, b = gaussian(60, seed=1), gaussian(80, seed=2, mean=0.5) @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    means, covariances = [x.mean(dim=0) for x in (a, b)], [torch.cov(x.T) for x in (a, b)]
    root = torch.from_numpy(scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + torch.trace(covariances[0] + covariances[1] - 2 * root)
    assert math.isclose(metrics.frechet_distance(a, b), expected.item(), rel_tol=1e-9)
    assert math.isclose(metrics.frechet_distance(b, a), expected.item(), rel_tol=1e-9)


def test_float_features_are_taken_as_they_are():
    """torchmetrics scales and casts images only for its own Inception: a shift of 2 is a distance of 4 per feature."""
    a = gaussian(500)
    assert math.isclose(metrics.frechet_distance((a + 2).float(), a.float()), 4 * a.shape[1], rel_tol=1e-5)


def test_extrapolation_removes_the_bias_of_few_samples():
    same = [metrics.frechet_at_infinity(gaussian(400, seed=i), gaussian(400, seed=100 + i)) for i in range(8)]
    biased = sum(fit["distances"][0] for fit in same) / len(same)
    left = sum(fit["value"] for fit in same) / len(same)
    assert biased > 0.01 and abs(left) < 0.3 * biased
    assert all(fit["slope"] > 0 for fit in same)
    # Two Gaussians with means 0.5 apart in each of 6 dimensions: 1.5.
    apart = [
        metrics.frechet_at_infinity(gaussian(400, seed=i, mean=0.5), gaussian(400, seed=100 + i))["value"] for i in range(8)
    ]
    assert abs(sum(apart) / len(apart) - 1.5) < 0.15


def test_extrapolation_is_a_least_squares_line():
    fit = metrics.frechet_at_infinity(gaussian(300, seed=1), gaussian(300, seed=2, mean=1))
    columns = torch.tensor([[1.0, 1 / size] for size in fit["sizes"]], dtype=torch.float64)
    values = torch.tensor(fit["distances"], dtype=torch.float64)
    intercept, slope = torch.linalg.lstsq(columns, values).solution.tolist()
    assert math.isclose(fit["value"], intercept, rel_tol=1e-6) and math.isclose(fit["slope"], slope, rel_tol=1e-6, abs_tol=1e-6)
    assert len(set(fit["sizes"])) == 8 and max(fit["sizes"]) == 300


def test_bootstrap_interval_has_the_distances_spread():
    """The interval of one pair of sets is as wide as the spread of the distance over fresh pairs, and lies about it."""
    fresh = torch.tensor(
        [metrics.frechet_distance(gaussian(200, seed=i, mean=0.4), gaussian(200, seed=500 + i)) for i in range(60)]
    )
    widths, centres = [], []
    for i in range(10):
        pair = gaussian(200, seed=i, mean=0.4), gaussian(200, seed=500 + i)
        low, high = metrics.frechet_interval(*pair, resamples=100, seed=i)
        widths.append(high - low)
        centres.append((low + high) / 2 - metrics.frechet_distance(*pair))
    expected = 2 * 1.96 * fresh.std().item()
    assert 0.7 * expected < sum(widths) / 10 < 1.4 * expected
    assert abs(sum(centres) / 10) < 0.1 * expected


def test_floor_is_what_a_perfect_generator_reaches():
    splits = metrics.frechet_floor(gaussian(400))
    perfect = [metrics.frechet_distance(gaussian(200, seed=i), gaussian(200, seed=50 + i)) for i in range(20)]
    assert len(splits) == 20
    assert 0.7 < (sum(splits) / 20) / (sum(perfect) / 20) < 1.4


def covered(points, manifold):
    return metrics.covers(points, manifold).any(dim=1).double().mean().item()


def test_precision_and_recall():
    left, right = gaussian(200, seed=1), gaussian(200, seed=2, mean=50)
    both = torch.cat((left[:100], right[:100]))
    assert covered(gaussian(200, seed=3), left) > 0.8
    assert covered(left, right) == 0
    # A generator that draws one of two modes: precise, but half of the reference is missed.
    one_mode = metrics.neighbour_measures(gaussian(100, seed=4), both, resamples=20)
    assert one_mode["precision"] > 0.8 and 0.3 < one_mode["recall"] < 0.55


def test_covers_by_hand():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    # The third neighbours are 3, 2, 2, 3 and 9 away.
    assert metrics.covers(torch.tensor([[-3.0], [-3.1], [6.0], [19.5]]), line).any(dim=1).tolist() == [True, False, True, False]


def test_nearest_and_diversity_by_hand():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0], [6.0, 0.0], [6.0, 8.0]])
    same = metrics.neighbour_measures(points, points, resamples=20)
    assert same["nearest"] == 0 and same["precision"] == same["recall"] == 1
    expected = torch.pdist(points.double()).mean().item()
    assert math.isclose(same["diversity"], expected, rel_tol=1e-9)
    away = metrics.neighbour_measures(points + torch.tensor([0.0, 0.5]), points, resamples=20)
    assert math.isclose(away["nearest"], 0.5, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["precision", "recall", "nearest", "diversity"])
def test_neighbour_intervals_have_the_measures_spread(name):
    """As wide as the spread over fresh pairs of sets (within a factor), and about the measured value."""
    pairs = [(gaussian(150, seed=i, mean=0.6), gaussian(150, seed=900 + i)) for i in range(60)]
    fresh = torch.tensor([metrics.neighbour_measures(*pair, resamples=1)[name] for pair in pairs])
    found = [metrics.neighbour_measures(*pair, resamples=200) for pair in pairs[:10]]
    width = sum(m[f"{name}_interval"][1] - m[f"{name}_interval"][0] for m in found) / len(found)
    expected = 2 * 1.96 * fresh.std().item()
    assert 0.7 * expected < width < 1.6 * expected
    assert all(m[f"{name}_interval"][0] < m[name] < m[f"{name}_interval"][1] for m in found)


def test_kernel_distance_is_seeded_and_leaves_the_generator_alone():
    a, b = gaussian(150, seed=1), gaussian(150, seed=2, mean=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = metrics.kernel_distance(a, b, subsets=5)
    assert torch.equal(state, torch.get_rng_state())
    assert first == metrics.kernel_distance(a, b, subsets=5)
    assert first[0] > 10 * abs(metrics.kernel_distance(a, gaussian(150, seed=3), subsets=5)[0])


def test_subsets_of_small_sets_differ():
    """Subsets as large as the set would all be the set: no spread at all."""
    assert metrics.kernel_distance(gaussian(100, seed=1), gaussian(100, seed=2), subsets=10)[1] > 1e-6


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="generated images: 11 images are too few for 6 features; 12 or more are needed"):
        metrics.compare(gaussian(11), gaussian(100))
    with pytest.raises(InputError, match="reference images: 4 images are too few for 1 features; 5 or more"):
        metrics.compare(gaussian(20, 1), gaussian(4, 1))
    fit = metrics.compare(gaussian(12), gaussian(12, seed=1), resamples=20)["frechet_at_infinity"]
    assert min(fit["sizes"]) > 6
