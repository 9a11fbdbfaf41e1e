"""Calls of the measures with random features, and what each must give by its definition: every distance by a difference."""

import itertools
import math

import numpy as np
import torch

from advkd.evaluation import metrics

from .call import Call
from .draw import DTYPES

UNSURE = 1e-6
"""Share of the features' size within which two distances may compare either way."""


def measure(draw):
    """A distance of features."""
    name = draw.choice(tuple(_MEASURES))
    function, oracle, bound, names, options = _MEASURES[name]
    d = draw.randint(1, 4)
    n, dtype = draw.randint(max(4, d + 2), 9), draw.choice(DTYPES)
    shape = lambda: (draw.choice((n, n, n + 2)), d)  # noqa: E731
    sets = {key: draw.tensor(shape(), dtype, finite=draw.chance(0.95)) for key in names}
    arguments = {**sets, **{key: draw.choice(values) for key, values in options.items()}}
    fits = (names, ("points", "manifold", "k")) if name == "covers" else (names,)
    call = Call(name, function, arguments, oracle, oracle, _bounded(bound, names), order=None, fits=fits)
    for key, features in sets.items():
        call.spoil(key, not features.isfinite().all())
    return call


def _bounded(bound, names):
    """A bound from the size of the largest feature."""
    return lambda wide, wanted, same: bound(wide, wanted, max(float(wide[name].abs().max()) for name in names))


def _squares(wide, wanted, size):
    return [1e-6 * (1 + size**2) + 1e-6 * w.abs() for w in wanted]


def _lengths(wide, wanted, size):
    return [1e-6 * (1 + size) + 1e-9 * w.abs() for w in wanted]


def _cubes(wide, wanted, size):
    """KID's kernel is a third power of products; a deviation of equal values is the root of their rounding."""
    return [1e-9 * (1 + size**6) + 0 * w for w in wanted]


def _line(wide, wanted, size):
    """A line through a few points; ends of it are further off than they are, and the slope by a number of samples."""
    scales = (10, 100, *[1] * (len(wanted) - 2))
    return [scale * bound for scale, bound in zip(scales, _squares(wide, wanted, size), strict=True)]


def _covered(wide, wanted, size):
    return [torch.where(_unsure(wide["points"], wide["manifold"], wide["k"]), math.nan, 0.0)]


def _neighbourly(wide, wanted, size):
    """Shares are exact but where two distances are about the same: then they may be anything."""
    generated, reference = wide["generated"], wide["reference"]
    unsure = [_unsure(generated, reference, metrics.NEIGHBOUR).any(), _unsure(reference, generated, metrics.NEIGHBOUR).any()]
    # Precision, recall, nearest and diversity, a value and two ends of an interval each.
    shares = [torch.full_like(w, math.nan if unsure[i // 3] else 1e-9) for i, w in enumerate(wanted[:6])]
    return shares + _lengths(wide, wanted[6:], size)


def distances_of(a, b):
    """Euclidean distances ``(N, M)``."""
    return (a.double()[:, None] - b.double()[None]).square().sum(-1).sqrt()


def _reaches(manifold, k):
    """Distance of each point to its k-th neighbour, itself left out."""
    rows = distances_of(manifold, manifold)
    return torch.stack([torch.cat((row[:i], row[i + 1 :])).sort().values[k - 1] for i, row in enumerate(rows)])


def _covers(points, manifold, k):
    return distances_of(points, manifold) <= _reaches(manifold, k)


def _unsure(points, manifold, k):
    size = max(points.abs().max(), manifold.abs().max()) + 1e-6
    return (distances_of(points, manifold) - _reaches(manifold, k)).abs() <= UNSURE * size


def _frechet(generated, reference):
    a, b = generated.double(), reference.double()
    one, two = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    values = np.linalg.eigvals(one @ two).astype(complex)
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(one) + np.trace(two) - 2 * np.sqrt(values).real.sum())


def _generator(arguments):
    return torch.Generator(device="cpu").manual_seed(int(arguments["seed"]))


def _drawn(features, generator):
    """As many samples again, with replacement."""
    rows = torch.randint(len(features), (len(features),), generator=generator, device="cpu", dtype=torch.int64)
    return features[rows]


def _some(features, size, generator):
    """Samples without replacement."""
    return features[torch.randperm(len(features), generator=generator, device="cpu", dtype=torch.int64)[:size]]


def _middle(resampled, measured, level):
    """The ends of the interval of resampled values around the measured one."""
    values = np.array(resampled) - np.mean(resampled) + measured
    return [float(np.quantile(values, share)) for share in ((1 - level) / 2, (1 + level) / 2)]


def kernel_distance(arguments):
    generated, reference = arguments["generated"], arguments["reference"]
    generator, size = _generator(arguments), min(len(generated), len(reference)) // 2
    values = []
    for _ in range(int(arguments["subsets"])):
        other, one = _some(reference, size, generator), _some(generated, size, generator)
        values.append(_squared_discrepancy(one.double().numpy(), other.double().numpy()))
    return float(np.mean(values)), float(np.std(values))


def _squared_discrepancy(one, other):
    """The unbiased estimate with the kernel (x y / D + 1)^3."""
    kernel = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    m = len(one)
    within = [sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1)) for x in (one, other)]
    return sum(within) - 2 * sum(kernel(a, b) for a in one for b in other) / m**2


