"""Measures of two sets for which the answer is known."""

import inspect
import math

import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advkd.errors import InputError
from advkd.evaluation import metrics

from ..conftest import DEFAULTS, other_default


def gaussian(n, dimension=6, seed=0, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_is_the_formula():
    a, b = gaussian(60, seed=1), gaussian(80, seed=2, mean=0.5) @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    means, covariances = [x.mean(dim=0) for x in (a, b)], [torch.cov(x.T) for x in (a, b)]
    root = torch.from_numpy(scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + torch.trace(covariances[0] + covariances[1] - 2 * root)
    assert math.isclose(metrics.frechet_distance(a, b), expected.item(), rel_tol=1e-9)
    assert math.isclose(metrics.frechet_distance(b, a), expected.item(), rel_tol=1e-9)


@pytest.mark.parametrize("n, m, dimension", [(400, 300, 6), (1000, 1000, 64), (130, 90, 64)])
def test_frechet_distance_is_torchmetrics_own(n, m, dimension):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = dimension

        def forward(self, features):
            return features

    a, b = gaussian(n, dimension, seed=1, mean=0.3), gaussian(m, dimension, seed=2, scale=1.2)
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    assert math.isclose(metrics.frechet_distance(a, b), metric.compute().item(), rel_tol=1e-9)


def correlated(n, dimension, rank, seed=0):
    return gaussian(n, rank, seed) @ gaussian(rank, dimension, seed + 1)


SHAPES = [(500, 12, 12), (500, 12, 3), (40, 100, 100), (40, 100, 7), (65, 64, 64), (64, 64, 64), (2, 5, 5)]
"""Samples, features and rank: more samples than features or fewer, full rank or not."""


@pytest.mark.parametrize("n, dimension, rank", SHAPES)
def test_frechet_distance_of_a_scaled_and_shifted_set(n, dimension, rank):
    """Then (S_1 S_2)^(1/2) is a multiple of S_1: (s - 1)^2 tr S_1 + |mu_1 - mu_2|^2."""
    a, shift = correlated(n, dimension, rank), gaussian(1, dimension, seed=7)
    b = 1.5 * a + shift
    trace, moved = torch.cov(a.T).trace(), shift.square().sum()
    expected = 0.25 * trace + (0.5 * a.mean(dim=0) + shift).square().sum()
    assert abs(metrics.frechet_distance(a, b) - expected) < 1e-12 * trace
    assert abs(metrics.frechet_distance(a, a + shift) - moved) < 1e-12 * (trace + moved)


@pytest.mark.parametrize("n, dimension, rank", SHAPES)
def test_each_covariance_is_divided_by_its_own_number_of_samples(n, dimension, rank):
    """All samples twice: the covariance shrinks by 2 (n - 1) / (2 n - 1)."""
    a = correlated(n, dimension, rank)
    trace, shrunk = torch.cov(a.T).trace().item(), math.sqrt(2 * (n - 1) / (2 * n - 1))
    for pair in ((a, a.repeat(2, 1)), (a.repeat(2, 1), a)):
        assert abs(metrics.frechet_distance(*pair) - trace * (1 - shrunk) ** 2) < 1e-12 * trace


@pytest.mark.parametrize("n, dimension, rank, noise", [(600, 256, 20, 1e-3), (2000, 64, 20, 1e-5), (50, 256, 20, 1e-4)])
def test_frechet_distance_of_nearly_equal_sets_of_low_rank(n, dimension, rank, noise):
    """The trace of the root is the nuclear norm of the matrix of inner products of the centred samples."""
    a = correlated(n, dimension, rank)
    b = a + noise * gaussian(n, dimension, seed=5)
    x, y = ((f - f.mean(dim=0)) / math.sqrt(n - 1) for f in (a, b))
    squares = x.square().sum() + y.square().sum()
    expected = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + squares - 2 * torch.linalg.matrix_norm(x @ y.T, "nuc")
    assert abs(metrics.frechet_distance(a, b) - expected.item()) < 1e-12 * squares
    assert metrics.frechet_distance(a, b) > 0


def test_frechet_distance_is_not_negative():
    for seed in range(20):
        a = correlated(50 + 10 * seed, 30, 5 + seed, seed)
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
        assert 0 <= metrics.frechet_distance(a, a[order]) < 1e-12 * torch.cov(a.T).trace()
        assert 0 <= metrics.frechet_distance(a.flip(1), a.flip(1)[order])
    constant = torch.full((20, 3), 0.1)
    assert metrics.frechet_distance(constant, constant) == 0


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7, 5e7, 1e9, 1e14])
def test_frechet_distance_of_any_condition(condition):
    """Axes of spread s_i against a round cloud of spread 1, factored by Cholesky or QR: the sum of (1 - s_i)^2."""
    centred = gaussian(300, 24)
    axes = torch.linalg.qr(centred - centred.mean(dim=0)).Q * math.sqrt(299)
    spreads = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    ours, theirs = (torch.linalg.qr(gaussian(24, 24, seed)).Q for seed in (3, 4))
    expected = (1 - spreads).square().sum().item()
    assert math.isclose(metrics.frechet_distance(axes * spreads @ ours, axes @ theirs), expected, rel_tol=5e-14)


