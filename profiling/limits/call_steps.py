"""Calls of the ops of a sampler's step and of its noise."""

import dataclasses
import math

import torch
import torch.nn.functional as F

from advkd import ops
from advkd.ops.step_coefficients import COEFFICIENTS, EXTENDED_COEFFICIENTS

from . import call_formulas
from .call import (
    UNIT,
    Call,
    backend_for,
    blank,
    checked_backend,
    dtype_for,
    elementwise_backend,
    indices_for,
    noise_for,
    out_for,
    seed_for,
    stored,
)
from .draw import DTYPES


def philox_words(draw):
    step = draw.choice((2**24, -1)) if draw.chance(0.03) else draw.choice((0, 1, 2**24 - 1, draw.randrange(2**24)))
    arguments = {
        "seed": seed_for(draw),
        "indices": indices_for(draw, draw.choice((0, 1, 2, 5))),
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
    """A step's coefficients; those of ``without`` are zero, ``s_0`` among them 1."""
    zero = lambda name: float(name == "s_0")  # noqa: E731
    weight = lambda name: zero(name) if name in without else draw.choice((0.0, 1.0, -0.5, 1.3, 157.0))  # noqa: E731
    names = [name for name in EXTENDED_COEFFICIENTS if name != "clip"]
    clip = draw.choice((math.inf, math.inf, 1.0, 0.5, 0.0))
    return ops.StepCoefficients(**{name: weight(name) for name in names}, clip=clip)


def sampler_step(draw):
    shape, dtype = draw.samples(), dtype_for(draw)
    x = draw.kept_layout(draw.values(shape, dtype)) if draw.chance(0.3) else draw.tensor(shape, dtype)
    mixed = dtype != torch.float64 and draw.chance(0.3)
    m = draw.tensor(shape, draw.choice(DTYPES[:3]) if mixed else dtype)
    history, (noise, noise_fits) = draw.choice((None, draw.tensor(shape, dtype))), _step_noise(draw, shape, dtype)
    extended = draw.chance(0.4)
    second = draw.choice((None, draw.tensor(shape, dtype))) if extended else None
    missing = [name for name, there in (("c_h", history), ("c_g", second), ("c_z", noise)) if there is None]
    coefficients, fits = _step_coefficients(draw, shape[0], dtype, missing, extended)
    pool, pool_fits = _pool(draw, shape)
    out, out_fits = _step_out(draw, x, [m] if history is None else [m, history], pool if pool_fits else None)
    arguments = {
        "x": x,
        "model_output": m,
        "coefficients": coefficients,
        "previous_x0": history,
        "history": second,
        "noise": noise,
        "pool": pool,
        "return_x0": draw.chance(0.4),
        "out": out,
        "check_finite": draw.chance(0.2),
        "backend": elementwise_backend(draw, dtype),
    }
    read = ("x", "model_output", "coefficients", "previous_x0", "history", "noise")
    tensors = (*read, "pool", "out", "backend")
    call = Call(
        "sampler_step",
        ops.sampler_step,
        arguments,
        oracle=call_formulas.sampler_step,
        bound=_sampler_step_bound,
        differentiable=("x", "model_output", "previous_x0", "history", "noise"),
        written=("out",),
        fits=(tensors, (*read, "check_finite")),
        # The average is the last result.
        received=(0, -1),
    )
    checked_backend(call, dtype).spoil("coefficients", not fits).spoil("noise", not noise_fits)
    given = (x, m, history, second, noise if isinstance(noise, torch.Tensor) else None)
    infinite = dtype == torch.float16 or not all(t.isfinite().all() for t in given if t is not None)
    call.spoil("check_finite", arguments["check_finite"] and infinite)
    return call.spoil("pool", not pool_fits).spoil("out", not out_fits)


def _step_noise(draw, shape, dtype):
    """A step's noise, and whether it fits."""
    return draw.choice(((None, True), (draw.tensor(shape, dtype), True), noise_for(draw, shape[0])))


def _step_coefficients(draw, count, dtype, missing, extended):
    """Coefficients for a batch, and whether the tensors that they need are there; ``missing``: weights of those that lack."""
    fits = not missing or not draw.chance(0.05)
    plain = () if extended else EXTENDED_COEFFICIENTS[len(COEFFICIENTS) :]
    steps = [_coefficients(draw, (*plain, *(missing if fits else ()))) for _ in range(max(count, 1))]
    if extended:
        # With all others drawn as those of a plain step a history would be refused.
        steps = [dataclasses.replace(step, s_x=1.3) for step in steps]
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
    out, fits = out_for(draw, x, others)
    if not pool or draw.chance(0.5):
        return out, fits
    return (out, blank(x, (*x.shape[:2], x.shape[2] // pool, x.shape[3] // pool))), fits


def _sampler_step_bound(wide, wanted, same):
    """A few units of every term; coefficients are rounded, too, and drawn normals are 2e-6 apart."""
    x, m, rows = wide["x"], wide["model_output"], wide["coefficients"]
    if not isinstance(rows, torch.Tensor):
        rows = ops.coefficient_table([rows] if isinstance(rows, ops.StepCoefficients) else rows, dtype=torch.float64)
    columns = rows.double().reshape(*rows.shape, *[1] * (x.ndim - 1)).abs().unbind(1)
    (k_x, k_m, _, c_0, c_x, c_m, c_h, c_z), (c_g, s_0, s_x, s_m) = columns[:8], columns[8:] or (0, 1, 0, 0)
    clean = k_x * x.abs() + k_m * m.abs()
    size = c_0 * clean + c_x * x.abs() + c_m * m.abs()
    if wide["previous_x0"] is not None:
        size = size + c_h * wide["previous_x0"].abs()
    if wide["history"] is not None:
        size = size + c_g * wide["history"].abs()
    drawn = isinstance(wide["noise"], (tuple, list))
    if drawn:
        # The largest normal that 24 bits make is 5.8.
        size = size + (6 + 2e-6 / (16 * UNIT)) * c_z
    elif wide["noise"] is not None:
        size = size + c_z * wide["noise"].abs()
    bounds = [16 * UNIT * size]
    if wide["return_x0"]:
        bounds.append(16 * UNIT * (s_0 * clean + s_x * x.abs() + s_m * m.abs()))
    if wide["pool"]:
        bounds.append(F.avg_pool2d(16 * UNIT * size, int(wide["pool"])) if size.numel() else size)
    dtype = same[0].dtype
    shaped = (b.expand(w.shape) if b.numel() else w for b, w in zip(bounds, wanted, strict=True))
    return [stored(b + 2.0**-100, w, dtype) for b, w in zip(shaped, wanted, strict=True)]


def coefficient_table(draw):
    plain = draw.choice(((), EXTENDED_COEFFICIENTS[len(COEFFICIENTS) :]))
    steps = [_coefficients(draw, plain) for _ in range(draw.randint(0, 4))]
    arguments = {"steps": draw.choice((list, tuple))(steps), "device": "cpu", "dtype": draw.choice(DTYPES)}
    names = EXTENDED_COEFFICIENTS if any(step.extended for step in steps) else COEFFICIENTS
    same = lambda arguments: torch.tensor(  # noqa: E731
        [[getattr(step, name) for name in names] for step in arguments["steps"]], dtype=arguments["dtype"]
    ).reshape(-1, len(names))
    return Call("coefficient_table", ops.coefficient_table, arguments, oracle=same, same=same)


def step_coefficients(draw):
    names = EXTENDED_COEFFICIENTS
    arguments = {name: draw.choice((0.0, 1.0, -2.5, math.inf, 1)) for name in names}
    same = lambda arguments: [float(arguments[name]) for name in names]  # noqa: E731
    function = lambda **given: [float(getattr(ops.StepCoefficients(**given), name)) for name in names]  # noqa: E731
    call = Call("StepCoefficients", function, arguments, oracle=same, same=same)
    return call.spoil("clip", arguments["clip"] < 0)
