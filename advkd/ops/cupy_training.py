"""The training ops' CUDA sources through CuPy: the launchers of :mod:`advkd.ops.cupy_kernels` for them."""

from typing import Any

import numpy
import torch

from ..errors import InputError
from .cupy_modules import SUFFIXES, THREADS, address, clamp, compiled, cover, key, start, struct
from .layout import memory_format


def _struct(pointers, *rest):
    fields = [(name, "u8") for name in pointers.split()]
    return numpy.dtype(fields + [(name, kind) for names, kind in rest for name in names.split()], align=True)


MASK_MUL = _struct("x mask out", ("samples length", "i8"), ("slope", "f4"), ("vectors", "i4"))
"""``MaskMulParameters`` of ``csrc/cuda/mask_mul.h``."""

CONV_BIAS_ACT_MASK = _struct(
    "p bias out mask", ("samples length inner channels", "i8"), ("slope", "f4"), ("vectors bias_vectors", "i4")
)
"""``ConvBiasActMaskParameters`` of ``csrc/cuda/conv_bias_act_mask.h``."""

INTERPOLATE = _struct(
    "real fake a indices steps out",
    ("samples length", "i8"),
    ("key0 key1 stream_step", "u4"),
    ("step_stride merge vectors", "i4"),
)
"""``InterpolateParameters`` of ``csrc/cuda/interpolate.h``."""

PENALTY = _struct("g out penalties partials", ("samples length", "i8"), ("target share", "f4"), ("mode parts vectors", "i4"))
"""``PenaltyParameters`` of ``csrc/cuda/penalty_reduce.h``."""

NORM = _struct(
    "x gradient weights statistics means out results partials",
    ("width", "i8"),
    ("samples height columns channels", "i4"),
    ("tiles parts lanes rows sample_step row_step column_step", "i4"),
    ("eps slope", "f4"),
    ("upsample masked group", "i4"),
)
"""``NormParameters`` of ``csrc/cuda/norm_act.h``."""

MOST_SIDE = 2**29
BLOCKS = 1024
MOST_TURNS = 8
"""``kMostNormSide``, ``kNormBlocks`` and ``kMostNormTurns`` there."""


def conv_bias_act_mask(p: torch.Tensor, bias: torch.Tensor | None, slope: float, out: torch.Tensor, mask: torch.Tensor) -> None:
    """Launcher of ``advkd::conv_bias_act_mask``."""
    channels = p.shape[1] if p.ndim > 1 else 1
    inner = 1 if memory_format(p) == torch.channels_last else _length(p) // channels
    fields = {
        **_addresses(p=p, bias=bias, out=out, mask=mask),
        **_samples(p, out),
        **dict(inner=inner, channels=channels, slope=slope),
        "bias_vectors": inner == 1 and channels % 8 == 0 and address(bias) % 16 == 0,
    }
    _start("conv_bias_act_mask", "advkd_conv_bias_act_mask", _blocks(p), struct(CONV_BIAS_ACT_MASK, fields), p)


def mask_mul(x: torch.Tensor, mask: torch.Tensor, slope: float, out: torch.Tensor) -> None:
    """Launcher of ``advkd::mask_mul``."""
    fields = {**_addresses(x=x, mask=mask, out=out), **_samples(x, out), "slope": slope}
    _start("mask_mul", "advkd_mask_mul", _blocks(x), struct(MASK_MUL, fields), x)


