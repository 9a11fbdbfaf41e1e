"""The CUDA sources through CuPy: backend ``cuda`` where there is a GPU and no compiled extension.

The launchers have the signatures of the extension's, ``torch.ops.advkd_cuda``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from ..errors import InputError
from .cupy_conv_block import conv_image, conv_layer
from .cupy_conv_pair import conv_pair
from .cupy_modules import SUFFIXES, THREADS, address, clamp, compiled, cover, gap, key, start, struct
from .cupy_student_stem import student_stem
from .cupy_training import (
    conv_bias_act_mask,
    interpolate,
    mask_mul,
    norm_act,
    norm_act_backward,
    norm_act_moments,
    norm_act_sums,
    penalty_reduce,
)

__all__ = [
    "conv_bias_act_mask",
    "conv_image",
    "conv_layer",
    "conv_pair",
    "gap",
    "interpolate",
    "mask_mul",
    "norm_act",
    "norm_act_backward",
    "norm_act_moments",
    "norm_act_sums",
    "penalty_reduce",
    "philox_normal",
    "philox_words",
    "sampler_step",
    "student_stem",
]

LANES = 32
"""Threads of a warp."""

PHILOX = numpy.dtype([("key0", "u4"), ("key1", "u4"), ("stream_step", "u4"), ("count", "i8")], align=True)
"""``PhiloxParameters`` of ``csrc/common/philox.h``."""

_POINTERS = ("x", "m", "table", "previous_x0", "noise", "indices", "steps", "out", "x0", "pooled", "flags")
_FLAT_PLAN = ("inverse_warps", "inverse_channels", "warps", "vectors_each")
_POOL_PLAN = ("column_tiles", "channel_tiles", "tile_channels", "outputs", "lanes", "rows", "strips")
STEP = numpy.dtype(
    [(name, "u8") for name in _POINTERS]
    + [("samples", "i8"), ("length", "i8"), ("channels", "i4"), ("width", "i4"), ("pool", "i4"), ("tiles", "i8")]
    + list(zip(_FLAT_PLAN, ("u8", "u8", "u4", "i4")))
    + [(name, "i4") for name in _POOL_PLAN]
    + [("key0", "u4"), ("key1", "u4"), ("stream_step", "u4"), ("row_stride", "i4"), ("step_stride", "i4"), ("vectors", "i4")],
    align=True,
)
"""``StepParameters`` of ``csrc/cuda/sampler_step.h``."""


def philox_words(indices: torch.Tensor, seed: int, count: int, stream: int, step: int) -> torch.Tensor:
    """Launcher of ``advkd::philox_words``."""
    out = torch.empty((len(indices), count), dtype=torch.int64, device=indices.device)
    return _draw("advkd_philox_words", indices, seed, count, stream, step, out)


def philox_normal(indices: torch.Tensor, seed: int, shape: Sequence[int], stream: int, step: int) -> torch.Tensor:
    """Launcher of ``advkd::philox_normal``."""
    out = torch.empty((len(indices), *shape), dtype=torch.float32, device=indices.device)
    return _draw("advkd_philox_normal", indices, seed, out[:1].numel(), stream, step, out)


def sampler_step(
    x: torch.Tensor,
    m: torch.Tensor,
    table: torch.Tensor,
    previous_x0: torch.Tensor | None,
    noise: torch.Tensor | None,
    indices: torch.Tensor | None,
    seed: int,
    step: int,
    steps: torch.Tensor | None,
    pool: int,
    out: torch.Tensor,
    x0: torch.Tensor | None,
    pooled: torch.Tensor | None,
    flags: torch.Tensor | None,
) -> None:
    """Launcher of ``advkd::sampler_step``."""
    tensors = dict(zip(_POINTERS, (x, m, table, previous_x0, noise, indices, steps, out, x0, pooled, flags)))
    parameters = step_parameters(tensors, seed, step, pool)
    tiles = int(parameters["tiles"])
    if tiles > step_most_tiles(pool):
        raise InputError(f"x is too large for one launch, got shape {tuple(x.shape)}")
    pair = SUFFIXES[x.dtype], SUFFIXES[m.dtype]
    kernel = f"advkd_step_{'pool' if pool else 'flat'}_{'tensor' if indices is None else 'draw'}_{pair[0]}_{pair[1]}"
    # A program per pair of dtypes: all nine take six seconds to compile.
    program = compiled("sampler_step", f"-DADVKD_STEP_DTYPES(EACH)=EACH({pair[0]}, {pair[1]})")
    start(program, kernel, tiles, (parameters,), x.device)


def step_parameters(tensors: Mapping[str, Any], seed: int, step: int, pool: int) -> numpy.ndarray:
    """The kernel's parameters, an array of one :data:`STEP`."""
    x, table, steps = tensors["x"], tensors["table"], tensors["steps"]
    # Memory order serves every layout, but drawn normals and pooled pixels belong to channels.
    split = not x.is_contiguous() and (pool > 0 or tensors["indices"] is not None)
    channels = x.shape[1] if split else 1
    length = x.numel() // (len(x) * channels)
    width = x.shape[-1] if pool else 0
    group = 4 if pool or x.dtype == torch.float32 else 8
    pointers = {name: address(tensor) for name, tensor in tensors.items()}
    aligned = not any(pointers[name] % 16 for name in ("x", "m", "table", "previous_x0", "noise", "out", "x0"))
    vectors = aligned and channels == 1 and (width if pool else length) % group == 0
    draw = tensors["indices"] is not None
    fields = {
        **pointers,
        **dict(samples=len(x), length=length, channels=channels, width=width, pool=pool),
        **step_plan(len(x), length, channels, width, pool, group, vectors, draw),
        **key(seed),
        "stream_step": 1 << 24 | (step if steps is None else 0),
        "row_stride": 8 if len(table) > 1 else 0,
        "step_stride": int(steps is not None and steps.numel() > 1),
        "vectors": vectors,
    }
    return struct(STEP, fields)


