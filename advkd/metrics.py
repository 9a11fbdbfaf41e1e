"""How far apart two sets of images are, measured on their features ``(N, D)``.

The Frechet distance (Heusel et al. 2017, eq. 6) and KID (Binkowski et al. 2018) are torchmetrics'; precision and recall are
Kynkaanniemi et al.'s (2019, eq. 1 and 2). All are biased by the number of samples: compare equal N, and with the floor that
two disjoint sets of one distribution give.
"""

import contextlib
import warnings

import torch
from torch import nn

from .errors import InputError


class _Given(nn.Module):
    """torchmetrics' extractor for features that are there already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


NEIGHBOUR = 3
"""k of the manifolds behind precision and recall."""


def fewest(dimension):
    """The fewest samples that features of a dimension can be measured with: covariances and neighbours need that many."""
    return max(2 * dimension, NEIGHBOUR + 2)


def require_enough(features, name):
    """Refuse a set of features ``(N, D)`` with too few samples."""
    samples, dimension = features.shape
    if samples < fewest(dimension):
        needed = f"{fewest(dimension)} or more are needed"
        raise InputError(f"{name}: {samples} images are too few for {dimension} features; {needed}")


def frechet_distance(generated, reference):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of features ``(N, D)`` and ``(M, D)``, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(generated.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(generated, reference, subsets=100, seed=0):
    """KID, ``(mean, standard deviation)`` over ``subsets`` random subsets of half the samples (at most 1,000), seeded."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(generated) // 2, len(reference) // 2)
    with warnings.catch_warnings(), _seeded(seed):
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(feature=_Given(generated.shape[1]), subsets=subsets, subset_size=size)
        metric.update(reference.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def covers(points, manifold, k=NEIGHBOUR):
    """``(N, M)`` bool: which of ``points`` (N, D) are within the k-th neighbour's distance of which of ``manifold`` (M, D).

    Precision is the share of generated points that some reference point covers, recall that of reference points that some
    generated one covers.
    """
    radii = distances(manifold, manifold).kthvalue(k + 1, dim=1).values
    return distances(points, manifold) <= radii


def distances(points, others):
    """Euclidean distances ``(N, M)`` of features, in float64: in float32 a copy would seem some way off."""
    return torch.cdist(points.double(), others.double())


def frechet_interval(generated, reference, resamples=200, seed=0, level=0.95):
    """Bootstrap interval ``(low, high)`` of :func:`frechet_distance` at these N: both sets are drawn anew with replacement.

    A resample repeats samples, which raises the distance as fewer samples would; the interval is therefore that of the
    resampled distances, moved so that its centre of mass is the measured distance. Near the floor it is too wide rather than
    too narrow.
    """
    measured = frechet_distance(generated, reference)
    generator = torch.Generator().manual_seed(seed)
    values = [frechet_distance(_resample(generated, generator), _resample(reference, generator)) for _ in range(resamples)]
    return _percentiles(torch.tensor(values) + measured - sum(values) / len(values), level)


def neighbour_measures(generated, reference, resamples=200, seed=0, level=0.95):
    """Precision, recall, nearest-neighbour distance and diversity of features, with bootstrap intervals.

    ``nearest`` is the mean distance of a generated point to the closest reference point, ``diversity`` the mean distance of two
    generated points. Both sets are drawn anew, the manifolds' radii stay; the resampled values are moved so that their centre
    of mass is the measured one, as a resample holds only two thirds of a set's points.

    Returns:
        ``{"precision": value, "precision_interval": [low, high], ...}``.
    """
    generator = torch.Generator().manual_seed(seed)
    to_reference, within = distances(generated, reference), distances(generated, generated)
    covered, recalled = covers(generated, reference).double(), covers(reference, generated).double()
    ours, theirs = (_counts(len(features), resamples, generator) for features in (generated, reference))
    n, m = len(generated), len(reference)
    there, here = (theirs > 0).double(), (ours > 0).double()
    resampled = {
        "precision": ((covered @ there > 0) * ours).sum(dim=0) / n,
        "recall": ((recalled @ here > 0) * theirs).sum(dim=0) / m,
        "nearest": torch.stack([_weighted_nearest(to_reference, w, kept) for w, kept in zip(ours.T, there.T, strict=True)]),
        "diversity": (ours * (within @ ours)).sum(dim=0) / (n * (n - 1)),
    }
    measured = {
        "precision": covered.any(dim=1).double().mean(),
        "recall": recalled.any(dim=1).double().mean(),
        "nearest": to_reference.min(dim=1).values.mean(),
        "diversity": within.sum() / (n * (n - 1)),
    }
    result = {}
    for name, value in measured.items():
        result[name] = value.item()
        result[f"{name}_interval"] = _percentiles(resampled[name] + value - resampled[name].mean(), level)
    return result


def _counts(size, resamples, generator):
    """How often each of ``size`` samples is drawn in each resample: ``(size, resamples)`` float64."""
    rows = torch.randint(size, (size, resamples), generator=generator)
    return torch.zeros(size, resamples, dtype=torch.float64).scatter_add_(0, rows, torch.ones(rows.shape, dtype=torch.float64))


def _weighted_nearest(matrix, weights, kept):
    return (matrix[:, kept > 0].min(dim=1).values * weights).sum() / weights.sum()


def frechet_at_infinity(generated, reference, points=8, subsets=5, seed=0):
    """The Frechet distance extrapolated to infinitely many samples (Chong and Forsyth 2020, section 4).

    Both sets are thinned to the same N; the distance is linear in 1/N, and the intercept is what remains without the bias.

    Returns:
        ``{"value": intercept, "slope": ..., "sizes": [N, ...], "distances": [mean over subsets, ...]}``.
    """
    largest, dimension = min(len(generated), len(reference)), generated.shape[1]
    smallest = max(largest // 4, min(2 * dimension, largest // 2), dimension + 1)
    sizes = torch.linspace(1 / largest, 1 / smallest, points).reciprocal().round().long().tolist()
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for size in sizes:
        pairs = [(_thin(generated, size, generator), _thin(reference, size, generator)) for _ in range(subsets)]
        distances.append(sum(frechet_distance(*pair) for pair in pairs) / subsets)
    inverse, values = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    slope = ((inverse - inverse.mean()) * (values - values.mean())).sum() / (inverse - inverse.mean()).square().sum()
    value = values.mean() - slope * inverse.mean()
    return {"value": value.item(), "slope": slope.item(), "sizes": sizes, "distances": distances}


def frechet_floor(samples, splits=20, seed=0):
    """The Frechet distances of ``splits`` random splits of features ``(2 N, D)`` into two halves.

    Their mean is the floor of the distance at N: what a perfect generator would reach.
    """
    generator = torch.Generator().manual_seed(seed)
    half, distances = len(samples) // 2, []
    for _ in range(splits):
        mixed = samples[torch.randperm(len(samples), generator=generator)]
        distances.append(frechet_distance(mixed[:half], mixed[half : 2 * half]))
    return distances


def compare(generated, reference, resamples=200, seed=0):
    """Every measure of generated features ``(N, D)`` against reference ones ``(M, D)``, as a dict of numbers and intervals."""
    require_enough(generated, "generated images")
    require_enough(reference, "reference images")
    kid, kid_deviation = kernel_distance(generated, reference, seed=seed)
    return {
        "samples": [len(generated), len(reference)],
        "frechet": frechet_distance(generated, reference),
        "frechet_interval": frechet_interval(generated, reference, resamples, seed),
        "frechet_at_infinity": frechet_at_infinity(generated, reference, seed=seed),
        "kid": kid,
        "kid_standard_deviation": kid_deviation,
        **neighbour_measures(generated, reference, resamples, seed),
    }


def _percentiles(values, level):
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(values.double(), tails).tolist()


def _resample(features, generator):
    return features[torch.randint(len(features), (len(features),), generator=generator)]


def _thin(features, size, generator):
    return features[torch.randperm(len(features), generator=generator)[:size]]


@contextlib.contextmanager
def _seeded(seed):
    # torchmetrics draws KID's subsets from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