def test_frechet_distance_takes_no_matrix_of_all_samples():
    for n, m, dimension in ((400, 300, 6), (30, 400, 60), (30, 40, 60)):
        with Largest() as largest:
            metrics.frechet_distance(gaussian(n, dimension), gaussian(m, dimension))
        assert all(elements <= max(n, m, dimension) * dimension for elements in largest.elements.values())


def test_float_features_are_taken_as_they_are():
    """Features, unlike images, are neither scaled nor cast: a shift of 2 is a distance of 4 per feature."""
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
    """Intervals are as wide as the spread over fresh pairs of sets (within a factor), and lie about the measured value."""
    pairs = [(gaussian(150, seed=i, mean=0.6), gaussian(150, seed=900 + i)) for i in range(60)]
    fresh = torch.tensor([metrics.neighbour_measures(*pair, resamples=1)[name] for pair in pairs])
    found = [metrics.neighbour_measures(*pair, resamples=200) for pair in pairs[:10]]
    width = sum(m[f"{name}_interval"][1] - m[f"{name}_interval"][0] for m in found) / len(found)
    expected = 2 * 1.96 * fresh.std().item()
    assert 0.7 * expected < width < 1.6 * expected
    assert all(m[f"{name}_interval"][0] < m[name] < m[f"{name}_interval"][1] for m in found)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor of each dtype made within its context."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            # A stride of 0 takes no memory.
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return result


@pytest.mark.parametrize("function", [metrics.neighbour_measures, metrics.covers])
def test_neighbours_are_looked_at_a_block_at_a_time(function, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 5000)
    options = {} if function is metrics.covers else {"resamples": 10}
    with Largest() as largest:
        function(gaussian(400, seed=1), gaussian(500, seed=2), **options)
    pairs = {torch.bool: 400 * 500} if function is metrics.covers else {}
    # 11 columns of counts for each sample.
    assert all(n <= pairs.get(dtype, 11 * 500) for dtype, n in largest.elements.items()), largest.elements
    assert largest.elements[torch.float64] >= 4500


def dense(points, others):
    """Distances from differences."""
    return (points[:, None] - others).square().sum(dim=2).sqrt()


def dense_covers(points, manifold, k=3):
    return dense(points, manifold) <= dense(manifold, manifold).kthvalue(k + 1, dim=1).values


def dense_measures(generated, reference, resamples, seed=0, level=0.95):
    """The definitions, one resample after the other."""
    n, m, generator = len(generated), len(reference), torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randint(size, (size, resamples), generator=generator) for size in (n, m))
    covered, recalled = dense_covers(generated, reference), dense_covers(reference, generated)
    across, within = dense(generated, reference), dense(generated, generated)

    def measure(i, j):
        return {
            "precision": covered[i][:, j].any(dim=1).double().mean(),
            "recall": recalled[j][:, i].any(dim=1).double().mean(),
            "nearest": across[i][:, j].min(dim=1).values.mean(),
            "diversity": within[i][:, i].sum() / (n * (n - 1)),
        }

    measured = measure(torch.arange(n), torch.arange(m))
    drawn = [measure(ours[:, r], theirs[:, r]) for r in range(resamples)]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    result = {}
    for name, value in measured.items():
        values = torch.stack([each[name] for each in drawn])
        result[name] = value.item()
        result[f"{name}_interval"] = torch.quantile(values + value - values.mean(), tails).tolist()
    return result


