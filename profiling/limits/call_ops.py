"""Calls of the public ops with random arguments, and how far from the reference in float64 each may be."""

import functools
import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from advkd import ops
from advkd.models.critic import Critic, CriticConfig
from advkd.ops.mask_mul import pack

from . import call_formulas
from .call import (
    UNIT,
    Call,
    backend_for,
    checked_backend,
    dtype_for,
    elementwise_backend,
    narrow,
    noise_for,
    out_for,
    slope_for,
    stored,
)
from .draw import DTYPES


def mask_mul(draw):
    shape, dtype = draw.samples(), dtype_for(draw)
    x = draw.tensor(shape, dtype)
    count = math.prod(shape[1:])
    bits = torch.rand((shape[0], count), generator=draw.generator, device="cpu") > 0.4
    mask = pack(bits)
    out, fits = out_for(draw, x)
    arguments = {"x": x, "mask": mask, "slope": slope_for(draw), "out": out, "backend": elementwise_backend(draw, dtype)}
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
    return checked_backend(call, dtype).spoil("out", not fits)


def conv_bias_act_mask(draw):
    groups = draw.choice((1, 1, 1, 2))
    n, c, h, w = draw.images()
    c *= groups
    dtype, out = dtype_for(draw), groups * draw.randint(1, 4)
    kernel = (draw.randint(1, 3), draw.randint(1, 3))
    window, fits = _fitting_window(draw, (h, w), kernel)
    arguments = {
        "x": draw.tensor((n, c, h, w), dtype),
        "weight": draw.tensor((out, c // groups, *kernel), dtype),
        "bias": draw.choice((None, draw.tensor((out,), dtype))),
        **window,
        "groups": groups,
        "slope": slope_for(draw),
        "backend": elementwise_backend(draw, dtype),
    }
    call = Call(
        "conv_bias_act_mask",
        ops.conv_bias_act_mask,
        arguments,
        differentiable=("x", "weight", "bias"),
        fits=(("x", "weight", "bias", "stride", "padding", "dilation", "groups", "backend"),),
    )
    return checked_backend(call, dtype).spoil("weight", not fits)


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
    dtype, out = dtype_for(draw), draw.choice((1, 3, 4, 5, 16, 17))
    arguments = {
        "x": draw.tensor((n, c, h, w), dtype, finite=draw.chance(0.8)),
        "weight": draw.tensor((out, c, 3, 3), dtype, finite=draw.chance(0.95)),
        "bias": draw.tensor((out,), dtype, finite=True),
        "slope": slope_for(draw),
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
    return checked_backend(call, dtype, DTYPES[:2]).spoil("x", min(h, w) == 0).spoil("weight", spoilt)


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
    shape, dtype = draw.samples(), dtype_for(draw)
    real, fake = draw.tensor(shape, dtype), draw.tensor(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = draw.laid_out(torch.rand(shape[0], generator=draw.generator, dtype=wide, device="cpu"))
    fits = True
    if draw.chance(0.4):
        a, fits = noise_for(draw, shape[0])
    arguments = {"real": real, "fake": fake, "a": a, "merge": draw.chance(0.4), "backend": elementwise_backend(draw, dtype)}
    group = (("real", "fake", "a", "backend"),)
    inputs, plain = ("real", "fake", "a"), call_formulas.interpolate
    call = Call("interpolate", ops.interpolate, arguments, same=plain, differentiable=inputs, fits=group)
    return checked_backend(call, dtype).spoil("a", not fits)


def penalty_reduce(draw):
    shape, dtype = draw.samples(), dtype_for(draw)
    g = draw.tensor(shape, dtype)
    out, fits = out_for(draw, g)
    arguments = {
        "g": g,
        "target": draw.choice((1.0, 0.0, 10.0, 1)),
        "weight": draw.choice((10.0, 1.0, 0.0, 3)),
        "mode": draw.choice(("two-sided", "one-sided", "r1")),
        "out": out,
        "backend": elementwise_backend(draw, dtype),
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
    return checked_backend(call, dtype).spoil("out", not fits)


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
    shape, dtype = draw.images(), dtype_for(draw)
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
        "slope": slope_for(draw),
        "upsample": draw.chance(0.4),
        "training": draw.chance(0.6),
        "eps": draw.choice((1e-5, 1e-3)),
        "momentum": draw.choice((0.1, 0.0, 1.0)),
        "backend": elementwise_backend(draw, dtype),
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
    return checked_backend(call, dtype).spoil("x", few and arguments["training"])


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
        "backend": elementwise_backend(draw, dtype),
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
    return checked_backend(call, dtype)
