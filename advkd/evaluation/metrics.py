"""Distances between two sets of images, measured on their features ``(N, D)``.

The Frechet distance (Heusel et al. 2017, eq. 6) and KID (Binkowski et al. 2018, with torchmetrics' estimator) compare
distributions; precision and recall are Kynkaanniemi et al.'s (2019, eq. 1 and 2). All are biased by the number of samples:
compare equal N, and with the floor that two disjoint sets of one distribution give.

Every function takes floating-point tensors of any dtype and device and computes in float64 on the CPU. Features that are not a
finite matrix, too few or of another dimension than those they are compared with raise an :class:`InputError`. ``seed``, in
[0, 2^64), determines random subsets and resamples; intervals hold the central ``level``, in (0, 1), of ``resamples`` draws.
"""

import math
from typing import Any

import torch

from .feature_sets import NEIGHBOUR, alike, both, checked, require_bootstrap, require_enough, require_least, require_samples
from .resampling import recentred_interval, resample, rows_generator, thin

BLOCK = 2**21
"""Distances held in memory at a time."""

CLOSEST = 32
"""Nearest references of a point that are tried first in a resample, which holds none of them once in e^32 times."""


def frechet_distance(generated: torch.Tensor, reference: torch.Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the means and covariances of two sets of features.

    Args:
        generated: ``(N, D)``, N at least 2.
        reference: ``(M, D)``, M at least 2.

    Returns:
        The distance, exact to rounding for singular covariances too, and never negative.
    """
    return _frechet(*both(generated, reference, 2))


def _frechet(generated, reference):
    (mean, factor), (other_mean, other_factor) = _moments(generated), _moments(reference)
    # With S_1 = X^T X and S_2 = Y^T Y the trace of the root is the nuclear norm of X Y^T: no small eigenvalue is squared.
    root = torch.linalg.svdvals(factor @ other_factor.T).sum()
    traces = factor.square().sum() + other_factor.square().sum()
    return max(0.0, ((mean - other_mean).square().sum() + traces - 2 * root).item())


def _moments(features):
    """Mean, and a factor X with as few rows as it can have: X^T X is the covariance."""
    mean = features.mean(dim=0)
    centred = (features - mean).div_(math.sqrt(len(features) - 1))
    return mean, _triangle(centred) if len(features) > features.shape[1] else centred


def _triangle(tall):
    """R ``(D, D)`` with R^T R = X^T X."""
    factor, failed = torch.linalg.cholesky_ex(tall.T @ tall, upper=True)
    if not failed:
        # Half the work of QR, but its rounding grows with R's condition, of which this is a bound.
        identity = torch.eye(len(factor), dtype=torch.float64, device="cpu")
        inverse = torch.linalg.solve_triangular(factor, identity, upper=True)
        if factor.norm() * inverse.norm() < 1e4:
            return factor
    return torch.linalg.qr(tall, mode="r").R


def kernel_distance(generated: torch.Tensor, reference: torch.Tensor, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """KID over random subsets of half the samples of the smaller set, at most 1,000.

    Args:
        generated: ``(N, D)``, N at least 4.
        reference: ``(M, D)``, M at least 4.
        subsets: number of subsets.
        seed: determines the subsets.

    Returns:
        ``(mean, standard deviation)`` over the subsets.
    """
    with torch.device("cpu"):
        from torchmetrics.image.kid import poly_mmd

    generated, reference = both(generated, reference, 4)
    require_least(1, subsets=subsets)
    generator, size = rows_generator(seed), min(1000, len(generated) // 2, len(reference) // 2)
    pairs = ((thin(reference, size, generator), thin(generated, size, generator)) for _ in range(subsets))
    values = torch.stack([poly_mmd(*pair) for pair in pairs])
    return values.mean().item(), values.std(unbiased=False).item()


def covers(points: torch.Tensor, manifold: torch.Tensor, k: int = NEIGHBOUR) -> torch.Tensor:
    """Coverage of points by a manifold, of which a point covers all that is no farther than its k-th neighbour.

    Squared distances that differ by the arithmetic's rounding alone, about 1e-15 D of the features' squares, are equal: a tie
    is within. Precision is the share of generated points that some reference point covers, recall that of reference points that
    some generated one covers. Beside the result this takes a few distances at a time (:data:`BLOCK`).

    Args:
        points: ``(N, D)``.
        manifold: ``(M, D)``, M above ``k``.
        k: number of the neighbour.

    Returns:
        ``(N, M)`` bool on the CPU, True where a point is covered by one of ``manifold``.
    """
    require_least(1, k=k)
    points, manifold = checked(points, "points", 1), checked(manifold, "manifold", k + 1)
    points, manifold = _shifted(*alike(points, manifold, ("points", "manifold")))
    radii, result = _radii(manifold, k), torch.empty(len(points), len(manifold), dtype=torch.bool, device="cpu")
    for rows, block in _blocks(points, manifold):
        torch.le(block, radii, out=result[rows])
    return result


def distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean distances between two sets.

    Args:
        points: ``(N, D)``.
        others: ``(M, D)``.

    Returns:
        ``(N, M)`` float64 on the CPU. Distances below the resolution of the arithmetic, about 1e-7 of the features' own size,
        are 0: a copy is at distance 0.
    """
    points, others = checked(points, "points", 1), checked(others, "others", 1)
    points, others = _shifted(*alike(points, others, ("points", "others")))
    result = torch.empty(len(points), len(others), dtype=torch.float64, device="cpu")
    for rows, block in _blocks(points, others):
        result[rows] = block
    return result


def _shifted(points, others):
    """Both sets less ``others``' medians, which are data: differences of float32 or whole numbers stay exact, squares small."""
    centre = others.median(dim=0).values
    return points - centre, others - centre


def _blocks(points, others):
    """Yield ``(rows, distances to others)`` for all of ``points``; each block reuses the memory of the one before."""
    norms, others_norms = points.square().sum(dim=1), others.square().sum(dim=1)
    count, resolution = max(1, BLOCK // len(others)), _resolution(points)
    memory = torch.empty(min(count, len(points)), len(others), dtype=torch.float64, device="cpu")
    for first in range(0, len(points), count):
        rows = slice(first, min(first + count, len(points)))
        sizes, block = norms[rows, None] + others_norms, memory[: rows.stop - first]
        torch.addmm(sizes, points[rows], others.T, alpha=-2, out=block)
        block.masked_fill_(block <= sizes.mul_(resolution), 0)
        yield rows, block.sqrt_()


def _resolution(points):
    """Rounding of a squared distance, in parts of both points' squares."""
    return (points.shape[1] + 2) * torch.finfo(torch.float64).eps


def _radii(manifold, k):
    """Radii within which each point covers others."""
    radii = torch.empty(len(manifold), dtype=torch.float64, device="cpu")
    for rows, block in _blocks(manifold, manifold):
        radii[rows] = _distance(block, k)
    return _with_ties(manifold, radii)


def _with_ties(points, radii):
    """Radii, larger by the rounding of two distances from each point: a tie is within, however a product rounds it."""
    squares = radii.square()
    # A point within the radius has a square of at most 2 |point|^2 + 2 radius^2.
    return (squares + 6 * _resolution(points) * (points.square().sum(dim=1) + squares)).sqrt_()


def _distance(block, k):
    """Distances of a block's points to their k-th neighbours; the closest one is the point itself."""
    return block.topk(k + 1, dim=1, largest=False, sorted=False).values.amax(dim=1)


def frechet_interval(
    generated: torch.Tensor, reference: torch.Tensor, resamples: int = 200, seed: int = 0, level: float = 0.95
) -> list[float]:
    """Bootstrap interval of :func:`frechet_distance` at these N: both sets are drawn anew with replacement.

    A resample repeats samples, which raises the distance as fewer samples would; the interval is therefore that of the
    resampled distances, moved so that its centre of mass is the measured distance. Near the floor it is too wide rather than
    too narrow.

    Args:
        generated: ``(N, D)``, N at least 2.
        reference: ``(M, D)``, M at least 2.
        resamples: number of draws.
        seed: determines the draws.
        level: share of the resampled distances that the interval holds, in (0, 1).

    Returns:
        ``[low, high]``.
    """
    generated, reference = both(generated, reference, 2)
    require_bootstrap(resamples, level)
    generator = rows_generator(seed)
    values = [_frechet(resample(generated, generator), resample(reference, generator)) for _ in range(resamples)]
    return recentred_interval(values, _frechet(generated, reference), level)


def neighbour_measures(
    generated: torch.Tensor, reference: torch.Tensor, resamples: int = 200, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Precision, recall, nearest-neighbour distance and diversity of features, with bootstrap intervals.

    Both sets are drawn anew, the manifolds' radii stay; the resampled values are moved so that their centre of mass is the
    measured one, as a resample holds only two thirds of a set's points. Memory: a few blocks of :data:`BLOCK` distances, and
    about 40 bytes per sample and resample.

    Args:
        generated: ``(N, D)``, N at least 4.
        reference: ``(M, D)``, M at least 4.
        resamples: number of draws.
        seed: determines the draws.
        level: share of the resampled values that an interval holds, in (0, 1).

    Returns:
        ``{"precision": value, "precision_interval": [low, high], ...}``, and so for ``recall`` (both in [0, 1]), ``nearest``,
        the mean distance of a generated point to the closest reference point, and ``diversity``, that of two generated points.
    """
    generated, reference = _shifted(*both(generated, reference, NEIGHBOUR + 1))
    require_bootstrap(resamples, level)
    generator = rows_generator(seed)
    ours, theirs = (_counts(len(features), resamples, generator) for features in (generated, reference))
    radii, diversity = _within(generated, ours)
    measures = {**_across(generated, reference, radii, _radii(reference, NEIGHBOUR), ours, theirs), "diversity": diversity}
    result: dict[str, Any] = {}
    for name, (value, *resampled) in ((name, values.tolist()) for name, values in measures.items()):
        result |= {name: value, f"{name}_interval": recentred_interval(resampled, value, level)}
    return result


def _counts(size, resamples, generator):
    """Number of times that each sample is drawn: once, as measured, then per resample; ``(size, 1 + resamples)`` float64."""
    rows = torch.randint(size, (size, resamples), generator=generator, dtype=torch.int64, device="cpu")
    counts = torch.ones(size, 1 + resamples, dtype=torch.float64, device="cpu")
    counts[:, 1:] = 0
    counts[:, 1:].scatter_add_(0, rows, counts[:, :1].expand(-1, resamples))
    return counts


def _within(points, counts):
    """Radii ``(N,)`` of a set, and its diversity under each column of ``counts``."""
    radii = torch.empty(len(points), dtype=torch.float64, device="cpu")
    total = torch.zeros(counts.shape[1], dtype=torch.float64, device="cpu")
    for rows, block in _blocks(points, points):
        radii[rows] = _distance(block, NEIGHBOUR)
        total += (counts[rows] * (block @ counts)).sum(dim=0)
    return _with_ties(points, radii), total / (len(points) * (len(points) - 1))


def _across(generated, reference, radii, reference_radii, ours, theirs):
    """Precision, recall and nearest distance under each column of both sets' counts, in one pass over the distances."""
    # Counts of drawn points that cover a point: float32 tells none from some.
    here, there = ((counts > 0).to(torch.float32) for counts in (ours, theirs))
    precision, nearest = (torch.zeros(ours.shape[1], dtype=torch.float64, device="cpu") for _ in range(2))
    recalled = torch.zeros_like(there)
    for rows, block in _blocks(generated, reference):
        precision += (((block <= reference_radii).to(torch.float32) @ there > 0) * ours[rows]).sum(dim=0)
        recalled += (block <= radii[rows, None]).to(torch.float32).T @ here[rows]
        nearest += (_nearest(block, there.T > 0) * ours[rows].T).sum(dim=1)
    recall = ((recalled > 0) * theirs).sum(dim=0)
    return {"precision": precision / len(generated), "recall": recall / len(reference), "nearest": nearest / len(generated)}


def _nearest(block, drawn):
    """Least of each row's distances to ``drawn`` (resamples, M) points, ``(resamples, N)``: mostly of the closest few."""
    closest, columns = block.topk(min(CLOSEST, block.shape[1]), dim=1, largest=False, sorted=False)
    result = torch.empty(len(drawn), len(block), dtype=torch.float64, device="cpu")
    for nearest, kept in zip(result, drawn, strict=True):
        torch.amin(closest.where(kept[columns], math.inf), dim=1, out=nearest)
        if (missed := nearest.isinf()).any():
            nearest[missed] = block[missed][:, kept].amin(dim=1)
    return result


def frechet_at_infinity(
    generated: torch.Tensor, reference: torch.Tensor, points: int = 8, subsets: int = 5, seed: int = 0
) -> dict[str, Any]:
    """The Frechet distance extrapolated to infinitely many samples (Chong and Forsyth 2020, section 4).

    Both sets are thinned to the same N; the distance is linear in 1/N, and the intercept is the distance without the bias.

    Args:
        generated: ``(N, D)``, N at least D + 2.
        reference: ``(M, D)``, M at least D + 2.
        points: number of sizes N, 2 or more.
        subsets: random subsets of each size.
        seed: determines the subsets.

    Returns:
        ``{"value": intercept, "slope": ..., "sizes": [N, ...], "distances": [mean over subsets, ...]}``.
    """
    generated, reference = both(generated, reference, 2)
    largest, dimension = min(len(generated), len(reference)), generated.shape[1]
    for features, name in ((generated, "generated"), (reference, "reference")):
        require_samples(features, name, dimension + 2)
    require_least(2, points=points)
    require_least(1, subsets=subsets)
    smallest = max(largest // 4, min(2 * dimension, largest // 2), dimension + 1)
    inverse = torch.linspace(1 / largest, 1 / smallest, points, dtype=torch.float32, device="cpu")
    sizes = inverse.reciprocal().round().to(torch.int64).tolist()
    generator = rows_generator(seed)
    values = []
    for size in sizes:
        pairs = [(thin(generated, size, generator), thin(reference, size, generator)) for _ in range(subsets)]
        values.append(sum(_frechet(*pair) for pair in pairs) / subsets)
    value, slope = _line([1 / size for size in sizes], values)
    return {"value": value, "slope": slope, "sizes": sizes, "distances": values}


def _line(x, y):
    """Intercept and slope of the least-squares line."""
    x, y = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (x, y))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item(), slope.item()


def frechet_floor(samples: torch.Tensor, splits: int = 20, seed: int = 0) -> list[float]:
    """The Frechet distances of random splits of features into two halves.

    Args:
        samples: ``(2 N, D)``, N at least 2.
        splits: number of splits.
        seed: determines the splits.

    Returns:
        A distance for each split. Their mean is the floor of the distance at N, which a perfect generator would reach.
    """
    samples = checked(samples, "samples", 4)
    require_least(1, splits=splits)
    generator, half, values = rows_generator(seed), len(samples) // 2, []
    for _ in range(splits):
        mixed = thin(samples, 2 * half, generator)
        values.append(_frechet(mixed[:half], mixed[half:]))
    return values


def compare(generated: torch.Tensor, reference: torch.Tensor, resamples: int = 200, seed: int = 0) -> dict[str, Any]:
    """Every measure of one set against another.

    Args:
        generated: ``(N, D)``, N at least :func:`fewest`.
        reference: ``(M, D)``, M at least :func:`fewest`.
        resamples: draws behind the intervals, whose level is 0.95.
        seed: determines all subsets and resamples.

    Returns:
        ``samples`` ``[N, M]``, ``frechet``, ``frechet_interval``, ``frechet_at_infinity`` (its dict), ``kid``,
        ``kid_standard_deviation``, and all of :func:`neighbour_measures`.
    """
    generated, reference = both(generated, reference, 1)
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
