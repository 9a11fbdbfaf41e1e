"""One step of a diffusion sampler in Triton; the specification is ``advkd.ops.sampler_step.sampler_step_reference``.

Flat kernel: a program takes 4 * BLOCK elements of one sample, in memory order, or in logical (C, H, W) order where it draws the
noise: BLOCK Philox calls then give four neighbouring normals each, joined so that a thread holds what it stores in one vector.
Pool kernel: a program takes the POOL rows above OUTPUTS pooled elements of one channel, ROWS at a time; its columns are one run
of memory where POOL is a power of two, else every output's columns are padded to one.
Tensors that are not there are None: a variant is compiled without them. EXTENDED steps, whose rows have four more columns, have
a second history and another stored output than x0. Nothing is contracted to FMA, as in the reference.
"""

import torch
import triton
import triton.language as tl

from ..runtime.sources import STREAMS
from .philox import box_muller, draw

BLOCK = 256
# A seed or a step that happens to be 1 must not become a compile-time constant. The sizes may: they carry the alignment.
SCALARS = ["key", "stream_step", "row_stride", "step_stride"]


@triton.jit
def _four_normals(indices, steps, step_stride, sample, block, key, stream_step):
    """Normals of Philox blocks ``block``: two more dimensions, [..., i, j] is a block's normal number 2 i + j."""
    if steps is not None:
        stream_step = stream_step | tl.load(steps + sample * step_stride)
    w0, w1, w2, w3 = draw(indices, sample, block, key, stream_step)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def _one_normal(indices, steps, step_stride, sample, element, key, stream_step):
    """The normals of single elements: a Philox call each, for tiles that split blocks."""
    if steps is not None:
        stream_step = stream_step | tl.load(steps + sample * step_stride)
    w0, w1, w2, w3 = draw(indices, sample, element // 4, key, stream_step)
    later = element % 4 >= 2
    even, odd = box_muller(tl.where(later, w2, w0), tl.where(later, w3, w1))
    return tl.where(element % 2 == 0, even, odd)


@triton.jit
def _step(x, m, previous_x0, history, noise, normals, row, place, mask, EXTENDED: tl.constexpr):
    """The stored output and the next state, float32, under the coefficients at ``row``."""
    state = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    output = tl.load(m + place, mask=mask, other=0.0).to(tl.float32)
    clip = tl.load(row + 2)
    clean = tl.load(row) * state + tl.load(row + 1) * output
    # Comparisons rather than min and max: NaN must survive.
    clean = tl.where(clean < -clip, -clip, clean)
    clean = tl.where(clean > clip, clip, clean)
    x_next = tl.load(row + 3) * clean + tl.load(row + 4) * state + tl.load(row + 5) * output
    if previous_x0 is not None:
        x_next += tl.load(row + 6) * tl.load(previous_x0 + place, mask=mask, other=0.0).to(tl.float32)
    if history is not None:
        x_next += tl.load(row + 8) * tl.load(history + place, mask=mask, other=0.0).to(tl.float32)
    if noise is not None:
        x_next += tl.load(row + 7) * tl.load(noise + place, mask=mask, other=0.0).to(tl.float32)
    if normals is not None:
        x_next += tl.load(row + 7) * normals
    kept = clean
    if EXTENDED:
        kept = tl.load(row + 9) * clean + tl.load(row + 10) * state + tl.load(row + 11) * output
    return kept, x_next


@triton.jit
def _store(out, x0, flags, sample, place, mask, kept, x_next):
    stored = x_next.to(out.dtype.element_ty)
    tl.store(out + place, stored, mask=mask)
    if x0 is not None:
        tl.store(x0 + place, kept.to(x0.dtype.element_ty), mask=mask)
    if flags is not None:
        finite = tl.abs(stored.to(tl.float32)) < float("inf")
        # Every offender writes the same 1; there are none in a good step.
        tl.store(flags + sample + tl.zeros_like(place), 1, mask=mask & (finite == 0))


@triton.jit(do_not_specialize=SCALARS)
def flat_kernel(
    x, m, table, previous_x0, history, noise, indices, steps, out, x0, flags,
    key, stream_step, row_stride, step_stride, count, plane, tiles,
    CHANNELS_LAST: tl.constexpr, EXTENDED: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    block = (program % tiles).to(INDEX) * BLOCK
    element = 4 * block + tl.arange(0, 4 * BLOCK)
    mask = element < count
    normals = None
    if indices is not None:
        four = _four_normals(indices, steps, step_stride, sample, block + tl.arange(0, BLOCK), key, stream_step)
        normals = tl.reshape(four, (4 * BLOCK,))
    place = element
    if CHANNELS_LAST:
        place = element % plane * (count // plane) + element // plane
    place = sample * count + place
    row = table + sample * row_stride
    kept, x_next = _step(x, m, previous_x0, history, noise, normals, row, place, mask, EXTENDED)
    _store(out, x0, flags, sample, place, mask, kept, x_next)


@triton.jit(do_not_specialize=SCALARS)
def pool_kernel(
    x, m, table, previous_x0, history, noise, indices, steps, out, x0, pooled, flags,
    key, stream_step, row_stride, step_stride, channels, height, width, tiles,
    POOL: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, EXTENDED: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    lines = height // POOL
    line, plane = strip % lines, strip // lines
    sample, channel = plane // channels, plane % channels
    j = tl.arange(0, OUTPUTS * COLUMNS)
    if COLUMNS == POOL:
        column = tile * (OUTPUTS * POOL) + j
    else:
        column = (tile * OUTPUTS + j // COLUMNS) * POOL + j % COLUMNS
    inside = (j % COLUMNS < POOL) & (column < width)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for first in range(0, POOL, ROWS):
        i = first + tl.arange(0, ROWS)
        row = line * POOL + i
        mask = (i < POOL)[:, None] & inside[None, :]
        start = (channel * height + row)[:, None] * width
        normals = None
        if indices is not None:
            if WHOLE_BLOCKS:
                block = (start + tile * (OUTPUTS * POOL)) // 4 + tl.arange(0, OUTPUTS * COLUMNS // 4)[None, :]
                four = _four_normals(indices, steps, step_stride, sample, block, key, stream_step)
                normals = tl.reshape(four, (ROWS, OUTPUTS * COLUMNS))
            else:
                element = start + column[None, :]
                normals = _one_normal(indices, steps, step_stride, sample, element, key, stream_step)
        if CHANNELS_LAST:
            place = (row[:, None] * width + column[None, :]) * channels + channel
        else:
            place = start + column[None, :]
        place += sample * channels * height * width
        coefficients = table + sample * row_stride
        kept, x_next = _step(x, m, previous_x0, history, noise, normals, coefficients, place, mask, EXTENDED)
        _store(out, x0, flags, sample, place, mask, kept, x_next)
        x_next = tl.reshape(tl.where(mask, x_next, 0.0), (ROWS, OUTPUTS, COLUMNS))
        total += tl.sum(tl.sum(x_next, axis=2), axis=0)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    if CHANNELS_LAST:
        place = ((sample * lines + line) * (width // POOL) + output) * channels + channel
    else:
        place = (plane * lines + line) * (width // POOL) + output
    mean = tl.div_rn(total, tl.full((OUTPUTS,), POOL * POOL, tl.float32))
    tl.store(pooled + place, mean.to(pooled.dtype.element_ty), mask=output < width // POOL)


def sampler_step(
    x: torch.Tensor,
    m: torch.Tensor,
    table: torch.Tensor,
    previous_x0: torch.Tensor | None,
    history: torch.Tensor | None,
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
    channels_last = not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in (m, previous_x0, history, noise, out, x0):
        if tensor is not None and not tensor.is_contiguous(memory_format=layout):
            raise ValueError(f"tensors must be laid out like x ({layout}), got strides {tensor.stride()}")
    extended = table.shape[1] > 8
    if history is not None and not extended:
        raise ValueError("history needs a table of 12 columns")
    strides = (table.shape[1] if len(table) > 1 else 0, int(steps is not None and steps.numel() > 1))
    scalars = (seed, STREAMS["step"] << 24 | (step if steps is None else 0), *strides)
    with torch.cuda.device_of(x):
        if pool:
            tensors = (x, m, table, previous_x0, history, noise, indices, steps, out, x0, pooled, flags)
            _launch_pool(x, tensors, scalars, pool, channels_last, extended)
        else:
            tensors = (x, m, table, previous_x0, history, noise, indices, steps, out, x0, flags)
            _launch_flat(x, tensors, scalars, channels_last and indices is not None, extended)


def _launch_flat(x, tensors, scalars, logical, extended):
    count = x.numel() // len(x)
    # Memory order serves every layout, but drawn normals belong to logical elements.
    plane = x.shape[2] * x.shape[3] if logical else count
    tiles = triton.cdiv(count, 4 * BLOCK)
    index = tl.int32 if tiles * 4 * BLOCK < 2**31 else tl.int64
    options = {"CHANNELS_LAST": logical, "EXTENDED": extended, "INDEX": index, "BLOCK": BLOCK, "enable_fp_fusion": False}
    flat_kernel[(len(x) * tiles,)](*tensors, *scalars, count, plane, tiles, **options)


def _launch_pool(x, tensors, scalars, pool, channels_last, extended):
    samples, channels, height, width = x.shape
    shape = pool_tile(width, pool)
    tiles = triton.cdiv(width // pool, shape["OUTPUTS"])
    # At least four elements a thread. With less than one, threads would load copies of what others overwrite in place.
    warps = max(1, min(4, shape["ROWS"] * shape["OUTPUTS"] * shape["COLUMNS"] // 128))
    layout = {"POOL": pool, **shape, "CHANNELS_LAST": channels_last, "EXTENDED": extended}
    grid = (samples * channels * (height // pool) * tiles,)
    pool_kernel[grid](*tensors, *scalars, channels, height, width, tiles, **layout, num_warps=warps, enable_fp_fusion=False)


def pool_tile(width: int, pool: int) -> dict[str, int | bool]:
    """Rows, outputs and (padded) columns per output of one pass of the pool kernel: about 4 * BLOCK elements."""
    columns = triton.next_power_of_2(pool)
    rows = min(columns, max(1, 4 * BLOCK // columns))
    outputs = min(triton.next_power_of_2(width // pool), max(1, 4 * BLOCK // (rows * columns)))
    whole = columns == pool and width % 4 == 0 and outputs * columns % 4 == 0
    return {"ROWS": rows, "OUTPUTS": outputs, "COLUMNS": columns, "WHOLE_BLOCKS": whole}
