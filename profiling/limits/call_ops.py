"""Calls of the public ops with random arguments, and how far from the reference in float64 each may be."""

import copy
import fractions
import functools
import math
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
        draws: results are no function of dtype: the oracle is ``same``.
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

    def reference(self, arguments):
        """The reference's result; nothing is written into an argument."""
        kept = {name: value for name, value in arguments.items() if name not in self.written}
        return self.function(**{**kept, "backend": "reference"})


def _backend(draw):
    return draw.choice(("auto", "auto", "cpu", "cpu", "reference", "cuda", "triton") if draw.chance(0.15) else ("auto", "cpu"))


def _slope(draw):
    return draw.choice((0.2, 0.2, 0.01, 0.0, 1.0, -0.5, 1, 3.5))


def _dtype(draw):
    return draw.choice((*DTYPES[:3], torch.float32, torch.float32, torch.float64))


def _out(draw, like, others=()):
    """A tensor that receives a result: new, the input itself, another view of it, or one that does not fit."""
    if draw.chance(0.5):
        return None
    kind = draw.choice(("new", "itself", "view", "shifted", "other", "layout", "overlapping"))
    if kind == "itself":
        return like
    if kind == "view":
        return like[:] if like.ndim else like
    if kind == "shifted" and like.numel() > 2 and like.ndim:
        flat = like.as_strided((like.numel() + 1,), (1,), 0) if _room(like) > like.numel() else None
        return None if flat is None else flat[1:].view(like.shape)
    if kind == "other" and others:
        return draw.choice(others)
    if kind == "layout":
        return draw.laid_out(torch.full(like.shape, math.nan, dtype=like.dtype, device="cpu"))
    if kind == "overlapping":
        return torch.zeros(1, dtype=like.dtype, device="cpu").expand(like.shape)
    layout = memory_format(like)
    return torch.full(like.shape, math.nan, dtype=like.dtype, device="cpu").contiguous(memory_format=layout)


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
    arguments = {"x": x, "mask": mask, "slope": _slope(draw), "out": _out(draw, x), "backend": _backend(draw)}
    return Call("mask_mul", ops.mask_mul, arguments, differentiable=("x",), written=("out",))


