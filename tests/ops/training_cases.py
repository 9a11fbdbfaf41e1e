"""Tests shared by all backends' kernels of the training ops: cases, and a check of a launcher.

``check`` gives a launcher NaN-poisoned outputs with guards around every tensor, and compares with the ``*_reference`` of the
op: bit for bit where only rounding in the stated order happens, else in float64 within a derived bound.
"""

import dataclasses

import torch

from advkd.ops.conv_bias_act_mask import conv_bias_act_mask_reference
from advkd.ops.interpolate import interpolate_reference
from advkd.ops.mask_mul import mask_mul_reference, pack
from advkd.ops.norm_act import moments_reference, norm_act_backward_reference, norm_act_reference, norm_act_sums_reference
from advkd.ops.penalty_reduce import MODES, penalty_reduce_reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNIT = 2.0**-24
"""Half of float32's epsilon: the largest relative error of one rounding."""
TREE = 64 * UNIT
"""Error of a sum of terms of one sign: no term passes through 64 additions, in a thread, a block and the last stage."""


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple
    dtype: torch.dtype = F32
    last: bool = False
    offset: int = 0
    in_place: bool = False
    planted: bool = False
    slope: float = 0.2
    bias: bool = True
    mode: str = "two-sided"
    target: float = 1.0
    scale: float = 1.0
    drawn: bool = False
    steps: tuple | None = None
    merge: bool = False
    mean: float = 0.5
    upsample: bool = False
    kept: bool = False
    masked: bool = False

    def __str__(self):
        changed = [f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        values = [f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed]
        return ",".join(["x".join(map(str, self.shape)), *values])


DTYPES_AND_LAYOUTS = [(dtype, last) for dtype in (F32, BF16, F16) for last in (False, True)]
# Cases of every op that works through samples element by element.
ELEMENTS = [
    # One element; 35, which no vector and no byte of a mask divides, with and without more than one channel.
    Case((1, 1)),
    Case((2, 1, 5, 7)),
    Case((3, 5, 7), planted=True),
    # No plane: a channel is an element.
    Case((2, 24), planted=True),
    # Whole vectors in every dtype; 17 channels, which no vector divides.
    *(Case((2, 8, 4, 4), dtype, last, planted=True) for dtype, last in DTYPES_AND_LAYOUTS),
    *(Case((2, 17, 3, 5), dtype, last=True) for dtype in (F32, BF16)),
    # More than one block per sample, the last one in part; whole bytes of mask but no whole vector of 16 of them.
    *(Case((2, 3, 40, 41), last=last, planted=True) for last in (False, True)),
    Case((2, 3, 37, 45), BF16),
    # A view whose base no vector fits.
    Case((2, 3, 8, 8), offset=1),
    Case((2, 3, 8, 8), F16, last=True, offset=3),
    # The result overwrites the input.
    Case((2, 3, 8, 8), in_place=True, planted=True),
    Case((2, 3, 5, 7), BF16, last=True, in_place=True),
]
# More channels than a tile or a block is wide.
MANY_CHANNELS = Case((2, 300, 2, 3), last=True)
SLOPES = [Case((2, 3, 5, 7), planted=True, slope=slope) for slope in (0.0, 1.0)]
NORMALIZED = [
    # One value; 35 values of a channel; channels that no vector divides and ones that fill vectors.
    Case((1, 1, 1, 1)),
    Case((2, 1, 5, 7), planted=True),
    *(Case((2, 3, 5, 7), last=last, planted=True) for last in (False, True)),
    *(Case((2, 17, 3, 5), dtype, last) for dtype in (F32, BF16) for last in (False, True)),
    *(Case((2, 8, 4, 8), dtype, last, planted=True) for dtype, last in DTYPES_AND_LAYOUTS),
    # Planes of several blocks; many images of few pixels.
    *(Case((2, 3, 41, 60), last=last) for last in (False, True)),
    Case((40, 2, 2, 2)),
    # The mean is subtracted before anything is rounded to it.
    *(Case((2, 3, 16, 20), last=last, mean=1000.0) for last in (False, True)),
    # A view whose base no vector fits.
    *(Case((2, 8, 4, 8), dtype, last, offset=offset) for dtype, last, offset in ((F32, False, 1), (F16, True, 3))),
]


def _also(cases, **changes):
    return [dataclasses.replace(case, **changes) for case in cases]


CASES = {
    "conv_bias_act_mask": [
        *ELEMENTS,
        *SLOPES,
        *_also(ELEMENTS[2:6], bias=False),
    ],
    "mask_mul": [*ELEMENTS, *SLOPES],
    "penalty_reduce": [
        *ELEMENTS,
        # One sample of zeros; gradients below and above the target; both penalties of these in one batch; r1.
        *(Case((3, 3, 5, 7), mode=mode, scale=scale) for mode in ("two-sided", "one-sided") for scale in (0.01, 1.0)),
        *(Case((3, 3, 5, 7), mode="one-sided", target=10.0, planted=planted) for planted in (False, True)),
        *(Case((2, 3, 40, 41), dtype, mode="r1", in_place=True) for dtype in (F32, BF16)),
        Case((2, 3, 5, 7), mode="r1", planted=True),
        # No target, so that the penalty of a sample of zeros is zero too.
        Case((3, 7), target=0.0),
        # Samples of more than one block beside an equally large sample of zeros.
        Case((3, 3, 40, 41), F16, last=True, mode="one-sided"),
    ],
    "interpolate": [
        *(dataclasses.replace(case, in_place=False) for case in ELEMENTS),
        # Drawn weights, by an int step and by tensors of one and of N; all three parts in one pass.
        *(Case((3, 3, 5, 7), last=last, drawn=True) for last in (False, True)),
        Case((3, 3, 5, 7), drawn=True, steps=(2**24 - 1,)),
        Case((3, 8, 4, 4), BF16, drawn=True, steps=(5, 0, 2**24 - 1), merge=True),
        *(Case((2, 8, 4, 4), dtype, last, merge=True, planted=True) for dtype, last in DTYPES_AND_LAYOUTS),
        *(Case((2, 3, 40, 41), last=last, drawn=True, merge=True) for last in (False, True)),
        Case((2, 3, 5, 7), F16, offset=1, merge=True),
        Case((5,), drawn=True, merge=True),
    ],
    "norm_act_moments": [
        *NORMALIZED,
        MANY_CHANNELS,
        # Many values of one channel and of 17.
        Case((3, 1, 90, 91)),
        Case((3, 17, 24, 25), BF16, last=True, mean=30.0),
        # A variance of zero.
        *(Case((2, 3, 40, 41), last=last, scale=0.0, mean=3.0) for last in (False, True)),
    ],
    "norm_act": [*NORMALIZED, *_also(NORMALIZED, upsample=True), MANY_CHANNELS, Case((2, 3, 5, 7), slope=0.0)],
    "norm_act_sums": [
        *NORMALIZED,
        dataclasses.replace(MANY_CHANNELS, upsample=True),
        # As in the backward pass: kept values are float32.
        *(dataclasses.replace(case, upsample=True, kept=case.dtype == F32) for case in NORMALIZED),
        Case((2, 3, 5, 7), upsample=True),
        Case((2, 3, 5, 7), BF16, kept=True),
        Case((2, 3, 4, 8), F16, last=True, upsample=True, kept=True, slope=0.0),
    ],
    "norm_act_backward": [
        *NORMALIZED,
        MANY_CHANNELS,
        *_also(NORMALIZED, upsample=True),
        *_also(NORMALIZED[:4], masked=True, in_place=True, upsample=True),
        *(Case((2, 8, 41, 32), last=last, masked=True, in_place=True, upsample=True) for last in (False, True)),
        Case((2, 3, 5, 7), masked=True),
        Case((2, 3, 4, 8), F16, last=True, masked=True, in_place=True, upsample=True),
    ],
}
"""Launcher's name -> its cases."""


class Guarded:
    """A tensor inside a larger one of NaN, or of 0xA5 in a mask: `untouched` is true while the rest is unchanged."""

    def __init__(self, shape, dtype, last=False, offset=0, device="cpu", values=None):
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + offset + 64,), 0xA5 if dtype == torch.uint8 else torch.nan, dtype=dtype, device=device)
        last = last and len(shape) == 4
        layout = torch.channels_last if last else torch.contiguous_format
        strides = torch.empty(shape, device="meta").contiguous(memory_format=layout).stride()
        self.tensor = self.buffer.as_strided(shape, strides, offset)
        self.size, self.offset = size, offset
        if values is not None:
            self.tensor.copy_(values)

    def untouched(self):
        rest = torch.cat((self.buffer[: self.offset], self.buffer[self.offset + self.size :]))
        return bool((rest == 0xA5 if rest.dtype == torch.uint8 else rest.isnan()).all())


