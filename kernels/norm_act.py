"""Batch norm, LeakyReLU and up-sampling of a training step; the specification is the references of ``advkd.ops.norm_act``.

A tile is ROWS lines of COLUMNS neighbours in memory. Contiguous: it belongs to one channel, a line is one of that channel's
planes, or a plane's row where pixels are repeated; channels_last: a line is a pixel, its columns are channels. Only lines need
divisions. Moments and sums have two stages, deterministic and without atomics: a program goes through every ``parts``-th tile
of its channels, then a program per channel combines the parts. Moments are combined from tile to tile and from part to part as
by Chan et al. 1983, means and squares around them: no large mean is ever subtracted from a sum of squares.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Elements of a tile; of one whose pixels stand for four; of one that is reduced as soon as it is read.
TILE = 2048
REPEATED_TILE = 1024
MOMENTS_TILE = 4096
# Programs of a first stage (enough to fill a large GPU), and parts that a program of the second stage holds at once.
PROGRAMS, PARTS = 2048, 1024
# Counts that happen to be 1 must not become compile-time constants. Height, width and channels may: they carry the alignment,
# and a height of 1 saves a division.
SCALARS = ["lines", "groups", "items", "column_tiles", "parts"]


@triton.jit
def _tile(
    group, item, lines, height, channels, column_tiles,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Tile ``item`` of a group (a channel, or channels_last a block of them): lines, a mask of existing ones, first column."""
    line = (item // column_tiles).to(INDEX) * ROWS + tl.arange(0, ROWS)
    present = line < lines
    first = (group if LAST else item % column_tiles).to(INDEX) * COLUMNS
    if LAST:
        return line.to(tl.int64), present, first
    else:
        return ((line // height).to(tl.int64) * channels + group) * height + line % height, present, first


@triton.jit
def _place(line, present, first, length, COLUMNS: tl.constexpr):
    """Offsets of a tile whose lines are ``length`` long, and a mask of those that exist."""
    column = first + tl.arange(0, COLUMNS)
    return line[:, None] * length + column[None, :], present[:, None] & (column < length)[None, :]


@triton.jit
def _repeated_pixel(line, width, INDEX: tl.constexpr):
    """The upper left one of the four pixels that stand for pixel ``line``."""
    return 2 * (line + (line.to(INDEX) // width).to(tl.int64) * width)


@triton.jit
def _channels(group, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """A group's channels: one row of them in channels_last, else a number."""
    return (group * COLUMNS + tl.arange(0, COLUMNS))[None, :] if LAST else group


@triton.jit
def _pair(table, channel, channels):
    """Both values of the channels in a (2, channels) table."""
    known = channel < channels
    return tl.load(table + channel, mask=known, other=0.0), tl.load(table + channels + channel, mask=known, other=0.0)


@triton.jit
def _load(tensor, place, inside):
    return tl.load(tensor + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _before(x, weights, statistics, eps, channel, channels, place, inside):
    """The normalised values, those before LeakyReLU, and the channels' gamma / sqrt(var + eps)."""
    mean, variance = _pair(statistics, channel, channels)
    gamma, beta = _pair(weights, channel, channels)
    rstd = tl.rsqrt(variance + eps)
    normalized = (_load(x, place, inside) - mean) * rstd
    return normalized, gamma * normalized + beta, gamma * rstd


@triton.jit
def _incoming(
    gradient, line, present, first, width, channels,
    UPSAMPLE: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to a tile's results, summed over the four pixels where they are repeated."""
    if not UPSAMPLE:
        place, inside = _place(line, present, first, channels if LAST else width, COLUMNS)
        return _load(gradient, place, inside)
    elif LAST:
        pixel = _repeated_pixel(line, width, INDEX)
        above, inside = _place(pixel, present, first, channels, COLUMNS)
        below, _ = _place(pixel + 2 * width, present, first, channels, COLUMNS)
        upper = _load(gradient, above, inside) + _load(gradient, above + channels, inside)
        return upper + (_load(gradient, below, inside) + _load(gradient, below + channels, inside))
    else:
        above, inside = _place(2 * line, present, 2 * first, 2 * width, 2 * COLUMNS)
        pairs = _load(gradient, above, inside) + _load(gradient, above + 2 * width, inside)
        return tl.sum(tl.reshape(pairs, (ROWS, COLUMNS, 2)), axis=2)


@triton.jit
def _total(values, LAST: tl.constexpr):
    return tl.sum(values, axis=0) if LAST else tl.sum(values)


@triton.jit
def _store_part(partial, totals, group, part, parts, channels, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """A part's totals, one per channel, into the (channels, parts) table ``partial``."""
    channel = group * COLUMNS + tl.arange(0, COLUMNS) if LAST else group
    tl.store(partial + channel.to(tl.int64) * parts + part, totals, mask=channel < channels)


@triton.jit(do_not_specialize=SCALARS)
def moments_kernel(
    x, partial, lines, height, width, channels, groups, column_tiles, items, parts,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    count = tl.full((), 0.0, tl.float32)
    mean = tl.zeros((COLUMNS,), tl.float32) if LAST else tl.full((), 0.0, tl.float32)
    squares = mean
    # Not range(): a tensor's range stops the interpreter of Triton 3.6 with NumPy 2.4.
    item = part
    while item < items:
        line, present, first = _tile(group, item, lines, height, channels, column_tiles, LAST, ROWS, COLUMNS, INDEX)
        place, inside = _place(line, present, first, channels if LAST else width, COLUMNS)
        values = _load(x, place, inside)
        # Number of the channel's values in this tile.
        more = tl.minimum(lines - (item // column_tiles).to(INDEX) * ROWS, ROWS).to(tl.float32)
        if not LAST:
            more *= tl.minimum(width - first, COLUMNS).to(tl.float32)
        tile_mean = tl.div_rn(_total(values, LAST), more)
        centred = tl.where(inside, values - tile_mean, 0.0)
        share = more / (count + more)
        delta = tile_mean - mean
        mean += delta * share
        squares += _total(centred * centred, LAST) + delta * delta * (count * share)
        count += more
        item += parts
    table = channels * parts
    _store_part(partial, tl.zeros_like(mean) + count, group, part, parts, channels, LAST, COLUMNS)
    _store_part(partial + table, mean, group, part, parts, channels, LAST, COLUMNS)
    _store_part(partial + 2 * table, squares, group, part, parts, channels, LAST, COLUMNS)


@triton.jit(do_not_specialize=SCALARS)
def moments_end_kernel(partial, statistics, channels, parts, PARTS: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    place = partial + channel * parts + part
    table = channels * parts
    count = tl.load(place, mask=part < parts, other=0.0)
    means = tl.load(place + table, mask=part < parts, other=0.0)
    squares = tl.load(place + 2 * table, mask=part < parts, other=0.0)
    # Differences of the means, not the means, are added up: they are small beside a large mean.
    base = tl.load(partial + table + channel * parts)
    total = tl.sum(count)
    mean = base + tl.sum(count * (means - base)) / total
    deltas = means - mean
    tl.store(statistics + channel, mean)
    tl.store(statistics + channels + channel, tl.sum(squares + count * deltas * deltas) / total)


@triton.jit(do_not_specialize=SCALARS)
def norm_act_kernel(
    x, weights, statistics, out, eps, slope, lines, height, width, channels, groups, column_tiles,
    UPSAMPLE: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    group, item = tl.program_id(0) % groups, tl.program_id(0) // groups
    line, present, first = _tile(group, item, lines, height, channels, column_tiles, LAST, ROWS, COLUMNS, INDEX)
    place, inside = _place(line, present, first, channels if LAST else width, COLUMNS)
    _, before, _ = _before(x, weights, statistics, eps, _channels(group, LAST, COLUMNS), channels, place, inside)
    y = tl.where(before > 0, before, slope * before).to(out.dtype.element_ty)
    if not UPSAMPLE:
        tl.store(out + place, y, mask=inside)
    elif LAST:
        pixel = _repeated_pixel(line, width, INDEX)
        above, _ = _place(pixel, present, first, channels, COLUMNS)
        below, _ = _place(pixel + 2 * width, present, first, channels, COLUMNS)
        tl.store(out + above, y, mask=inside)
        tl.store(out + above + channels, y, mask=inside)
        tl.store(out + below, y, mask=inside)
        tl.store(out + below + channels, y, mask=inside)
    else:
        above, inside = _place(2 * line, present, 2 * first, 2 * width, 2 * COLUMNS)
        pairs = tl.reshape(tl.join(y, y), (ROWS, 2 * COLUMNS))
        tl.store(out + above, pairs, mask=inside)
        tl.store(out + above + 2 * width, pairs, mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def sums_kernel(
    gradient, x, weights, statistics, kept, partial, eps, slope,
    lines, height, width, channels, groups, column_tiles, items, parts,
    UPSAMPLE: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel = _channels(group, LAST, COLUMNS)
    sum_d = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    item = part
    while item < items:
        line, present, first = _tile(group, item, lines, height, channels, column_tiles, LAST, ROWS, COLUMNS, INDEX)
        place, inside = _place(line, present, first, channels if LAST else width, COLUMNS)
        normalized, before, _ = _before(x, weights, statistics, eps, channel, channels, place, inside)
        d = _incoming(gradient, line, present, first, width, channels, UPSAMPLE, LAST, ROWS, COLUMNS, INDEX)
        d = tl.where(before > 0, d, slope * d)
        if kept is not None:
            tl.store(kept + place, d.to(kept.dtype.element_ty), mask=inside)
        sum_d += d
        sum_dx += d * normalized
        item += parts
    _store_part(partial, _total(sum_d, LAST), group, part, parts, channels, LAST, COLUMNS)
    _store_part(partial + channels * parts, _total(sum_dx, LAST), group, part, parts, channels, LAST, COLUMNS)


@triton.jit(do_not_specialize=SCALARS)
def sums_end_kernel(partial, sums, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    tl.store(sums + row, tl.sum(tl.load(partial + row * parts + part, mask=part < parts, other=0.0)))


@triton.jit(do_not_specialize=SCALARS)
def backward_kernel(
    gradient, x, weights, statistics, means, dx, eps, slope, lines, height, width, channels, groups, column_tiles,
    MASKED: tl.constexpr, UPSAMPLE: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    group, item = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel = _channels(group, LAST, COLUMNS)
    line, present, first = _tile(group, item, lines, height, channels, column_tiles, LAST, ROWS, COLUMNS, INDEX)
    place, inside = _place(line, present, first, channels if LAST else width, COLUMNS)
    normalized, before, scale = _before(x, weights, statistics, eps, channel, channels, place, inside)
    d = _incoming(gradient, line, present, first, width, channels, UPSAMPLE, LAST, ROWS, COLUMNS, INDEX)
    if not MASKED:
        d = tl.where(before > 0, d, slope * d)
    mean_d, mean_dx = _pair(means, channel, channels)
    values = scale * (d - mean_d - normalized * mean_dx)
    tl.store(dx + place, values.to(dx.dtype.element_ty), mask=inside)


def norm_act_moments(x: torch.Tensor, statistics: torch.Tensor) -> None:
    """Launcher of ``advkd::norm_act_moments``."""
    lengths, tiles, options = tiling(x, False, MOMENTS_TILE)
    parts = _parts(tiles)
    partial = torch.empty((3, x.shape[1], parts), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        moments_kernel[(tiles["groups"] * parts,)](x, partial, **lengths, **tiles, parts=parts, **options)
        end = {"PARTS": triton.next_power_of_2(parts), "enable_fp_fusion": False}
        moments_end_kernel[(x.shape[1],)](partial, statistics, x.shape[1], parts, **end)


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
    lengths, tiles, options = tiling(x, upsample, REPEATED_TILE if upsample else TILE)
    grid = (tiles["groups"] * tiles.pop("items"),)
    with torch.cuda.device_of(x):
        norm_act_kernel[grid](x, weights, statistics, out, eps, slope, **lengths, **tiles, UPSAMPLE=upsample, **options)


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
    lengths, tiles, options = tiling(x, upsample, REPEATED_TILE if upsample else TILE)
    parts = _parts(tiles)
    partial = torch.empty((2, x.shape[1], parts), dtype=torch.float32, device=x.device)
    tensors = (gradient, x, weights, statistics, kept, partial)
    options |= {"parts": parts, "UPSAMPLE": upsample}
    with torch.cuda.device_of(x):
        sums_kernel[(tiles["groups"] * parts,)](*tensors, eps, slope, **lengths, **tiles, **options)
        sums_end_kernel[(2 * x.shape[1],)](partial, sums, parts, PARTS=triton.next_power_of_2(parts))


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
    upsample = upsample and not masked
    lengths, tiles, options = tiling(x, upsample, REPEATED_TILE if upsample else TILE)
    grid = (tiles["groups"] * tiles.pop("items"),)
    tensors = (gradient, x, weights, statistics, means, dx)
    options |= {"MASKED": masked, "UPSAMPLE": upsample}
    with torch.cuda.device_of(x):
        backward_kernel[grid](*tensors, eps, slope, **lengths, **tiles, **options)


def tiling(x: torch.Tensor, upsample: bool, tile: int) -> tuple[dict[str, int], dict[str, int], dict[str, Any]]:
    """Kernel arguments for ``x`` in tiles of ``tile`` elements: lengths, numbers of tiles, compile-time constants."""
    samples, channels, height, width = x.shape
    last = not x.is_contiguous()
    if last:
        lines, columns = samples * height * width, _channels_of_a_tile(channels)
        groups, column_tiles = triton.cdiv(channels, columns), 1
    else:
        height, width = (height, width) if upsample else (1, height * width)
        lines, columns = samples * height, min(triton.next_power_of_2(width), tile)
        groups, column_tiles = channels, triton.cdiv(width, columns)
    rows = tile // columns
    items = triton.cdiv(lines, rows) * column_tiles
    index = tl.int32 if max(lines + rows, 2 * column_tiles * columns) < 2**31 else tl.int64
    lengths = {"lines": lines, "height": height, "width": width, "channels": channels}
    tiles = {"groups": groups, "column_tiles": column_tiles, "items": items}
    return lengths, tiles, {"LAST": last, "ROWS": rows, "COLUMNS": columns, "INDEX": index, "enable_fp_fusion": False}


def _channels_of_a_tile(channels):
    """Whole pixels up to 64 channels; else whole vectors of all threads, with few idle lanes."""
    if channels <= 64:
        return triton.next_power_of_2(channels)
    return 64 if channels % 64 == 0 or channels % 32 else 32


def _parts(tiles):
    """Number of programs that share a group's tiles."""
    return min(tiles["items"], PARTS, max(1, PROGRAMS // tiles["groups"]))