def step_plan(
    samples: int, length: int, channels: int, width: int, pool: int, group: int, vectors: bool, draw: bool
) -> dict[str, int]:
    """``step_plan`` of ``csrc/cuda/sampler_step.h``: how many blocks, and what one of them does."""
    if not pool:
        return {**_flat_plan(samples, length, channels, group, vectors, draw), **dict.fromkeys(_POOL_PLAN, 0)}
    all_outputs = width // pool
    tile_channels = clamp(THREADS // cover(pool, group), channels)
    outputs = clamp(THREADS // tile_channels * group // pool, all_outputs)
    if group <= outputs < all_outputs:
        outputs -= outputs % group
    lanes = clamp(cover(outputs * pool, group) * tile_channels, THREADS)
    rows = clamp(THREADS // lanes, pool)
    strips = THREADS // (lanes * rows)
    column_tiles, channel_tiles = cover(all_outputs, outputs), cover(channels, tile_channels)
    tiles = cover(samples * (length // width // pool), strips) * column_tiles * channel_tiles
    plan = (column_tiles, channel_tiles, tile_channels, outputs, lanes, rows, strips)
    return {"tiles": tiles, **dict.fromkeys(_FLAT_PLAN, 0), **dict(zip(_POOL_PLAN, plan))}


def _flat_plan(samples, length, channels, group, vectors, draw):
    vectors_each = (1 + (not draw and length % (2 * LANES * group) == 0)) if vectors else 0
    groups = channels * cover(length, group if vectors else 4)
    warps = cover(groups, 2 * LANES if vectors_each == 2 else LANES)
    tiles = cover(samples * warps, THREADS // LANES)
    plan = (step_inverse(warps), step_inverse(channels), warps & 0xFFFFFFFF, vectors_each)
    return {"tiles": tiles, **dict(zip(_FLAT_PLAN, plan))}


def step_inverse(d: int) -> int:
    """``step_inverse`` of ``csrc/cuda/sampler_step.h``, i: ``n // d == (n + 1) * i >> 64``."""
    return (2**64 - 1) // d


def step_most_tiles(pool: int) -> int:
    """``step_most_tiles`` of ``csrc/cuda/sampler_step.h``: how many blocks one launch may have."""
    return 2**31 - 1 if pool else 2**29 - 1


def _draw(kernel, indices, seed, count, stream, step, out):
    items = len(indices) * cover(count, 4)
    if items:
        fields = {**key(seed), "stream_step": stream << 24 | step, "count": count}
        arguments = (indices.data_ptr(), len(indices), struct(PHILOX, fields), out.data_ptr())
        start(compiled("philox"), kernel, min(cover(items, THREADS), 1 << 20), arguments, indices.device)
    return out