class Tensors:
    """Makes a case's tensors on a device, always the same ones in the same order."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(0)
        self.guarded = []

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator)

    def like_case(self, values=None, shape=None):
        """A tensor of the case's dtype, layout and offset: NaN where no values are given."""
        case = self.case
        return self.guard(shape or case.shape, case.dtype, values, case.last, case.offset)

    def guard(self, shape, dtype=F32, values=None, last=False, offset=0):
        self.guarded.append(Guarded(shape, dtype, last, offset, self.device, values))
        return self.guarded[-1].tensor


def _planted(values, zeros=0.0):
    """NaN and infinities in the last sample, zeros in every sample's last element."""
    flat = values.reshape(len(values), -1)
    flat[:, -1] = zeros
    for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        flat[-1, place] = value
    return values


def _conv_bias_act_mask(case, make):
    values, bias = make.normal(case.shape), make.normal(case.shape[1:2]).to(case.dtype).float()
    if case.planted:
        # The sum with the bias is exactly zero.
        values = _planted(values, -bias[-1] if case.bias else 0.0)
    p = make.like_case(values)
    bias = make.guard(bias.shape, case.dtype, bias) if case.bias else None
    out = p if case.in_place else make.like_case()
    mask = make.guard((case.shape[0], (values[0].numel() + 7) // 8), torch.uint8)
    return (p, bias, case.slope, out, mask), {"out": out, "mask": mask}


def _mask_mul(case, make):
    values = make.normal(case.shape)
    bits = pack(make.normal((case.shape[0], values[0].numel())) > 0)
    x = make.like_case(_planted(values) if case.planted else values)
    out = x if case.in_place else make.like_case()
    mask = make.guard(bits.shape, torch.uint8, bits, offset=case.offset)
    return (x, mask, case.slope, out), {"out": out}


def _penalty_reduce(case, make):
    values = make.normal(case.shape) * case.scale
    if len(values) > 2:
        values[1] = 0
    g = make.like_case(_planted(values) if case.planted else values)
    out = g if case.in_place else make.like_case()
    penalties = make.guard(case.shape[:1])
    arguments = (g, case.target, 10.0, MODES.index(case.mode), out, penalties)
    return arguments, {"out": out, "penalties": penalties}


def _interpolate(case, make):
    n = case.shape[0]
    values = make.normal(case.shape)
    real = make.like_case(_planted(values) if case.planted else values)
    fake = make.like_case(make.normal(case.shape))
    weights = torch.rand(n, generator=make.generator)
    a = None if case.drawn else make.guard((n,), values=weights)
    # Indices beyond 32 bits, and a seed whose upper half counts.
    indices = torch.arange(n, device=make.device) * 2**33 + 5 if case.drawn else None
    steps = None if case.steps is None else torch.tensor(case.steps, device=make.device)
    out = make.like_case(shape=(3 * n, *case.shape[1:]) if case.merge else None)
    return (real, fake, a, indices, -(2**40) + 9, 0 if case.steps else 7, steps, out), {"out": out}


def _normalized(case, make):
    """x, weights, statistics: gamma and beta have both signs; zeros and a NaN are planted in the first and last channel."""
    channels = case.shape[1]
    # Means that every dtype holds, so that a value can be one exactly.
    mean = (case.mean + make.normal((channels,)) / 4).bfloat16().float()
    variance, weights = make.normal((channels,)).square() + 0.1, make.normal((2, channels))
    values = mean[:, None, None] + case.scale * make.normal(case.shape)
    if case.planted:
        weights[1, 0] = 0
        values[:, 0, :, -1] = mean[0]
        values[-1, -1, 0, 0] = torch.nan
    x = make.like_case(values)
    return x, make.guard(weights.shape, values=weights), make.guard((2, channels), values=torch.stack((mean, variance)))


def _norm_act_moments(case, make):
    values = case.mean + case.scale * make.normal(case.shape)
    if case.planted:
        values[-1, -1, 0, 0] = torch.nan
    statistics = make.guard((2, case.shape[1]))
    return (make.like_case(values), statistics), {"statistics": statistics}


def _upsampled(case):
    n, channels, height, width = case.shape
    return (n, channels, 2 * height, 2 * width) if case.upsample and not case.masked else case.shape


def _norm_act(case, make):
    tensors = _normalized(case, make)
    out = make.like_case(shape=_upsampled(case))
    return (*tensors, 1e-5, case.slope, case.upsample, out), {"out": out}


def _norm_act_sums(case, make):
    tensors = _normalized(case, make)
    gradient = make.like_case(make.normal(_upsampled(case)), _upsampled(case))
    kept = make.like_case() if case.kept else None
    sums = make.guard((2, case.shape[1]))
    results = {"kept": kept, "sums": sums} if case.kept else {"sums": sums}
    return (gradient, *tensors, 1e-5, case.slope, case.upsample, kept, sums), results


def _norm_act_backward(case, make):
    tensors = _normalized(case, make)
    gradient = make.like_case(make.normal(_upsampled(case)), _upsampled(case))
    means = make.guard((2, case.shape[1]), values=make.normal((2, case.shape[1])))
    dx = gradient if case.in_place else make.like_case()
    return (gradient, *tensors, means, 1e-5, case.slope, case.upsample, case.masked, dx), {"dx": dx}


def _penalty_bounds(case, arguments, expected):
    """The norm's error is half of TREE and a root, and passes to the excess undiminished."""
    g, share = arguments[0].flatten(1), 10.0 / len(arguments[0])
    norm = g.norm(dim=1)
    off = TREE * norm + 4 * UNIT * case.target
    if case.mode == "r1":
        return {"out": 8 * UNIT * expected["out"].abs(), "penalties": TREE * expected["penalties"]}
    excess = (expected["penalties"] / share).sqrt()
    slack = (2 * share * off / norm.where(norm > 0, 1))[:, None] * g.abs()
    penalties = share * (2 * excess * off + off.square()) + 8 * UNIT * expected["penalties"]
    return {"out": slack.view_as(expected["out"]) + TREE * expected["out"].abs(), "penalties": penalties}


def _moments_bounds(case, arguments, expected):
    """Errors of blocks' means, each TREE, and of the part of a mean that remains in the squares around it."""
    mean, variance = expected["statistics"]
    size = mean.abs() + variance.sqrt()
    return {"statistics": torch.stack((TREE * size, TREE * variance.sqrt() * size + (TREE * size).square()))}


def _terms(weights, x, statistics):
    """The normalised values, those before LeakyReLU, and the size of the terms of the latter."""
    mean, variance = (s[:, None, None] for s in statistics)
    gamma, beta = (w[:, None, None] for w in weights)
    normalized = (x - mean) * torch.rsqrt(variance + 1e-5)
    return normalized, gamma * normalized + beta, (gamma * normalized).abs() + beta.abs()


def _norm_act_bounds(case, arguments, expected):
    x, weights, statistics, *_ = arguments
    _, _, size = _terms(weights, x, statistics)
    if case.upsample:
        size = size.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {"out": 16 * UNIT * size}


def _gradient_sizes(case, gradient, x, weights, statistics):
    """|d| with the four pixels' sizes added up, and |x'|."""
    normalized, before, size = _terms(weights, x, statistics)
    # No sign depends on rounding, except for exact zeros, which have none.
    assert ((before == 0) | before.isnan() | (before.abs() > 16 * UNIT * size)).all(), f"{case}: choose another seed"
    d = gradient.abs()
    if case.upsample and not case.masked:
        d = 4 * torch.nn.functional.avg_pool2d(d, 2)
    return d, normalized.abs()


def _sums_bounds(case, arguments, expected):
    d, normalized = _gradient_sizes(case, *arguments[:4])
    sums = torch.stack((d.sum((0, 2, 3)), (d * normalized).sum((0, 2, 3))))
    return {"sums": (TREE + 16 * UNIT) * sums, "kept": 8 * UNIT * d}


def _backward_bounds(case, arguments, expected):
    gradient, x, weights, statistics, means, *_ = arguments
    d, normalized = _gradient_sizes(case, gradient, x, weights, statistics)
    scale = weights[0].abs() * torch.rsqrt(statistics[1] + 1e-5)
    mean_d, mean_dx = (m.abs()[:, None, None] for m in means)
    return {"dx": 16 * UNIT * scale[:, None, None] * (d + mean_d + normalized * mean_dx)}


# Reference, arguments and results, and the bounds of the results; None means bit for bit.
_OPS = {
    "conv_bias_act_mask": (conv_bias_act_mask_reference, _conv_bias_act_mask, None),
    "mask_mul": (mask_mul_reference, _mask_mul, None),
    "penalty_reduce": (penalty_reduce_reference, _penalty_reduce, _penalty_bounds),
    "interpolate": (interpolate_reference, _interpolate, None),
    "norm_act_moments": (moments_reference, _norm_act_moments, _moments_bounds),
    "norm_act": (norm_act_reference, _norm_act, _norm_act_bounds),
    "norm_act_sums": (norm_act_sums_reference, _norm_act_sums, _sums_bounds),
    "norm_act_backward": (norm_act_backward_reference, _norm_act_backward, _backward_bounds),
}


def prepare(name, case, device="cpu"):
    """The maker of the case's tensors, the launcher's arguments, and by name the results among them."""
    make = Tensors(case, device)
    return make, *_OPS[name][1](case, make)


def check(name, case, launch, device="cpu", truncates=False):
    """``launch``, in the signature of launcher ``name``, against the reference on ``case``.

    ``truncates``: stores of bfloat16 drop the lower half instead of rounding, as in Triton's interpreter.
    """
    make, arguments, results = prepare(name, case, device)
    before = [a.cpu().clone() if isinstance(a, torch.Tensor) else None for a in arguments]
    launch(*arguments)
    assert all(guarded.untouched() for guarded in make.guarded), f"{name} {case}: wrote outside its tensors"
    for argument, old in zip(arguments, before):
        if old is not None and not any(argument is result for result in results.values()):
            assert torch.equal(_bits(argument.cpu()), _bits(old)), f"{name} {case}: changed an input"
    wanted, slacks = _expected(name, case)
    for key, ours in results.items():
        slack = slacks[key] if slacks else torch.zeros(())
        if truncates and ours.dtype == BF16:
            slack = slack + torch.finfo(BF16).eps * wanted[key].double().abs()
        _compare(f"{name} {case}: {key}", ours.cpu(), wanted[key], slack, rounded=slacks is not None)


def _expected(name, case):
    """The reference's results; in float64 with the error allowed to ours before they are stored, where that is bounded."""
    reference, _, bounds = _OPS[name]
    _, arguments, results = prepare(name, case)
    if bounds is None:
        reference(*arguments)
        return results, None
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    # In place, a result appears twice among the arguments; the last one is the result, and here they are two tensors.
    places = {key: max(i for i, a in enumerate(arguments) if a is result) for key, result in results.items()}
    reference(*wide)
    expected = {key: wide[place] for key, place in places.items()}
    return expected, bounds(case, wide, expected)


def _compare(what, ours, wanted, slack, rounded):
    assert ours.shape == wanted.shape, what
    theirs, stored = wanted.double(), ours.double()
    finite = theirs.isfinite()
    assert torch.equal(stored[~finite].nan_to_num(7), theirs[~finite].nan_to_num(7)), f"{what}: not finite elsewhere"
    slack = slack.expand_as(theirs)[finite]
    if rounded and ours.is_floating_point():
        info = torch.finfo(ours.dtype)
        slack = slack + info.eps / 2 * (theirs[finite].abs() + slack) + info.smallest_normal * info.eps
    error = (stored[finite] - theirs[finite]).abs()
    assert (error <= slack).all(), f"{what}: off by {float((error - slack).max())} more than allowed"


def _bits(tensor):
    """A tensor's bits, for comparisons in which NaN equals NaN."""
    return tensor if not tensor.is_floating_point() else tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
