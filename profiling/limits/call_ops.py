"""Calls of the public ops with random arguments, and how far from the reference in float64 each may be."""

import fractions
import functools
import math
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from advkd import ops
from advkd.models.critic import Critic, CriticConfig
from advkd.ops.layout import memory_format
from advkd.ops.mask_mul import pack
from advkd.ops.sampler_step import COEFFICIENTS as COLUMNS

from . import call_formulas
from .draw import DTYPES

UNIT = 2.0**-24
"""Half of float32's epsilon: the largest relative error of one rounding."""


@dataclass
class Call:
    """A public function, its arguments, and what tells whether its result is right.

    Attributes:
        name: of the function.
        function: to be called with the arguments by name.
        arguments: by name; None where one is not given.
        oracle: function of the arguments in float64; default: the function with the reference backend.
        same: function of the arguments as they are, whose result is as good as that dtype allows; default: the function with
            the reference backend.
        bound: function ``(wide arguments, wanted, same)`` that gives the error allowed for each result; None: ``same`` bit for
            bit.
        order: of differentiability; None where torch differentiates.
        differentiable: names of the arguments that a gradient may be asked for.
        written: names of the arguments that may be written.
        fits: groups of arguments that must fit each other: a refusal of one may name another of its group.
        check: function ``(results, wide arguments, wanted, same)`` that gives a further fault of the results, or None.
        after: function of the wide arguments that gives ``(wanted, bound)`` of written arguments, by name.
        received: place among the results of each tensor in ``out``.
        spoilt: names of arguments that do not fit on purpose; the others of a call do.
    """

    name: str
    function: Callable
    arguments: dict
    oracle: Callable | None = None
    same: Callable | None = None
    bound: Callable | None = None
    order: int | None = 0
    differentiable: tuple = ()
    written: tuple = ()
    options: dict = field(default_factory=dict)
    fits: tuple = ()
    check: Callable | None = None
    after: Callable | None = None
    received: tuple = ()
    spoilt: list = field(default_factory=list)

    def reference(self, arguments):
        """The reference's result; nothing is written into an argument."""
        kept = {name: value for name, value in arguments.items() if name not in self.written}
        return self.function(**{**kept, "backend": "reference"})

    def spoil(self, name, when=True):
        """Say that an argument need not fit."""
        if when and name not in self.spoilt:
            self.spoilt.append(name)
        return self

    def may_be_named(self, spoilt):
        """The arguments that a refusal of ``spoilt`` may name."""
        return {spoilt, *(name for group in self.fits if spoilt in group for name in group)}


def backend_for(draw, *, cpu=True):
    """A backend that can run, now and then one that cannot; ``cpu``: that one takes the tensors."""
    if draw.chance(0.03):
        return draw.choice(("cuda", "triton"))
    if draw.chance(0.03):
        return draw.choice(("cpu", "reference"))
    return draw.choice(("auto", "cpu") if cpu else ("auto", "auto", "reference"))


def _slope(draw):
    return draw.choice((0.2, 0.2, 0.01, 0.0, 1.0, -0.5, 1, 3.5))


def _dtype(draw):
    return draw.choice((*DTYPES[:3], torch.float32, torch.float32, torch.float64))


def _out(draw, like, others=()):
    """``(tensor that receives a result, whether it fits)``: a new one, the input itself, another view of it, or a bad one."""
    if draw.chance(0.4):
        return None, True
    if draw.chance(0.15):
        return _bad_out(draw, like), False
    kind = draw.choice(("new", "new", "itself", "view", "other"))
    if kind in ("itself", "view") and _writable(like):
        return (like[:] if kind == "view" and like.ndim else like), True
    fitting = [other for other in others if _like(other, like)]
    if kind == "other" and fitting:
        return draw.choice(fitting), True
    return blank(like), True


def blank(like, shape=None):
    """A tensor for a result that is laid out as ops lay theirs out."""
    shape = like.shape if shape is None else shape
    return torch.full(shape, math.nan, dtype=like.dtype, device="cpu").contiguous(memory_format=memory_format(like))


def _bad_out(draw, like):
    kind = draw.choice(("shifted", "layout", "overlapping"))
    if kind == "shifted" and like.numel() > 2 and like.ndim and _room(like) > like.numel():
        return like.as_strided((like.numel() + 1,), (1,), 0)[1:].view(like.shape)
    if kind == "overlapping":
        return torch.zeros(1, dtype=like.dtype, device="cpu").expand(like.shape)
    return draw.laid_out(torch.full(like.shape, math.nan, dtype=like.dtype, device="cpu"))


