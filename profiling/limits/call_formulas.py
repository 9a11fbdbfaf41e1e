"""Right answers of the ops by their formulas, in the dtype of the arguments: Philox is the only op of the product that runs."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from advkd import ops
from advkd.ops.layout import memory_format


def _arithmetic(x):
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _per_sample(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


def mask_mul(given):
    """The values under a mask, one sample's bits after the other in the order of memory."""
    x, last = given["x"], memory_format(given["x"]) == torch.channels_last
    x = x.permute(0, 2, 3, 1) if last else x
    bits = np.unpackbits(given["mask"].numpy(), axis=1, bitorder="little")[:, : math.prod(x.shape[1:])].astype(bool)
    bits = torch.from_numpy(bits).reshape(x.shape)
    found = torch.where(bits, x, (_arithmetic(x) * float(given["slope"])).to(x.dtype))
    return found.permute(0, 3, 1, 2) if last else found


def interpolate(given):
    """Points between samples; ``a`` of a sample is the upper 24 bits of its first Philox word."""
    real, fake, a = given["real"], given["fake"], given["a"]
    if isinstance(a, (tuple, list)):
        seed, indices, step = a
        a = _words(seed, indices, step) / 2**24
    a = _per_sample(a.to(_arithmetic(real).dtype), real)
    between = (a * _arithmetic(real) + (1 - a) * _arithmetic(fake)).to(real.dtype)
    return torch.cat((real, fake, between)) if given["merge"] else between


def _words(seed, indices, step):
    return (_drawn(ops.philox_words, seed, indices, 1, stream="interpolation", step=step)[:, 0] >> 8).double()


def _drawn(function, seed, indices, what, stream, step):
    """Philox's numbers of samples, each of which may have a step of its own."""
    draw = lambda rows, k: function(seed, rows, what, stream=stream, step=k, backend="reference")  # noqa: E731
    if not isinstance(step, torch.Tensor) or step.numel() == 1:
        return draw(indices, int(step))
    parts = [draw(indices[i : i + 1], int(k)) for i, k in enumerate(step)]
    return torch.cat(parts) if parts else draw(indices, 0)


def conv_block(given):
    x = F.interpolate(given["x"], scale_factor=2, mode="nearest") if given["upsample"] else given["x"]
    x = F.conv2d(x, given["weight"], given["bias"], padding=1)
    if given["activation"] == "leaky_relu":
        return F.leaky_relu(x, float(given["slope"]))
    return x.tanh() if given["activation"] == "tanh" else x


def image_gradient(given):
    """The gradient that autograd has of a convolution."""
    d, weight = given["d"], given["weight"]
    options = {name: _whole(given[name]) for name in ("stride", "padding", "dilation", "groups")}
    with torch.enable_grad():
        x = torch.zeros(tuple(given["shape"]), dtype=d.dtype, device="cpu", requires_grad=True)
        return torch.autograd.grad(F.conv2d(x, weight, **options), x, d)[0]


def _whole(option):
    return tuple(map(int, option)) if isinstance(option, (tuple, list)) else int(option)


def penalty_reduce(given):
    g, weight, target = given["g"], float(given["weight"]), float(given["target"])
    share, norm = weight / max(len(g), 1), g.reshape(len(g), math.prod(g.shape[1:])).square().sum(1).sqrt()
    if given["mode"] == "r1":
        return share / 2 * norm.square(), share * g
    excess = norm - target
    excess = excess.clamp(min=0) if given["mode"] == "one-sided" else excess
    return share * excess.square(), _per_sample(torch.where(norm == 0, 0, 2 * share * excess / norm), g) * g


def norm_act(given):
    x, column = given["x"], lambda values: values[:, None, None]
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"]:
        mean = x.mean((0, 2, 3))
        variance = (x - column(mean)).square().mean((0, 2, 3))
    y = column(given["gamma"] / (variance + float(given["eps"])).sqrt()) * (x - column(mean)) + column(given["beta"])
    y = torch.where(y > 0, y, float(given["slope"]) * y)
    return y.repeat_interleave(2, 2).repeat_interleave(2, 3) if given["upsample"] else y


def sampler_step(given):
    x, m, rows = given["x"], given["model_output"], given["coefficients"]
    if not isinstance(rows, torch.Tensor):
        steps = [rows] if isinstance(rows, ops.StepCoefficients) else rows
        names = ("k_x", "k_m", "clip", "c_0", "c_x", "c_m", "c_h", "c_z")
        names += ("c_g", "s_0", "s_x", "s_m") if any(step.extended for step in steps) else ()
        rows = torch.tensor([[float(getattr(step, name)) for name in names] for step in steps], dtype=x.dtype, device="cpu")
        rows = rows.reshape(-1, len(names))
    columns = [_per_sample(column, x) for column in rows.to(x.dtype).unbind(1)]
    k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z = columns[:8]
    clean = torch.minimum(torch.maximum(k_x * x + k_m * m, -clip), clip)
    stored, state, noise = clean, c_0 * clean + c_x * x + c_m * m, given["noise"]
    if given["previous_x0"] is not None:
        state = state + c_h * given["previous_x0"]
    if columns[8:]:
        c_g, s_0, s_x, s_m = columns[8:]
        stored = s_0 * clean + s_x * x + s_m * m
        if given["history"] is not None:
            state = state + c_g * given["history"]
    if isinstance(noise, (tuple, list)):
        seed, indices, step = noise
        noise = _drawn(ops.philox_normal, seed, indices, x.shape[1:], stream="step", step=step)
    if noise is not None:
        state = state + c_z * noise
    return state, stored if given["return_x0"] else None, _pooled(state, int(given["pool"] or 0))


def _pooled(state, side):
    """Averages of squares of that side; 0: none."""
    if not side:
        return None
    n, c, h, w = state.shape
    return state.reshape(n, c, h // side, side, w // side, side).mean((3, 5))