def lattice(n, seed, dimension=3, most=4):
    """Points with small whole coordinates: many duplicates, and many distances that are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most, (n, dimension), generator=generator).double()


def copied(n, seed):
    """Two sets; the second shares points with the first, some of which it holds five times."""
    reference = gaussian(n, seed=seed)
    reference[:5] = reference[5]
    return torch.cat((reference[: n // 2], gaussian(n // 3, seed=seed + 1, mean=0.3))), reference


SETS = {
    "ordinary": lambda: (gaussian(90, seed=1, mean=0.4), gaussian(70, seed=2)),
    "wide": lambda: (gaussian(60, 200, seed=1), gaussian(90, 200, seed=2)),
    "ties": lambda: (lattice(80, 1), lattice(96, 2)),
    "copies": lambda: copied(90, 3),
    "all alike": lambda: (lattice(40, 1, most=1) + 7, lattice(30, 2, most=1)),
    "fewest": lambda: (gaussian(4, seed=1), gaussian(4, seed=2)),
    "far from the origin": lambda: (lattice(80, 1, most=64) + 2.0**24, lattice(96, 2, most=64) + 2.0**24),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [1, 7 * 96, 10 * 90, 2**21])
def test_neighbour_measures_are_the_definitions(name, block, monkeypatch):
    """Blocks of one row, of rows that do and do not divide the sets, and of all rows."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    generated, reference = SETS[name]()
    assert torch.equal(metrics.covers(generated, reference), dense_covers(generated, reference))
    assert torch.equal(metrics.covers(reference, generated, 2), dense_covers(reference, generated, 2))
    found, expected = (f(generated, reference, 15, 3, 0.8) for f in (metrics.neighbour_measures, dense_measures))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", ["ties", "copies", "far from the origin"])
def test_ties_are_covered_however_a_product_rounds(name, monkeypatch):
    """A matrix product may round one pair's distance differently from place to place."""
    blocks, generator = metrics._blocks, torch.Generator().manual_seed(0)

    def rounded(points, others):
        for rows, block in blocks(points, others):
            sizes = points[rows].square().sum(dim=1)[:, None] + others.square().sum(dim=1)
            noise = 2 * torch.rand(block.shape, generator=generator, dtype=block.dtype) - 1
            squares = block.square() + noise * sizes * points.shape[1] * torch.finfo(torch.float64).eps
            yield rows, squares.clamp_(min=0).sqrt_().masked_fill_(block == 0, 0)

    monkeypatch.setattr(metrics, "_blocks", rounded)
    generated, reference = SETS[name]()
    for a, b in ((generated, reference), (reference, generated)):
        assert torch.equal(metrics.covers(a, b, 2), dense_covers(a, b, 2))
    found, expected = (f(generated, reference, 5, 3, 0.8) for f in (metrics.neighbour_measures, dense_measures))
    assert [found[name] for name in ("precision", "recall")] == pytest.approx([expected["precision"], expected["recall"]])


@pytest.mark.parametrize("closest", [1, 2, 5])
def test_a_resample_without_the_closest_points_is_searched_whole(closest, monkeypatch):
    generated, reference = SETS["ordinary"]()
    expected = metrics.neighbour_measures(generated, reference, 20)
    monkeypatch.setattr(metrics, "CLOSEST", closest)
    assert metrics.neighbour_measures(generated, reference, 20) == expected


def test_copies_are_no_way_off():
    points = gaussian(200, 64, mean=10)
    generated = torch.cat((points[:50], gaussian(150, 64, seed=1, mean=10)))
    found = metrics.distances(generated, points)
    assert (found[:50].diagonal() == 0).all() and (found == 0).sum() == 50
    assert (found - dense(generated, points)).abs().max() < 1e-9
    assert metrics.neighbour_measures(points.flip(0), points, 1)["nearest"] == 0