def _writable(tensor):
    """True if an op that reads a tensor can also write its result there."""
    return tensor.is_contiguous(memory_format=memory_format(tensor)) and not tensor.is_inference() and not tensor.is_neg()


def _like(tensor, other):
    laid_out = tensor.is_contiguous(memory_format=memory_format(other))
    return laid_out and tensor.dtype == other.dtype and _writable(tensor)


def _room(tensor):
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def narrow(dtype):
    """The largest relative error of storing a float32 in a dtype."""
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0


def stored(bound, wanted, dtype):
    """A bound of the arithmetic and that of storage; the least numbers that a dtype has are as far apart as they are."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return bound * (1 + narrow(dtype)) + narrow(dtype) * wanted.abs() + least


def plain_number(value):
    """Numbers of other types, and those that no float32 operation takes as they are, as Python's."""
    if isinstance(value, (fractions.Fraction, np.floating)) or (isinstance(value, int) and abs(value) >= 2**63):
        return float(value)
    return int(value) if isinstance(value, np.integer) else value


def mask_mul(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    x = draw.tensor(shape, dtype)
    count = math.prod(shape[1:])
    bits = torch.rand((shape[0], count), generator=draw.generator, device="cpu") > 0.4
    mask = pack(bits)
    out, fits = _out(draw, x)
    arguments = {"x": x, "mask": mask, "slope": _slope(draw), "out": out, "backend": _elementwise(draw, dtype)}
    call = Call(
        "mask_mul",
        ops.mask_mul,
        arguments,
        same=call_formulas.mask_mul,
        differentiable=("x",),
        written=("out",),
        fits=(("x", "mask", "out", "backend"),),
        received=(0,),
    )
    return _checked_backend(call, dtype).spoil("out", not fits)


def _elementwise(draw, dtype):
    """A backend of an op whose kernels take all dtypes but float64."""
    return backend_for(draw, cpu=dtype != torch.float64)


def _checked_backend(call, dtype, cpu=DTYPES[:3]):
    """``call``, whose backend does not fit where that is ``cpu`` and the dtype none of its kernels'."""
    return call.spoil("backend", call.arguments["backend"] == "cpu" and dtype not in cpu)


def conv_bias_act_mask(draw):
    groups = draw.choice((1, 1, 1, 2))
    n, c, h, w = draw.images()
    c *= groups
    dtype, out = _dtype(draw), groups * draw.randint(1, 4)
    kernel = (draw.randint(1, 3), draw.randint(1, 3))
    window, fits = _fitting_window(draw, (h, w), kernel)
    arguments = {
        "x": draw.tensor((n, c, h, w), dtype),
        "weight": draw.tensor((out, c // groups, *kernel), dtype),
        "bias": draw.choice((None, draw.tensor((out,), dtype))),
        **window,
        "groups": groups,
        "slope": _slope(draw),
        "backend": _elementwise(draw, dtype),
    }
    call = Call(
        "conv_bias_act_mask",
        ops.conv_bias_act_mask,
        arguments,
        differentiable=("x", "weight", "bias"),
        fits=(("x", "weight", "bias", "stride", "padding", "dilation", "groups", "backend"),),
    )
    return _checked_backend(call, dtype).spoil("weight", not fits)


def _fitting_window(draw, size, kernel):
    """A window's options, and whether a kernel fits into an image with them: nearly always."""
    for _ in range(8):
        window = _window(draw)
        sides = _sides(size, kernel, window)
        if min(sides) >= 1 and min(size) >= 1:
            return window, True
    return window, False


def _sides(size, kernel, window):
    pairs = [v if isinstance(v, tuple) else (v, v) for v in window.values()]
    return [(s + 2 * p - q * (k - 1) - 1) // t + 1 for s, k, t, p, q in zip(size, kernel, *pairs)]


def _window(draw):
    pick = lambda *values: draw.choice((draw.choice(values), (draw.choice(values), draw.choice(values))))  # noqa: E731
    return {"stride": pick(1, 1, 2, 3), "padding": pick(0, 1, 1, 2), "dilation": pick(1, 1, 2)}


def conv_block(draw):
    n, c, h, w = draw.images(most=draw.choice((4, 4, 20)))
    dtype, out = _dtype(draw), draw.choice((1, 3, 4, 5, 16, 17))
    arguments = {
        "x": draw.tensor((n, c, h, w), dtype, finite=draw.chance(0.8)),
        "weight": draw.tensor((out, c, 3, 3), dtype, finite=draw.chance(0.95)),
        "bias": draw.tensor((out,), dtype, finite=True),
        "slope": _slope(draw),
        "upsample": draw.chance(0.4),
        "activation": draw.choice(("leaky_relu", "leaky_relu", "tanh", "none")),
        "backend": backend_for(draw, cpu=dtype in DTYPES[:2]),
    }
    call = Call(
        "conv_block",
        ops.conv_block,
        arguments,
        oracle=call_formulas.conv_block,
        bound=_conv_block_bound,
        differentiable=("x", "weight", "bias"),
        fits=(("x", "weight", "bias", "backend"),),
    )
    spoilt = not arguments["weight"].isfinite().all()
    return _checked_backend(call, dtype, DTYPES[:2]).spoil("x", min(h, w) == 0).spoil("weight", spoilt)


def _conv_block_bound(wide, wanted, same):
    """Bound of sums over 9 C terms, whose transforms (F(4x4) at most) sum over a tile of them; NaN where that is spoilt."""
    x, weight, bias, dtype = wide["x"], wide["weight"].abs(), wide["bias"].abs(), same[0].dtype
    finite = x.isfinite()
    largest = torch.where(finite, x, 0).abs().amax((2, 3))
    size = torch.einsum("nc,ocij->no", largest, weight) + bias
    terms = 9 * x.shape[1] + 200
    bound = (terms * UNIT + (2**-7 if dtype == torch.bfloat16 else 4 * narrow(dtype))) * size[:, :, None, None]
    spoilt = ~finite.flatten(1).all(1)[:, None, None, None]
    bound = torch.where(spoilt, math.nan, bound).expand(wanted[0].shape)
    slope = max(1.0, abs(float(wide["slope"])))
    return [stored(slope * bound + 2**-21, wanted[0], dtype)]


def interpolate(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    real, fake = draw.tensor(shape, dtype), draw.tensor(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = draw.laid_out(torch.rand(shape[0], generator=draw.generator, dtype=wide, device="cpu"))
    fits = True
    if draw.chance(0.4):
        a, fits = _noise(draw, shape[0])
    arguments = {"real": real, "fake": fake, "a": a, "merge": draw.chance(0.4), "backend": _elementwise(draw, dtype)}
    group = (("real", "fake", "a", "backend"),)
    inputs, plain = ("real", "fake", "a"), call_formulas.interpolate
    call = Call("interpolate", ops.interpolate, arguments, same=plain, differentiable=inputs, fits=group)
    return _checked_backend(call, dtype).spoil("a", not fits)


def _seed(draw):
    return draw.choice((0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1, draw.getrandbits(64)))


def _indices(draw, count):
    if draw.chance(0.3):
        start = draw.choice((0, 5, 2**40))
        return range(start, start + count)
    low = draw.choice((0, -(2**63), 2**62))
    indices = torch.randint(low, low + 2**40, (count,), generator=draw.generator, dtype=torch.int64, device="cpu")
    return draw.laid_out(indices)


def _noise(draw, count):
    """(seed, sample indices, step), at times with something wrong, and whether it fits."""
    steps = torch.randint(0, 2**24, (draw.choice((1, count)),), generator=draw.generator, dtype=torch.int64, device="cpu")
    step = draw.choice((0, 7, 2**24 - 1, draw.laid_out(steps)))
    triple = [_seed(draw), _indices(draw, count), step]
    fits = not draw.chance(0.05)
    if not fits:
        triple[draw.randrange(3)] = draw.choice((None, -1, 2**64, 0.5, "1", torch.tensor([2**24]), torch.tensor(1.0)))
    return draw.choice((tuple, list))(triple), fits


def penalty_reduce(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    g = draw.tensor(shape, dtype)
    out, fits = _out(draw, g)
    arguments = {
        "g": g,
        "target": draw.choice((1.0, 0.0, 10.0, 1)),
        "weight": draw.choice((10.0, 1.0, 0.0, 3)),
        "mode": draw.choice(("two-sided", "one-sided", "r1")),
        "out": out,
        "backend": _elementwise(draw, dtype),
    }
    call = Call(
        "penalty_reduce",
        ops.penalty_reduce,
        arguments,
        oracle=call_formulas.penalty_reduce,
        bound=_penalty_bound,
        differentiable=("g",),
        written=("out",),
        fits=(("g", "out", "backend"),),
        received=(1,),
    )
    return _checked_backend(call, dtype).spoil("out", not fits)


def _penalty_bound(wide, wanted, same):
    """A norm is off by a few units of itself (its sum of squares has terms of one sign), which reaches the excess whole."""
    g, dtype = wide["g"].reshape(len(wide["g"]), math.prod(wide["g"].shape[1:])), same[1].dtype
    share, target, count = abs(float(wide["weight"])) / max(len(g), 1), float(wide["target"]), 96 * UNIT
    norm = g.norm(dim=1)
    off = count * norm + 4 * UNIT * abs(target)
    penalties = share * (2 * (norm - target).abs() * off + off.square()) + count * wanted[0].abs()
    slack = 2 * share * (off + count * (norm + abs(target))) / norm.where(norm > 0, 1)
    v = slack[:, None] * g.abs() + count * share * g.abs()
    # The squares of such numbers are lost in float32.
    v = torch.where(((norm > 0) & (norm < 2.0**-50))[:, None], math.nan, v)
    least = 2.0**-100 * (1 + abs(target))
    return [stored(penalties + least, wanted[0], same[0].dtype), stored(v.view_as(wanted[1]) + least, wanted[1], dtype)]


def norm_act(draw):
    shape, dtype = draw.images(), _dtype(draw)
    channels = (shape[1],)
    weights = draw.choice((torch.float32, torch.float32, dtype))
    x = draw.tensor(shape, dtype) + 0
    x = draw.laid_out(x + draw.choice((0, 0, 0.5, 4)))
    statistics = [draw.values(channels, finite=True), draw.values(channels, finite=True).square() + 0.1]
    arguments = {
        "x": x,
        "gamma": draw.tensor(channels, weights, finite=True),
        "beta": draw.tensor(channels, weights, finite=True),
        "running_mean": statistics[0],
        "running_var": statistics[1],
        "slope": _slope(draw),
        "upsample": draw.chance(0.4),
        "training": draw.chance(0.6),
        "eps": draw.choice((1e-5, 1e-3)),
        "momentum": draw.choice((0.1, 0.0, 1.0)),
        "backend": _elementwise(draw, dtype),
    }
    if arguments["training"] and draw.chance(0.4):
        arguments["running_mean"] = arguments["running_var"] = None
    call = Call(
        "norm_act",
        ops.norm_act,
        arguments,
        oracle=call_formulas.norm_act,
        bound=_norm_act_bound,
        order=1,
        differentiable=("x", "gamma", "beta"),
        written=("running_mean", "running_var") if arguments["training"] else (),
        fits=(("x", "gamma", "beta", "running_mean", "running_var", "training", "backend"),),
        after=_moved_statistics,
    )
    few = shape[0] * shape[2] * shape[3] < 2
    return _checked_backend(call, dtype).spoil("x", few and arguments["training"])


def norm_act_reference(arguments):
    """The function and its reference, whose running statistics are copies."""
    kept = {k: v.clone() if k.startswith("running") and isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return ops.norm_act(**{**kept, "backend": "reference"})


def _moved_statistics(wide):
    """The running statistics after a call: moved by the batch's mean and unbiased variance in training, else as they were."""
    before = {name: wide[name] for name in ("running_mean", "running_var") if isinstance(wide[name], torch.Tensor)}
    if not wide["training"] or not before:
        return {name: (value, torch.zeros_like(value)) for name, value in before.items()}
    x, share = wide["x"], float(wide["momentum"])
    values = x.transpose(0, 1).flatten(1)
    mean, count = values.mean(1), values.shape[1]
    variance = (values - mean[:, None]).square().sum(1) / (count - 1)
    off = 64 * UNIT * values.abs().amax(1)
    bounds = (off, 64 * UNIT * variance + 2 * off.square())
    moved = {}
    for (name, old), new, bound in zip(before.items(), (mean, variance), bounds, strict=True):
        rounding = 4 * UNIT * (old.abs() + new.abs())
        moved[name] = ((1 - share) * old + share * new, abs(share) * bound + rounding + 2.0**-100)
    return moved


def _norm_act_bound(wide, wanted, same):
    """Bound of subtracted and added terms, times their factor; statistics are off by as much as their terms."""
    x, dtype = wide["x"], same[0].dtype
    if not wide["training"]:
        variance, mean = wide["running_var"], wide["running_mean"]
    else:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    scale = (wide["gamma"].abs() / (variance + wide["eps"]).sqrt())[:, None, None]
    spread = (x - mean[:, None, None]).abs()
    size = x.abs().amax((0, 2, 3))[:, None, None] if x.numel() else 0
    # A mean that is off changes a variance by that squared, and by half of that a value.
    off = 64 * UNIT * size
    inverse = (
        0.5 * (off.square() + 64 * UNIT * variance[:, None, None]) / (variance + wide["eps"])[:, None, None] if x.numel() else 0
    )
    bound = scale * (off + spread * (8 * UNIT + inverse)) + 8 * UNIT * wide["beta"].abs()[:, None, None]
    bound = bound * max(1.0, abs(float(wide["slope"])))
    bound = F.interpolate(bound, scale_factor=2, mode="nearest") if wide["upsample"] and x.numel() else bound
    return [stored(bound.reshape(wanted[0].shape) + 2.0**-100, wanted[0], dtype)]


def image_gradient(draw):
    groups = draw.choice((1, 1, 1, 1, 2))
    n, c, h, w = draw.images(most=5)
    out, dtype = groups * draw.randint(1, 5), draw.choice((torch.float32,) * 3 + DTYPES)
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    window, fits = _fitting_window(draw, (h, w), kernel)
    sides, thin = _sides((h, w), kernel, window), dtype == torch.float32 and groups == 1 and c <= 4
    arguments = {
        "d": draw.tensor((n, out, *(max(side, 0) for side in sides)), dtype),
        "weight": draw.tensor((out, c, *kernel), dtype, finite=draw.chance(0.9)),
        "shape": draw.choice((tuple, list, torch.Size))((n, c * groups, h, w)),
        **window,
        "groups": groups,
        "backend": backend_for(draw, cpu=thin),
    }
    call = Call(
        "image_gradient",
        ops.image_gradient,
        arguments,
        oracle=call_formulas.image_gradient,
        bound=_image_gradient_bound,
        differentiable=("d", "weight"),
        fits=(("d", "weight", "shape", "stride", "padding", "dilation", "groups", "backend"),),
    )
    return call.spoil("backend", arguments["backend"] == "cpu" and not thin).spoil("weight", not fits)


def _image_gradient_bound(wide, wanted, same):
    sizes = ops.image_gradient(
        **{**wide, "d": wide["d"].abs(), "weight": wide["weight"].abs(), "backend": "reference"},
    )
    # Torch multiplies weights with the zeros of a border too.
    plain = wide["weight"].isfinite().all() and (not narrow(same[0].dtype) or wide["d"].isfinite().all())
    terms = wide["weight"][:, 0].numel() + 4 if plain else math.nan
    # In halves torch may round its sums.
    return [(terms * UNIT + terms * narrow(same[0].dtype)) * sizes + narrow(same[0].dtype) * wanted[0].abs() + 2.0**-60]


@functools.cache
def critics():
    """Critics in float64, each with the shape of an image and of a condition."""
    torch.manual_seed(0)
    kept = [(Critic(CriticConfig(8, 1, 4, 8)), (1, 8, 8), None)]
    kept.append((Critic(CriticConfig(8, 2, 4, 8, condition_channels=3)), (2, 8, 8), (3, 4, 4)))
    layers = (nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5 * 2 * 3, 1))
    kept.append((nn.Sequential(*layers), (3, 4, 6), None))
    return [(critic.double(), image, condition) for critic, image, condition in kept]


def gradient_penalty(draw):
    critic, image, condition = draw.choice(critics())
    dtype, n = draw.choice((torch.float32, torch.float32, torch.float64)), draw.randint(1, 4)
    arguments = {
        "critic": deepcopy(critic).to(dtype),
        "x_hat": draw.tensor((n, *image), dtype, finite=draw.chance(0.9)),
        "condition": None if condition is None else draw.tensor((n, *condition), dtype, finite=draw.chance(0.95)),
        "target": draw.choice((1.0, 0.0, 1)),
        "weight": draw.choice((10.0, 0.5)),
        "mode": draw.choice(("two-sided", "one-sided", "r1")),
        "check_finite": draw.choice((None, None, True, False)),
        "backend": _elementwise(draw, dtype),
    }
    call = Call(
        "gradient_penalty",
        ops.gradient_penalty,
        arguments,
        oracle=lambda wide: ops.gradient_penalty(**{**wide, "backend": "autograd"}),
        bound=lambda wide, wanted, same: [1e-4 * (wanted[0].abs() + wide["weight"] * 1e-2)],
        order=1,
        differentiable=("critic",),
        # The passes take autocast's dtype.
        options={"autocast": 1000},
        fits=(("critic", "x_hat", "condition", "check_finite", "backend"),),
    )
    for name in ("x_hat", "condition"):
        call.spoil(name, arguments[name] is not None and not arguments[name].isfinite().all())
    return _checked_backend(call, dtype)


def philox_words(draw):
    step = draw.choice((2**24, -1)) if draw.chance(0.03) else draw.choice((0, 1, 2**24 - 1, draw.randrange(2**24)))
    arguments = {
        "seed": _seed(draw),
        "indices": _indices(draw, draw.choice((0, 1, 2, 5))),
        "count": draw.choice((0, 1, 3, 4, 9, 40)),
        "stream": draw.choice(("x_T", "step", "z", "interpolation", "order")),
        "step": step,
        "backend": backend_for(draw),
    }
    return Call("philox_words", ops.philox_words, arguments).spoil("step", not 0 <= step < 2**24)


def philox_normal(draw):
    call = philox_words(draw)
    del call.arguments["count"]
    shape = draw.choice(((), (0,), (1,), (7,), (3, 5, 7), [2, 2], torch.Size((4,)), (2, 0, 3)))
    bound = lambda wide, wanted, same: [torch.full_like(wanted[0], 2e-6, dtype=torch.float64)]  # noqa: E731
    return Call("philox_normal", ops.philox_normal, {**call.arguments, "shape": shape}, bound=bound, spoilt=call.spoilt)


def philox_uniform(draw):
    call = philox_words(draw)
    del call.arguments["count"]
    return Call("philox_uniform", ops.philox_uniform, call.arguments, spoilt=call.spoilt)


def _coefficients(draw, without=()):
    """A step's coefficients; those of ``without`` are zero."""
    weight = lambda name: 0.0 if name in without else draw.choice((0.0, 1.0, -0.5, 1.3, 157.0))  # noqa: E731
    names = [name for name in COLUMNS if name != "clip"]
    clip = draw.choice((math.inf, math.inf, 1.0, 0.5, 0.0))
    return ops.StepCoefficients(**{name: weight(name) for name in names}, clip=clip)


def sampler_step(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    x = draw.kept_layout(draw.values(shape, dtype)) if draw.chance(0.3) else draw.tensor(shape, dtype)
    mixed = dtype != torch.float64 and draw.chance(0.3)
    m = draw.tensor(shape, draw.choice(DTYPES[:3]) if mixed else dtype)
    history, (noise, noise_fits) = draw.choice((None, draw.tensor(shape, dtype))), _step_noise(draw, shape, dtype)
    coefficients, fits = _step_coefficients(draw, shape[0], dtype, history is None, noise is None)
    pool, pool_fits = _pool(draw, shape)
    out, out_fits = _step_out(draw, x, [m] if history is None else [m, history], pool if pool_fits else None)
    arguments = {
        "x": x,
        "model_output": m,
        "coefficients": coefficients,
        "previous_x0": history,
        "noise": noise,
        "pool": pool,
        "return_x0": draw.chance(0.4),
        "out": out,
        "check_finite": draw.chance(0.2),
        "backend": _elementwise(draw, dtype),
    }
    tensors = ("x", "model_output", "coefficients", "previous_x0", "noise", "pool", "out", "backend")
    call = Call(
        "sampler_step",
        ops.sampler_step,
        arguments,
        oracle=call_formulas.sampler_step,
        bound=_sampler_step_bound,
        differentiable=("x", "model_output", "previous_x0", "noise"),
        written=("out",),
        fits=(tensors, (*tensors[:5], "check_finite")),
        # The average is the last result.
        received=(0, -1),
    )
    _checked_backend(call, dtype).spoil("coefficients", not fits).spoil("noise", not noise_fits)
    given = (x, m, history, noise if isinstance(noise, torch.Tensor) else None)
    infinite = dtype == torch.float16 or not all(t.isfinite().all() for t in given if t is not None)
    call.spoil("check_finite", arguments["check_finite"] and infinite)
    return call.spoil("pool", not pool_fits).spoil("out", not out_fits)


def _step_noise(draw, shape, dtype):
    """A step's noise, and whether it fits."""
    return draw.choice(((None, True), (draw.tensor(shape, dtype), True), _noise(draw, shape[0])))


def _step_coefficients(draw, count, dtype, no_history, no_noise):
    """Coefficients for a batch, and whether the tensors that they need are there."""
    missing = [name for name, none in (("c_h", no_history), ("c_z", no_noise)) if none]
    fits = not missing or not draw.chance(0.05)
    steps = [_coefficients(draw, missing if fits else ()) for _ in range(max(count, 1))]
    table = ops.coefficient_table(steps[:1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return draw.choice((steps[0], steps[0], steps[:count], table)), fits


def _pool(draw, shape):
    """The side of a window, and whether it divides an image's."""
    if len(shape) != 4 or not draw.chance(0.3):
        return None, True
    divisors = [r for r in range(1, 9) if shape[2] % r == 0 and shape[3] % r == 0]
    pool = draw.randint(1, 9) if draw.chance(0.1) else draw.choice(divisors)
    return pool, pool in divisors or shape[2] % pool == 0 and shape[3] % pool == 0


def _step_out(draw, x, others, pool):
    """The argument ``out`` of a step, at times a pair of the state's and its average's tensor, and whether it fits."""
    out, fits = _out(draw, x, others)
    if not pool or draw.chance(0.5):
        return out, fits
    return (out, blank(x, (*x.shape[:2], x.shape[2] // pool, x.shape[3] // pool))), fits


def _sampler_step_bound(wide, wanted, same):
    """A few units of every term; coefficients are rounded, too, and drawn normals are 2e-6 apart."""
    x, m, rows = wide["x"], wide["model_output"], wide["coefficients"]
    if not isinstance(rows, torch.Tensor):
        rows = ops.coefficient_table([rows] if isinstance(rows, ops.StepCoefficients) else rows, dtype=torch.float64)
    k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z = rows.double().reshape(-1, 8, *[1] * (x.ndim - 1)).abs().unbind(1)
    clean = k_x * x.abs() + k_m * m.abs()
    size = c_0 * clean + c_x * x.abs() + c_m * m.abs()
    if wide["previous_x0"] is not None:
        size = size + c_h * wide["previous_x0"].abs()
    drawn = isinstance(wide["noise"], (tuple, list))
    if drawn:
        # The largest normal that 24 bits make is 5.8.
        size = size + (6 + 2e-6 / (16 * UNIT)) * c_z
    elif wide["noise"] is not None:
        size = size + c_z * wide["noise"].abs()
    bounds = [16 * UNIT * size]
    if wide["return_x0"]:
        bounds.append(16 * UNIT * clean)
    if wide["pool"]:
        bounds.append(F.avg_pool2d(16 * UNIT * size, int(wide["pool"])) if size.numel() else size)
    dtype = same[0].dtype
    shaped = (b.expand(w.shape) if b.numel() else w for b, w in zip(bounds, wanted, strict=True))
    return [stored(b + 2.0**-100, w, dtype) for b, w in zip(shaped, wanted, strict=True)]


def coefficient_table(draw):
    steps = [_coefficients(draw) for _ in range(draw.randint(0, 4))]
    arguments = {"steps": draw.choice((list, tuple))(steps), "device": "cpu", "dtype": draw.choice(DTYPES)}
    same = lambda arguments: torch.tensor(  # noqa: E731
        [[getattr(step, name) for name in COLUMNS] for step in arguments["steps"]], dtype=arguments["dtype"]
    ).reshape(-1, 8)
    return Call("coefficient_table", ops.coefficient_table, arguments, oracle=same, same=same)


def step_coefficients(draw):
    names = COLUMNS
    arguments = {name: draw.choice((0.0, 1.0, -2.5, math.inf, 1)) for name in names}
    same = lambda arguments: [float(arguments[name]) for name in names]  # noqa: E731
    function = lambda **given: [float(getattr(ops.StepCoefficients(**given), name)) for name in names]  # noqa: E731
    call = Call("StepCoefficients", function, arguments, oracle=same, same=same)
    return call.spoil("clip", arguments["clip"] < 0)