def interpolate(
    real: torch.Tensor,
    fake: torch.Tensor,
    a: torch.Tensor | None,
    indices: torch.Tensor | None,
    seed: int,
    step: int,
    steps: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launcher of ``advkd::interpolate``."""
    fields = {
        **_addresses(real=real, fake=fake, a=a, indices=indices, steps=steps, out=out),
        **_samples(real, fake, out),
        **key(seed),
        "stream_step": 3 << 24 | (step if steps is None else 0),
        "step_stride": int(steps is not None and steps.numel() > 1),
        "merge": len(out) != len(real),
    }
    _start("interpolate", "advkd_interpolate", _blocks(real), struct(INTERPOLATE, fields), real)


def penalty_reduce(
    g: torch.Tensor, target: float, weight: float, mode: int, out: torch.Tensor, penalties: torch.Tensor
) -> None:
    """Launcher of ``advkd::penalty_reduce``."""
    parts = penalty_parts(_length(g))
    partials = torch.empty((len(g), parts), dtype=torch.float32, device=g.device)
    fields = {
        **_addresses(g=g, out=out, penalties=penalties, partials=partials),
        **_samples(g, out),
        **dict(target=target, share=weight / len(g), mode=mode, parts=parts),
    }
    for kind in ("sums", "apply"):
        _start("penalty_reduce", f"advkd_penalty_{kind}", len(g) * parts, struct(PENALTY, fields), g)


def penalty_parts(length: int) -> int:
    """``penalty_parts`` of ``csrc/cuda/penalty_reduce.h``: blocks per sample."""
    return min(cover(length, THREADS * 64), THREADS)


def norm_act_moments(x: torch.Tensor, statistics: torch.Tensor) -> None:
    """Launcher of ``advkd::norm_act_moments``."""
    _reduce_norm("moments", statistics, norm_fields(x, reduces=True), x)


def norm_act(
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    out: torch.Tensor,
) -> None:
    """Launcher of ``advkd::norm_act``."""
    fields = norm_fields(x, weights=weights, statistics=statistics, out=out, eps=eps, slope=slope, upsample=upsample)
    _start_norm("act", fields, x)


def norm_act_sums(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    kept: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    """Launcher of ``advkd::norm_act_sums``."""
    tensors = dict(gradient=gradient, weights=weights, statistics=statistics, out=kept)
    fields = norm_fields(x, **tensors, eps=eps, slope=slope, upsample=upsample, reduces=True)
    _reduce_norm("sums", sums, fields, x)


def norm_act_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    means: torch.Tensor,
    eps: float,
    slope: float,
    upsample: bool,
    masked: bool,
    dx: torch.Tensor,
) -> None:
    """Launcher of ``advkd::norm_act_backward``."""
    tensors: dict[str, Any] = dict(gradient=gradient, weights=weights, statistics=statistics, means=means, out=dx)
    fields = norm_fields(x, **tensors, eps=eps, slope=slope, upsample=upsample and not masked)
    _start_norm("backward", {**fields, "masked": masked}, x)


def norm_fields(
    x: torch.Tensor,
    gradient: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    means: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    eps: float = 0.0,
    slope: float = 0.0,
    upsample: bool = False,
    reduces: bool = False,
) -> dict[str, Any]:
    """``norm_parameters`` of ``csrc/cuda/register_training.h``: the struct's fields, but for results and partials."""
    pointers = _addresses(x=x, gradient=gradient, weights=weights, statistics=statistics, means=means, out=out)
    last = memory_format(x) == torch.channels_last
    n, channels, h, w = x.shape
    width = w if last or upsample else h * w
    wide = 16 // x.element_size()
    vectors = not any(pointer % 16 for pointer in pointers.values())
    group = wide if vectors and (channels if last else width) % wide == 0 else 1
    sizes = dict(
        samples=n * h if last else n,
        height=h if upsample and not last else 1,
        columns=w if last else width // group,
        channels=channels,
    )
    if max(sizes.values()) > MOST_SIDE:
        raise InputError(f"x must have at most 2^29 rows, columns and channels, got {tuple(x.shape)}")
    plan = norm_plan(**sizes, group=group, last=last, reduces=reduces)
    options = dict(eps=eps, slope=slope, upsample=upsample, masked=False, group=group)
    return {**pointers, "results": 0, "partials": 0, "width": width, **sizes, **plan, **options}


def norm_plan(samples: int, height: int, columns: int, channels: int, group: int, last: bool, reduces: bool) -> dict[str, int]:
    """``norm_plan`` of ``csrc/cuda/norm_act.h``: how many blocks, and what one of them does."""
    groups = channels // group if last else 1
    lanes = clamp(groups, THREADS)
    rows = THREADS // lanes
    tiles = cover(groups, lanes) if last else channels
    positions = samples * height * columns
    turns = clamp(cover(positions, rows) * tiles // BLOCKS, MOST_SIDE if reduces else MOST_TURNS)
    parts = cover(positions, rows * turns)
    lines, column_step = divmod(parts * rows, columns)
    steps = dict(sample_step=lines // height, row_step=lines % height, column_step=column_step)
    return dict(tiles=tiles, parts=parts, lanes=lanes, rows=rows, **steps)


def _start_norm(kind, fields, x):
    layout = "last" if memory_format(x) == torch.channels_last else "planes"
    _start("norm_act", f"advkd_norm_{kind}_{layout}", fields["tiles"] * fields["parts"], struct(NORM, fields), x)


def _reduce_norm(kind, results, fields, x):
    partials = torch.empty((fields["parts"], 3, x.shape[1]), dtype=torch.float32, device=x.device)
    fields = {**fields, **_addresses(results=results, partials=partials)}
    _start_norm(kind, fields, x)
    start(_program("norm_act", x), f"advkd_norm_finish_{kind}", x.shape[1], (struct(NORM, fields),), x.device)


def _start(name, kernel, blocks, parameters, x):
    start(_program(name, x), f"{kernel}_{SUFFIXES[x.dtype]}", blocks, (parameters,), x.device)


def _program(name, x):
    return compiled(name, f"-DADVKD_DTYPES(EACH)=EACH({SUFFIXES[x.dtype]})")


def _addresses(**tensors):
    return {name: address(tensor) for name, tensor in tensors.items()}


def _samples(x, *others):
    """Sizes, and whether vectors of 16 bytes are aligned in every sample of these tensors."""
    length = _length(x)
    aligned = not any(address(tensor) % 16 for tensor in (x, *others))
    return dict(samples=len(x), length=length, vectors=aligned and length * x.element_size() % 16 == 0)


def _length(x):
    return x.numel() // len(x)


def _blocks(x):
    """Grid of a thread per eight elements of a sample."""
    return cover(len(x) * cover(_length(x), 8), THREADS)