def test_distances_lose_nothing_to_an_offset():
    a, b = lattice(80, 1, most=64) / 64, lattice(90, 2, most=64) / 64
    assert torch.equal(metrics.distances(a + 2.0**30, b + 2.0**30), metrics.distances(a, b))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kernel_distance_is_torchmetrics_own():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = gaussian(150, seed=1), gaussian(130, seed=2, mean=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=5, subset_size=65)
        metric.update(b, real=True)
        metric.update(a, real=False)
        expected = [value.item() for value in metric.compute()]
    assert metrics.kernel_distance(a, b, subsets=5, seed=4) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_seeded_and_leaves_the_generator_alone():
    a, b = gaussian(150, seed=1), gaussian(150, seed=2, mean=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = metrics.kernel_distance(a, b, subsets=5)
    assert torch.equal(state, torch.get_rng_state())
    assert first == metrics.kernel_distance(a, b, subsets=5)
    assert first[0] > 10 * abs(metrics.kernel_distance(a, gaussian(150, seed=3), subsets=5)[0])


def test_subsets_of_small_sets_differ():
    """Subsets as large as the set would all equal it, without any spread."""
    assert metrics.kernel_distance(gaussian(100, seed=1), gaussian(100, seed=2), subsets=10)[1] > 1e-6


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="generated images: 11 images are too few for 6 features; 12 or more are needed"):
        metrics.compare(gaussian(11), gaussian(100))
    with pytest.raises(InputError, match="reference images: 4 images are too few for 1 features; 5 or more"):
        metrics.compare(gaussian(20, 1), gaussian(4, 1))
    fit = metrics.compare(gaussian(12), gaussian(12, seed=1), resamples=20)["frechet_at_infinity"]
    assert min(fit["sizes"]) > 6


FUNCTIONS = {
    metrics.frechet_distance: 2,
    metrics.kernel_distance: 4,
    metrics.covers: 1,
    metrics.distances: 1,
    metrics.frechet_interval: 2,
    metrics.neighbour_measures: 4,
    metrics.frechet_at_infinity: 8,
    metrics.compare: 12,
    metrics.frechet_floor: 4,
}
"""The measures, and the fewest samples of 6 features that each takes for its first argument."""


def call(function, first, second=None):
    """A measure of features; few resamples, where there are any."""
    names = inspect.signature(function).parameters
    quick = {name: 5 for name in ("resamples", "subsets", "splits") if name in names}
    if "splits" in names:
        return function(first, **quick)
    return function(first, gaussian(20, seed=9) if second is None else second, **quick)


def argument(function, i):
    return list(inspect.signature(function).parameters)[i]


def numbers(result):
    """All numbers in a result."""
    if isinstance(result, torch.Tensor):
        return result.flatten().tolist()
    if isinstance(result, (list, tuple, dict)):
        return [x for part in (result.values() if isinstance(result, dict) else result) for x in numbers(part)]
    return [result]


