"""The student's convolutions in Triton; the specification is ``advkd.ops.conv_block.conv_block_reference``.

A tile is a run of pixels of (N, H, W), in the order of memory, by a block of output channels: offsets up to it are 64-bit
scalars, those within it constants. Taps are nested loops around blocks of input channels: one flattened loop has been
miscompiled at 8 warps. Up-sampling is four such convolutions of 2x2 taps, the output's phases. All columns and phases of a
tile of pixels run one after the other: they read it from L2, where any layer's weights fit, too, and fill its lines together.
The image's few channels are computed in 2-D tiles of pixels, whose nine taps come from L1.

The descriptor variant reads boxes (1, ROWS, COLUMNS, BLOCK_K) at (n, h + i - 1, w + j - 1, k) through tensor descriptors: the
copies fill a border of zeros, so that one loop over taps and channels needs neither masks nor pointers, and its pipeline never
drains. Tensor cores read both factors in shared memory where the product has channels as rows (64 of them at least) and pixels
as columns: the other way round, boxes of several rows of pixels would pass through registers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .conv_tiles import Config, DescriptorConfig, ImageConfig, ceil

# Counts that happen to be 1 must not become compile-time constants.
SCALARS = ["images", "height", "width", "tiles_down", "tiles_across"]


@triton.jit
def _activate(y, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tl.where(y > 0, y, slope * y)
    if ACTIVATION == 2:
        size = tl.abs(y)
        decay = tl.exp(-2.0 * size)
        large = (1.0 - decay) / (1.0 + decay)
        # Where 1 - decay cancels, the series: the next term is 2^-26 of the value.
        square = y * y
        series = square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        y = tl.where(size < 0.25, y + y * series, tl.where(y < 0, -large, large))
    return y


@triton.jit
def _neighbours(inside, row, column, height, width, TAPS: tl.constexpr):
    """A bit mask of each pixel's taps that lie in the image; tap (0, 0) reads (row, column)."""
    bits = tl.zeros_like(row)
    for i in tl.static_range(TAPS):
        for j in tl.static_range(TAPS):
            vertical = (row + i >= 0) & (row + i < height)
            horizontal = (column + j >= 0) & (column + j < width)
            bits |= (inside & vertical & horizontal).to(tl.int32) << (TAPS * i + j)
    return bits