def conv_bias_act_mask(draw):
    groups = draw.choice((1, 1, 1, 2))
    n, c, h, w = draw.images()
    c *= groups
    dtype, out = _dtype(draw), groups * draw.randint(1, 4)
    kernel = (draw.randint(1, 3), draw.randint(1, 3))
    arguments = {
        "x": draw.tensor((n, c, h, w), dtype),
        "weight": draw.tensor((out, c // groups, *kernel), dtype),
        "bias": draw.choice((None, draw.tensor((out,), dtype))),
        **_window(draw),
        "groups": groups,
        "slope": _slope(draw),
        "backend": _backend(draw),
    }
    return Call("conv_bias_act_mask", ops.conv_bias_act_mask, arguments, differentiable=("x", "weight", "bias"))


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
        "backend": draw.choice(("cpu", "cpu", _backend(draw))),
    }
    return Call("conv_block", ops.conv_block, arguments, bound=_conv_block_bound, differentiable=("x", "weight", "bias"))


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
    if draw.chance(0.4):
        a = _noise(draw, shape[0])
    arguments = {"real": real, "fake": fake, "a": a, "merge": draw.chance(0.4), "backend": _backend(draw)}
    return Call("interpolate", ops.interpolate, arguments, differentiable=("real", "fake", "a"))


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
    """(seed, sample indices, step), at times with something wrong."""
    steps = torch.randint(0, 2**24, (draw.choice((1, count)),), generator=draw.generator, dtype=torch.int64, device="cpu")
    step = draw.choice((0, 7, 2**24 - 1, draw.laid_out(steps)))
    triple = [_seed(draw), _indices(draw, count), step]
    if draw.chance(0.1):
        triple[draw.randrange(3)] = draw.choice((None, -1, 2**64, 0.5, "1", torch.tensor([2**24]), torch.tensor(1.0)))
    return draw.choice((tuple, list))(triple)


def penalty_reduce(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    g = draw.tensor(shape, dtype)
    arguments = {
        "g": g,
        "target": draw.choice((1.0, 0.0, 10.0, 1)),
        "weight": draw.choice((10.0, 1.0, 0.0, 3)),
        "mode": draw.choice(("two-sided", "one-sided", "r1")),
        "out": _out(draw, g),
        "backend": _backend(draw),
    }
    return Call("penalty_reduce", ops.penalty_reduce, arguments, bound=_penalty_bound, differentiable=("g",), written=("out",))


def _penalty_bound(wide, wanted, same):
    """A norm is off by a few units of itself (its sum of squares has terms of one sign), which reaches the excess whole."""
    g, dtype = wide["g"].reshape(len(wide["g"]), math.prod(wide["g"].shape[1:])), same[1].dtype
    share, target, count = abs(float(wide["weight"])) / max(len(g), 1), float(wide["target"]), 96 * UNIT
    norm = g.norm(dim=1)
    off = count * norm + 4 * UNIT * abs(target)
    penalties = share * (2 * (norm - target).abs() * off + off.square()) + count * wanted[0].abs()
    slack = 2 * share * (off + count * (norm + abs(target))) / norm.where(norm > 0, 1)
    v = slack[:, None] * g.abs() + count * share * g.abs()
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
        "backend": _backend(draw),
    }
    if arguments["training"] and draw.chance(0.4):
        arguments["running_mean"] = arguments["running_var"] = None
    return Call(
        "norm_act",
        ops.norm_act,
        arguments,
        bound=_norm_act_bound,
        order=1,
        differentiable=("x", "gamma", "beta"),
        written=("running_mean", "running_var") if arguments["training"] else (),
    )


def norm_act_reference(arguments):
    """The function and its reference, whose running statistics are copies."""
    kept = {k: v.clone() if k.startswith("running") and isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return ops.norm_act(**{**kept, "backend": "reference"})


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
    out, dtype, window = groups * draw.randint(1, 5), draw.choice((torch.float32,) * 3 + DTYPES), _window(draw)
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    pairs = [v if isinstance(v, tuple) else (v, v) for v in window.values()]
    sides = [(s + 2 * p - q * (k - 1) - 1) // t + 1 for s, k, t, p, q in zip((h, w), kernel, *pairs)]
    arguments = {
        "d": draw.tensor((n, out, *(max(side, 0) for side in sides)), dtype),
        "weight": draw.tensor((out, c, *kernel), dtype),
        "shape": draw.choice((tuple, list, torch.Size))((n, c * groups, h, w)),
        **window,
        "groups": groups,
        "backend": _backend(draw),
    }
    return Call("image_gradient", ops.image_gradient, arguments, bound=_image_gradient_bound, differentiable=("d", "weight"))


def _image_gradient_bound(wide, wanted, same):
    sizes = ops.image_gradient(
        **{**wide, "d": wide["d"].abs(), "weight": wide["weight"].abs(), "backend": "reference"},
    )
    terms = wide["weight"][:, 0].numel() + 4
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
        "critic": copy.deepcopy(critic).to(dtype),
        "x_hat": draw.tensor((n, *image), dtype, finite=draw.chance(0.9)),
        "condition": None if condition is None else draw.tensor((n, *condition), dtype, finite=draw.chance(0.95)),
        "target": draw.choice((1.0, 0.0, 1)),
        "weight": draw.choice((10.0, 0.5)),
        "mode": draw.choice(("two-sided", "one-sided", "r1")),
        "check_finite": draw.choice((None, None, True, False)),
        "backend": _backend(draw),
    }
    return Call(
        "gradient_penalty",
        ops.gradient_penalty,
        arguments,
        oracle=lambda wide: ops.gradient_penalty(**{**wide, "backend": "autograd"}),
        bound=lambda wide, wanted, same: [1e-4 * (wanted[0].abs() + wide["weight"] * 1e-2)],
        order=1,
        differentiable=("critic",),
        # The passes take autocast's dtype.
        options={"autocast": 1000},
    )


def philox_words(draw):
    arguments = {
        "seed": _seed(draw),
        "indices": _indices(draw, draw.choice((0, 1, 2, 5))),
        "count": draw.choice((0, 1, 3, 4, 9, 40)),
        "stream": draw.choice(("x_T", "step", "z", "interpolation", "order")),
        "step": draw.choice((0, 1, 2**24 - 1, 2**24, -1)) if draw.chance(0.1) else draw.randrange(2**24),
        "backend": _backend(draw),
    }
    return Call("philox_words", ops.philox_words, arguments)


def philox_normal(draw):
    call = philox_words(draw)
    del call.arguments["count"]
    shape = draw.choice(((), (0,), (1,), (7,), (3, 5, 7), [2, 2], torch.Size((4,)), (2, 0, 3)))
    bound = lambda wide, wanted, same: [torch.full_like(wanted[0], 2e-6, dtype=torch.float64)]  # noqa: E731
    return Call("philox_normal", ops.philox_normal, {**call.arguments, "shape": shape}, bound=bound)


def philox_uniform(draw):
    call = philox_words(draw)
    del call.arguments["count"]
    return Call("philox_uniform", ops.philox_uniform, call.arguments)


def _coefficients(draw):
    weight = lambda: draw.choice((0.0, 1.0, -0.5, 1.3, 157.0))  # noqa: E731
    names = [name for name in COLUMNS if name != "clip"]
    clip = draw.choice((math.inf, math.inf, 1.0, 0.5, 0.0))
    return ops.StepCoefficients(**{name: weight() for name in names}, clip=clip)


def sampler_step(draw):
    shape, dtype = draw.samples(), _dtype(draw)
    x = draw.kept_layout(draw.values(shape, dtype)) if draw.chance(0.3) else draw.tensor(shape, dtype)
    mixed = dtype != torch.float64 and draw.chance(0.3)
    m = draw.tensor(shape, draw.choice(DTYPES[:3]) if mixed else dtype)
    steps = [_coefficients(draw) for _ in range(max(shape[0], 1))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients = draw.choice((steps[0], steps[0], steps[: shape[0]], ops.coefficient_table(steps[:1], dtype=wide)))
    history = draw.choice((None, draw.tensor(shape, dtype), draw.tensor(shape, dtype)))
    noise = draw.choice((None, draw.tensor(shape, dtype), draw.tensor(shape, dtype), _noise(draw, shape[0])))
    pool = None
    if len(shape) == 4 and draw.chance(0.3):
        divisors = [r for r in range(1, 9) if shape[2] % r == 0 and shape[3] % r == 0]
        pool = draw.choice((*divisors, draw.randint(1, 9)))
    arguments = {
        "x": x,
        "model_output": m,
        "coefficients": coefficients,
        "previous_x0": history,
        "noise": noise,
        "pool": pool,
        "return_x0": draw.chance(0.4),
        "out": _out(draw, x, [m] if history is None else [m, history]),
        "check_finite": draw.chance(0.2),
        "backend": _backend(draw),
    }
    return Call(
        "sampler_step",
        ops.sampler_step,
        arguments,
        bound=_sampler_step_bound,
        differentiable=("x", "model_output", "previous_x0", "noise"),
        written=("out",),
    )


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
    return Call("StepCoefficients", function, arguments, oracle=same, same=same)
