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


def require_enough(features, name):
    """Refuse a set of features ``(N, D)`` with too few samples for a covariance."""
    samples, dimension = features.shape
    if samples <= dimension:
        raise InputError(f"{name}: {samples} samples are too few for {dimension} features; {2 * dimension} or more are needed")


def frechet_distance(generated, reference):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of features ``(N, D)`` and ``(M, D)``, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(generated.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(generated, reference, subsets=100, seed=0):
    """KID, ``(mean, standard deviation)`` over ``subsets`` random subsets of up to 1,000 samples, seeded."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(generated), len(reference))
    with warnings.catch_warnings(), _seeded(seed):
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(feature=_Given(generated.shape[1]), subsets=subsets, subset_size=size)
        metric.update(reference.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def inside(points, manifold, k=3):
    """Which of ``points`` (N, D) lie in the manifold of ``manifold`` (M, D): within the k-th neighbour of one of its points.

    Precision is the mean over generated points in the reference's manifold, recall that over reference points in the
    generated one's. Returns ``(N,)`` float64, 0 or 1.
    """
    radii = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
    return (torch.cdist(points, manifold) <= radii).any(dim=1).double()


def nearest_distances(points, others):
    """Distance of each of ``points`` (N, D) to the nearest of ``others``: ``(N,)``."""
    return torch.cdist(points, others).min(dim=1).values


def mean_distances(points):
    """Mean distance of each of ``points`` (N, D) to all others: ``(N,)``; its mean is the set's pairwise diversity."""
    return torch.cdist(points, points).sum(dim=1) / (len(points) - 1)


def frechet_interval(generated, reference, resamples=200, seed=0, level=0.95):
    """Bootstrap interval ``(low, high)`` of :func:`frechet_distance` at these N: both sets are drawn anew with replacement.

    A resample repeats samples, which raises the distance as fewer samples would; the interval is therefore that of the
    resampled distances, moved so that its centre of mass is the measured distance.
    """
    measured = frechet_distance(generated, reference)
    generator = torch.Generator().manual_seed(seed)
    values = [frechet_distance(_resample(generated, generator), _resample(reference, generator)) for _ in range(resamples)]
    return _percentiles(torch.tensor(values) + measured - sum(values) / len(values), level)


def mean_interval(values, resamples=1000, seed=0, level=0.95):
    """Bootstrap interval ``(low, high)`` of the mean of ``values`` (N,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return _percentiles(values[rows].double().mean(dim=1), level)


def frechet_at_infinity(generated, reference, points=8, subsets=5, seed=0):
    """The Frechet distance extrapolated to infinitely many samples (Chong and Forsyth 2020, section 4).

    Both sets are thinned to the same N; the distance is linear in 1/N, and the intercept is what remains without the bias.

    Returns:
        ``{"value": intercept, "slope": ..., "sizes": [N, ...], "distances": [mean over subsets, ...]}``.
    """
    largest, dimension = min(len(generated), len(reference)), generated.shape[1]
    smallest = max(largest // 4, min(2 * dimension, largest // 2))
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
    covered, nearest = inside(generated, reference), nearest_distances(generated, reference)
    recalled, spread = inside(reference, generated), mean_distances(generated)
    kid, kid_deviation = kernel_distance(generated, reference, seed=seed)
    result = {
        "samples": [len(generated), len(reference)],
        "frechet": frechet_distance(generated, reference),
        "frechet_interval": frechet_interval(generated, reference, resamples, seed),
        "frechet_at_infinity": frechet_at_infinity(generated, reference, seed=seed),
        "kid": kid,
        "kid_standard_deviation": kid_deviation,
    }
    means = {"precision": covered, "recall": recalled, "nearest": nearest, "diversity": spread}
    for name, values in means.items():
        result[name] = values.mean().item()
        result[f"{name}_interval"] = mean_interval(values, seed=seed)
    return result


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