@triton.jit
def _below(index, count: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of a block's indices below ``count``; a constant where ``count`` is whole blocks, so that masked loads vanish."""
    if count % BLOCK == 0:
        return tl.full((BLOCK,), True, tl.int1)
    else:
        return index < count


@triton.jit
def _step(
    x, weights, x_place, w_place, there, known, inner, k, sums,
    C_IN: tl.constexpr, IN_STEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums plus a tap's products over input channels ``k + inner``."""
    some = _below(k + inner, C_IN, BLOCK_K)
    a = tl.load(x + k + x_place, mask=there[:, None] & some[None, :], other=0.0)
    b = tl.load(weights + k * IN_STEP + w_place, mask=some[:, None] & known[None, :], other=0.0)
    if UPCAST:
        # Triton's interpreter multiplies bfloat16 wrongly.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=SCALARS)
def conv_kernel(
    x, weights, bias, out, slope, images, height, width, pitch,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, IN_STEP: tl.constexpr, OUT_STEP: tl.constexpr,
    UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = 2 if UPSAMPLE else 3
    PHASES: tl.constexpr = 4 if UPSAMPLE else 1
    BLOCKS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    phase = program // BLOCKS % PHASES
    below, right = phase // 2, phase % 2
    channel = program % BLOCKS * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    known = _below(channel + column, C_OUT, BLOCK_N)

    first = (program // (BLOCKS * PHASES)).to(tl.int64) * BLOCK_M
    line = first // width
    pixel = tl.arange(0, BLOCK_M)
    inside = pixel < tl.cast(images, tl.int64) * height * width - first
    w = (first - line * width).to(tl.int32) + pixel
    lines = w // width
    w -= lines * width
    h = ((line % height).to(tl.int32) + lines) % height
    neighbours = _neighbours(inside, h + below - 1, w + right - 1, height, width, TAPS)

    inner = tl.arange(0, BLOCK_K)
    x_place = pixel[:, None] * C_IN + inner[None, :]
    w_place = inner[:, None] * IN_STEP + column[None, :] * OUT_STEP
    x += (first + (below - 1) * width + (right - 1)) * C_IN
    weights += phase * (TAPS * TAPS * C_IN * C_OUT) + channel * OUT_STEP
    # The bias comes first: at the end it would take registers beside the sums.
    offset = tl.load(bias + channel + column, mask=known, other=0.0)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + offset[None, :]
    for i in range(TAPS):
        for j in range(TAPS):
            there = (neighbours >> (TAPS * i + j)) & 1 != 0
            x_tap = x + (i * width + j).to(tl.int64) * C_IN
            w_tap = weights + (TAPS * i + j) * (C_IN * C_OUT)
            for k in range(0, C_IN, BLOCK_K):
                sums = _step(
                    x_tap, w_tap, x_place, w_place, there, known, inner, k, sums,
                    C_IN, IN_STEP, PRECISION, UPCAST, BLOCK_K,
                )  # fmt: skip

    place = pixel
    if UPSAMPLE:
        # Pixel (h, w) of line l of all images becomes (2 h + below, 2 w + right), lines twice as long.
        first = 2 * (first + (line + below) * width) + right
        place = 2 * (pixel + lines * width)
    out += first * pitch + channel
    y = _activate(sums, slope, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * pitch + column[None, :], y, mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=SCALARS)
def descriptor_kernel(
    x, weights, bias, out, slope, height, width, tiles_down, tiles_across, pitch,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = 2 if UPSAMPLE else 3
    SCALE: tl.constexpr = 2 if UPSAMPLE else 1
    BLOCKS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    PIXELS: tl.constexpr = ROWS * COLUMNS
    # Tensor cores take 64 rows or more.
    CHANNELS_FIRST: tl.constexpr = BLOCK_N >= 64
    program = tl.program_id(0)
    phase = program // BLOCKS % (SCALE * SCALE)
    below, right = phase // 2, phase % 2
    channel = program % BLOCKS * BLOCK_N
    tile = program // (BLOCKS * SCALE * SCALE)
    image = tile // (tiles_down * tiles_across)
    top = tile // tiles_across % tiles_down * ROWS
    left = tile % tiles_across * COLUMNS

    column = tl.arange(0, BLOCK_N)
    known = _below(channel + column, C_OUT, BLOCK_N)
    # The bias comes first: at the end it would take registers beside the sums.
    offset = tl.load(bias + channel + column, mask=known, other=0.0)
    if CHANNELS_FIRST:
        sums = tl.zeros((BLOCK_N, PIXELS), tl.float32) + offset[:, None]
    else:
        sums = tl.zeros((PIXELS, BLOCK_N), tl.float32) + offset[None, :]
    for step in range(TAPS * TAPS * STEPS):
        tap = step // STEPS
        k = step % STEPS * BLOCK_K
        a = x.load([image, top + below - 1 + tap // TAPS, left + right - 1 + tap % TAPS, k]).reshape(PIXELS, BLOCK_K)
        b = weights.load([phase * (TAPS * TAPS) + tap, k, channel]).reshape(BLOCK_K, BLOCK_N)
        if UPCAST:
            # Triton's interpreter multiplies bfloat16 wrongly.
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(tl.trans(b), tl.trans(a), sums) if CHANNELS_FIRST else tl.dot(a, b, sums)

    y = _activate(sums, slope, ACTIVATION).to(out.dtype.element_ty)
    if CHANNELS_FIRST:
        y = tl.trans(y)
    pixel = tl.arange(0, PIXELS)
    row, place = pixel // COLUMNS, pixel % COLUMNS
    inside = (top + row < height) & (left + place < width)
    # Pixel (h, w) becomes (2 h + below, 2 w + right) where there are phases, lines twice as long.
    line = (tl.cast(image, tl.int64) * height + top) * SCALE + below
    out += ((line * width + left) * SCALE + right) * pitch + channel
    place = (row * (SCALE * width) + place) * SCALE
    tl.store(out + place[:, None] * pitch + column[None, :], y, mask=inside[:, None] & known[None, :])


@triton.jit(do_not_specialize=SCALARS)
def image_kernel(
    x, weights, bias, out, slope, height, width, tiles_down, tiles_across,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, CHANNELS: tl.constexpr, IN_STEP: tl.constexpr, OUT_STEP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // (tiles_down * tiles_across)).to(tl.int64)
    top = program // tiles_across % tiles_down * ROWS
    left = program % tiles_across * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // COLUMNS, pixel % COLUMNS
    h, w = top + row, left + column
    inside = (h < height) & (w < width)
    neighbours = _neighbours(inside, h - 1, w - 1, height, width, 3)
    place = row * width + column

    channel, inner = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    known = channel < CHANNELS
    x_place = place[:, None] * C_IN + inner[None, :]
    w_place = inner[:, None] * IN_STEP + channel[None, :] * OUT_STEP
    x += (((image * height + top - 1) * width) + left - 1) * C_IN
    offset = tl.load(bias + channel, mask=known, other=0.0)
    sums = tl.zeros((ROWS * COLUMNS, BLOCK_N), tl.float32) + offset[None, :]
    # Taps within a block of channels: what one tap has read is still in L1 for the next.
    for k in range(0, C_IN, BLOCK_K):
        for i in range(3):
            for j in tl.static_range(3):
                sums = _step(
                    x + (i * width + j) * C_IN, weights + (3 * i + j) * (C_IN * C_OUT), x_place, w_place,
                    (neighbours >> (3 * i + j)) & 1 != 0, known, inner, k, sums,
                    C_IN, IN_STEP, PRECISION, UPCAST, BLOCK_K,
                )  # fmt: skip

    plane = tl.cast(height, tl.int64) * width
    out += image * CHANNELS * plane + top * width + left
    y = _activate(sums, slope, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + channel[None, :] * plane + place[:, None], y, mask=inside[:, None] & known[None, :])


INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)
"""Triton's interpreter stands in for a GPU."""


def launch_layer(
    kernel: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    precision: str,
    config: Sequence[int],
) -> None:
    """Start ``kernel``, :func:`conv_kernel` or its wrapper, as :func:`advkd.ops.triton_conv.conv_layer`, unchecked."""
    scale = 2 if upsample else 1
    images, height, width, c_in = x.shape
    c_out, tile = weights.shape[3], Config(*config)
    if images == 0:
        return
    tiles = ceil(images * height * width, tile.pixels)
    grid = (scale * scale * tiles * ceil(c_out, tile.columns),)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, weights, bias, out, slope, images, height, width, out.shape[3],
            C_IN=c_in, C_OUT=c_out, UPSAMPLE=upsample, ACTIVATION=activation, **_numbers(x, weights, precision),
            BLOCK_M=tile.pixels, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages, **_options(kernel is conv_kernel),
        )  # fmt: skip


def launch_descriptor(
    kernel: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    config: Sequence[int],
) -> None:
    """As :func:`launch_layer`, for :func:`descriptor_kernel`."""
    images, height, width, c_in = x.shape
    c_out, tile = weights.shape[3], DescriptorConfig(*config)
    if images == 0:
        return
    down, across = ceil(height, tile.rows), ceil(width, tile.columns)
    grid = ((4 if upsample else 1) * images * down * across * ceil(c_out, tile.channels),)
    # Each tap is a matrix of its own, so that reads beyond its last channel give zero and not the next tap.
    taps = weights.view(-1, c_in, c_out)
    with torch.cuda.device_of(x):
        kernel[grid](
            _descriptor(x, [1, tile.rows, tile.columns, tile.inner]),
            _descriptor(taps, [1, tile.inner, tile.channels]),
            bias, out, slope, height, width, down, across, out.shape[3],
            C_IN=c_in, C_OUT=c_out, UPSAMPLE=upsample, ACTIVATION=activation,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            ROWS=tile.rows, COLUMNS=tile.columns, BLOCK_N=tile.channels, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages, **_options(kernel is descriptor_kernel),
        )  # fmt: skip


def _descriptor(tensor, box):
    """A descriptor of a contiguous tensor; its strides are computed, as torch keeps any stride for an axis of one element."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    return TensorDescriptor(tensor, list(tensor.shape), strides, box)


def launch_image(
    kernel: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    activation: int,
    slope: float,
    precision: str,
    config: Sequence[int],
) -> None:
    """As :func:`launch_layer`, for :func:`image_kernel`."""
    images, height, width, c_in = x.shape
    c_out, channels, tile = weights.shape[3], out.shape[1], ImageConfig(*config)
    if images == 0:
        return
    down, across = ceil(height, tile.rows), ceil(width, tile.columns)
    with torch.cuda.device_of(x):
        # One stage: copies that bypass registers bypass L1, too.
        kernel[(images * down * across,)](
            x, weights, bias, out, slope, height, width, down, across,
            C_IN=c_in, C_OUT=c_out, CHANNELS=channels, ACTIVATION=activation, **_numbers(x, weights, precision),
            ROWS=tile.rows, COLUMNS=tile.columns, BLOCK_N=c_out, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=1, **_options(kernel is image_kernel),
        )  # fmt: skip


def _numbers(x, weights, precision):
    """Compile-time constants of the weights' layout and of the arithmetic."""
    steps = {"IN_STEP": weights.stride(2), "OUT_STEP": weights.stride(3)}
    narrow = x.dtype != torch.float32
    return {**steps, "PRECISION": "tf32" if narrow else precision, "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}


def _options(direct):
    """Options of Triton's compiler; Inductor, which compiles a traced kernel, has its own."""
    return {"enable_fp_fusion": True} if direct else {}