BAD = {
    "NaN": (lambda: gaussian(20).index_fill(0, torch.tensor([3]), math.nan), "must be finite"),
    "infinity": (lambda: gaussian(20).float().index_fill(1, torch.tensor([2]), math.inf), "must be finite"),
    "minus infinity": (lambda: gaussian(20).index_fill(1, torch.tensor([2]), -math.inf), "must be finite"),
    "too large to cube": (lambda: gaussian(20) * 1e60, "must be finite, of at most"),
    "whole numbers": (lambda: torch.ones(20, 6).long(), r"must be a floating-point tensor \(N, D\), got torch.int64"),
    "complex numbers": (lambda: gaussian(20).to(torch.complex64), "must be a floating-point tensor"),
    "a vector": (lambda: torch.ones(20), r"must be a floating-point tensor \(N, D\), got torch.float32 \(20,\)"),
    "images": (lambda: torch.ones(20, 1, 4, 4), "must be a floating-point tensor"),
    "an array": (lambda: gaussian(20).numpy(), "must be a floating-point tensor .*, got ndarray"),
    "no samples": (lambda: torch.empty(0, 6), "0 samples of 6 features are too few"),
    "no features": (lambda: torch.empty(20, 0), "must have a feature or more"),
    "no values": (lambda: torch.empty(20, 6, device="meta"), "must be a dense tensor with values"),
    "sparse": (lambda: gaussian(20).to_sparse(), "must be a dense tensor with values"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_bad_features_are_refused_by_name(function, bad):
    make, message = BAD[bad]
    with pytest.raises(InputError, match=f"^{argument(function, 0)}:? {message}"):
        call(function, make())
    if function is not metrics.frechet_floor:
        with pytest.raises(InputError, match=f"^{argument(function, 1)}:? {message}"):
            call(function, gaussian(20), make())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_fewest_samples_give_numbers_and_fewer_are_refused(function):
    least = FUNCTIONS[function]
    assert all(map(math.isfinite, numbers(call(function, gaussian(least)))))
    if least > 1:
        with pytest.raises(InputError, match=f"too few.*{least} or more are needed"):
            call(function, gaussian(least - 1))
    if function is metrics.covers:
        with pytest.raises(InputError, match="manifold: 3 samples of 6 features are too few, 4 or more are needed"):
            call(function, gaussian(20), gaussian(3))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_constant_features_give_numbers(function):
    constant = torch.full((20, 6), 0.3)
    assert all(map(math.isfinite, numbers(call(function, constant, constant.clone()))))
    assert all(map(math.isfinite, numbers(call(function, constant))))


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f is not metrics.frechet_floor], ids=lambda f: f.__name__)
def test_sets_of_different_dimensions_are_refused(function):
    with pytest.raises(InputError, match="the same number of features, .* has 6 and .* has 5"):
        call(function, gaussian(20), gaussian(20, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_narrow_features_are_widened(function, dtype):
    narrow, other = gaussian(20).to(dtype), gaussian(20, seed=9).to(dtype)
    assert numbers(call(function, narrow, other)) == numbers(call(function, narrow.double(), other.double()))
    assert narrow.dtype == dtype


@pytest.mark.parametrize(
    "function, options, message",
    [
        (metrics.frechet_interval, {"level": 1}, "level must be between 0 and 1, got 1"),
        (metrics.neighbour_measures, {"level": 0}, "level must be between 0 and 1, got 0"),
        (metrics.neighbour_measures, {"level": math.nan}, "level must be between 0 and 1"),
        (metrics.frechet_interval, {"resamples": 0}, "resamples must be a whole number, 1 or more, got 0"),
        (metrics.neighbour_measures, {"resamples": 0}, "resamples must be a whole number"),
        (metrics.compare, {"resamples": 2.5}, "resamples must be a whole number, 1 or more, got 2.5"),
        (metrics.kernel_distance, {"subsets": 0}, "subsets must be a whole number"),
        (metrics.frechet_at_infinity, {"subsets": 0}, "subsets must be a whole number"),
        (metrics.frechet_at_infinity, {"points": 1}, "points must be a whole number, 2 or more, got 1"),
        (metrics.covers, {"k": 0}, "k must be a whole number"),
        (metrics.frechet_floor, {"splits": 0}, "splits must be a whole number"),
    ],
)
def test_numbers_that_cannot_work_are_refused(function, options, message):
    sets = [gaussian(20)] if function is metrics.frechet_floor else [gaussian(20), gaussian(20, seed=1)]
    with pytest.raises(InputError, match=message):
        function(*sets, **options)


@pytest.fixture(params=DEFAULTS, ids=str)
def other_defaults(request):
    with other_default(request.param):
        yield


RESULTS = {}
"""The values of every measure under torch's own defaults."""


@pytest.fixture(params=FUNCTIONS, ids=lambda function: function.__name__)
def measured(request):
    """A measure, its features and its result under torch's own defaults."""
    pair = gaussian(30).float(), gaussian(40, seed=1).float()
    RESULTS.setdefault(request.param, call(request.param, *pair))
    return request.param, pair, RESULTS[request.param]


def test_defaults_of_torch_change_nothing(measured, other_defaults):
    function, pair, expected = measured
    assert numbers(call(function, *pair)) == numbers(expected)