def frechet_interval(arguments):
    generated, reference, generator = arguments["generated"], arguments["reference"], _generator(arguments)
    values = []
    for _ in range(int(arguments["resamples"])):
        ours = _drawn(generated, generator)
        values.append(_frechet(ours, _drawn(reference, generator)))
    return _middle(values, _frechet(generated, reference), float(arguments["level"]))


def neighbour_measures(arguments):
    generated, reference, generator = arguments["generated"], arguments["reference"], _generator(arguments)
    sets, resamples = (generated, reference), int(arguments["resamples"])
    picks = [torch.randint(len(x), (len(x), resamples), generator=generator, device="cpu", dtype=torch.int64) for x in sets]
    found = {
        "here": _covers(generated, reference, metrics.NEIGHBOUR),
        "there": _covers(reference, generated, metrics.NEIGHBOUR),
        "across": distances_of(generated, reference),
        "within": distances_of(generated, generated),
    }
    measured = _of_rows(found, torch.arange(len(generated), device="cpu"), torch.arange(len(reference), device="cpu"))
    resampled = [_of_rows(found, picks[0][:, k], picks[1][:, k]) for k in range(resamples)]
    middles = [_middle([row[k] for row in resampled], measured[k], float(arguments["level"])) for k in range(4)]
    return [value for k in range(4) for value in (measured[k], *middles[k])]


def _of_rows(found, ours, theirs):
    """Precision, recall, nearest distance and diversity of chosen samples."""
    precision = found["here"][ours][:, theirs].any(1).double().mean()
    recall = found["there"][theirs][:, ours].any(1).double().mean()
    nearest = found["across"][ours][:, theirs].amin(1).mean()
    pairs = list(itertools.permutations(range(len(ours)), 2))
    diversity = sum(found["within"][ours[i], ours[j]] for i, j in pairs) / len(pairs)
    return [float(value) for value in (precision, recall, nearest, diversity)]


def frechet_at_infinity(arguments):
    generated, reference, generator = arguments["generated"], arguments["reference"], _generator(arguments)
    largest, dimension = min(len(generated), len(reference)), generated.shape[1]
    smallest = max(largest // 4, min(2 * dimension, largest // 2), dimension + 1)
    inverse = torch.linspace(1 / largest, 1 / smallest, int(arguments["points"]), dtype=torch.float32, device="cpu")
    sizes, values = [round(1 / float(x)) for x in inverse], []
    for size in sizes:
        rounds = []
        for _ in range(int(arguments["subsets"])):
            ours = _some(generated, size, generator)
            rounds.append(_frechet(ours, _some(reference, size, generator)))
        values.append(sum(rounds) / len(rounds))
    slope, value = np.polyfit([1 / size for size in sizes], values, 1)
    return [float(value), float(slope), *sizes, *values]


def frechet_floor(arguments):
    samples, generator = arguments["samples"], _generator(arguments)
    half, values = len(samples) // 2, []
    for _ in range(int(arguments["splits"])):
        mixed = _some(samples, 2 * half, generator)
        values.append(_frechet(mixed[:half], mixed[half:]))
    return values


_BOTH = ("generated", "reference")
_SEEDS = {"seed": (0, 3)}
_MEASURES = {
    "distances": (
        metrics.distances,
        lambda given: distances_of(given["points"], given["others"]),
        _lengths,
        ("points", "others"),
        {},
    ),
    "frechet_distance": (
        metrics.frechet_distance,
        lambda given: _frechet(given["generated"], given["reference"]),
        _squares,
        _BOTH,
        {},
    ),
    "kernel_distance": (metrics.kernel_distance, kernel_distance, _cubes, _BOTH, {"subsets": (1, 3), **_SEEDS}),
    "covers": (
        metrics.covers,
        lambda given: _covers(given["points"], given["manifold"], int(given["k"])),
        _covered,
        ("points", "manifold"),
        {"k": (1, 3)},
    ),
    "frechet_interval": (
        metrics.frechet_interval,
        frechet_interval,
        _squares,
        _BOTH,
        {"resamples": (1, 3), **_SEEDS, "level": (0.95, 0.5)},
    ),
    "neighbour_measures": (
        metrics.neighbour_measures,
        neighbour_measures,
        _neighbourly,
        _BOTH,
        {"resamples": (1, 3), **_SEEDS, "level": (0.95, 0.5)},
    ),
    "frechet_at_infinity": (
        metrics.frechet_at_infinity,
        frechet_at_infinity,
        _line,
        _BOTH,
        {"points": (2, 3), "subsets": (1, 2), **_SEEDS},
    ),
    "frechet_floor": (metrics.frechet_floor, frechet_floor, _squares, ("samples",), {"splits": (1, 2), **_SEEDS}),
}
"""Name -> function, what it must give, how far it may be off, its sets' names, and values of its other arguments."""
