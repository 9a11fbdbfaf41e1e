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
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from ..errors import BackendUnavailableError, InputError
from ..ops.conv_layer import ACTIVATIONS, ConvLayer
from ..ops.gpu_storage import UNIT, input_channels, pad_layer, padded, product_of, round_tf32

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""Arithmetic of float32 products: in full without tensor cores, as TensorFloat-32, in full as three products of those."""

IMAGE_COLUMNS = 16
"""Output channels of the image's product: a tensor core has no fewer."""

PROCESSORS = 132
"""Multiprocessors of the GPU for which configurations are ordered."""

SHARED = 99 * 1024
"""Bytes of shared memory that every GPU since sm_80 can give a block."""

DESCRIPTORS_SINCE = (9, 0)
"""Compute capability of the first GPUs that copy boxes of tensors by descriptors."""

# Counts that happen to be 1 must not become compile-time constants.
SCALARS = ["images", "height", "width", "tiles_down", "tiles_across"]


class Config(NamedTuple):
    """Tile of the convolution: pixels by output channels, input channels of a step, warps, stages of the pipeline."""

    pixels: int
    columns: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.columns}x{self.inner}, {self.warps} warps, {self.stages} stages"

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory of the pipeline."""
        return self.stages * (self.pixels + self.columns) * self.inner * dtype.itemsize


class ImageConfig(NamedTuple):
    """Tile of the image's convolution: rows by columns of pixels, input channels of a step, warps."""

    rows: int
    columns: int
    inner: int
    warps: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} pixels, {self.inner}, {self.warps} warps"


class DescriptorConfig(NamedTuple):
    """Tile of the descriptor variant: rows by columns of pixels by output channels, the rest as in :class:`Config`."""

    rows: int
    columns: int
    channels: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = f"{self.rows}x{self.columns} pixels x{self.channels}x{self.inner}"
        return f"{tile}, {self.warps} warps, {self.stages} stages"

    def shared(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory of the pipeline."""
        return self.stages * (self.rows * self.columns + self.channels) * self.inner * dtype.itemsize


NARROW = (
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 4),
    Config(128, 128, 32, 8, 4),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(256, 32, 64, 8, 3),
    Config(128, 32, 64, 4, 3),
    Config(64, 32, 64, 4, 3),
    Config(32, 64, 64, 4, 3),
    Config(32, 32, 64, 4, 3),
    Config(128, 16, 64, 4, 3),
    Config(64, 16, 64, 4, 4),
    Config(16, 32, 64, 2, 4),
    Config(16, 16, 64, 1, 4),
)
"""Configurations in 16-bit storage; a step is a cache line of 128 bytes of a pixel."""

WIDE = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 8, 3),
    Config(64, 128, 32, 8, 3),
    Config(64, 64, 32, 4, 3),
    Config(128, 32, 32, 8, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 64, 32, 4, 3),
    Config(32, 32, 32, 2, 4),
    Config(64, 16, 32, 4, 3),
    Config(16, 16, 32, 1, 4),
)
"""Configurations in TensorFloat-32."""

THREE = (
    Config(128, 64, 16, 8, 3),
    Config(64, 128, 16, 8, 3),
    Config(64, 64, 16, 4, 3),
    Config(128, 32, 16, 4, 3),
    Config(64, 32, 16, 4, 3),
    Config(32, 64, 32, 4, 3),
    Config(32, 32, 32, 2, 4),
    Config(64, 16, 32, 4, 3),
    Config(16, 32, 32, 2, 4),
    Config(16, 16, 32, 1, 4),
)
"""Configurations in float32 as three products: what is left over of each number takes registers, too."""

FULL = (
    Config(128, 64, 16, 8, 2),
    Config(64, 64, 16, 8, 2),
    Config(64, 64, 16, 4, 2),
    Config(64, 32, 16, 4, 2),
    Config(32, 64, 16, 4, 2),
    Config(32, 32, 16, 4, 2),
    Config(64, 16, 16, 4, 2),
    Config(16, 16, 16, 1, 2),
)
"""Configurations in float32 without tensor cores."""

IMAGE = (
    ImageConfig(8, 32, 64, 8),
    ImageConfig(8, 16, 64, 4),
    ImageConfig(4, 32, 64, 4),
    ImageConfig(8, 8, 64, 4),
    ImageConfig(4, 8, 64, 2),
)
"""Configurations of the image's layer; in float32 a step has half as many channels."""

IMAGE_FULL = (
    ImageConfig(8, 16, 64, 8),
    ImageConfig(8, 8, 64, 4),
    ImageConfig(4, 8, 64, 4),
)
"""The same without tensor cores."""

DESCRIPTOR = (
    DescriptorConfig(16, 16, 128, 64, 8, 4),
    DescriptorConfig(8, 16, 128, 64, 8, 3),
    DescriptorConfig(8, 16, 128, 64, 4, 3),
    DescriptorConfig(8, 8, 128, 64, 4, 4),
    DescriptorConfig(16, 16, 64, 64, 8, 4),
    DescriptorConfig(8, 16, 64, 64, 4, 4),
    DescriptorConfig(8, 8, 64, 64, 4, 4),
    DescriptorConfig(1, 256, 32, 64, 8, 3),
    DescriptorConfig(1, 128, 32, 64, 4, 4),
    DescriptorConfig(8, 16, 32, 64, 4, 4),
)
"""Configurations of the descriptor variant, in 16-bit storage; three stages leave a multiprocessor room for two blocks."""


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


def conv_layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    precision: str,
    config: Config,
) -> None:
    """A convolution of the student in a GPU's storage layout; writes channels ``[0, C_out)`` of ``out``.

    Args:
        x: ``(N, H, W, C_in)``, contiguous, C_in a multiple of 16: float32, bfloat16 or float16.
        weights: ``(phases, taps, C_in, C_out)`` of :func:`pack_weights`, C_out a multiple of 16.
        bias: ``(C_out,)`` float32.
        out: ``(N, H', W', P)``, contiguous, ``x``'s dtype; P >= C_out, H' = 2 H and W' = 2 W with ``upsample``.
        activation: an index into :data:`advkd.ops.conv_layer.ACTIVATIONS`.
        slope: LeakyReLU's slope.
        precision: arithmetic of float32 products, one of :data:`PRECISIONS`.
        config: a :class:`Config`.

    Raises:
        InputError: shapes, dtypes or layouts that do not fit.
    """
    _run_layer(conv_kernel, x, weights, bias, out, upsample, activation, slope, precision, config)


def conv_descriptor(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    precision: str,
    config: DescriptorConfig,
) -> None:
    """As :func:`conv_layer`, through tensor descriptors: 16-bit storage on GPUs since :data:`DESCRIPTORS_SINCE`.

    ``weights`` contiguous; ``config`` a :class:`DescriptorConfig`. Launches can be captured: a descriptor is made on the host
    and passed by value. Torch's compilers cannot trace through it, so no traced op uses it.

    Raises:
        InputError: as :func:`conv_layer`; float32, whose split into three products is made in registers, or misaligned tensors.
        BackendUnavailableError: a GPU without such copies.
    """
    _run_descriptor(descriptor_kernel, x, weights, bias, out, upsample, activation, slope, precision, config)


def conv_image(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    activation: int,
    slope: float,
    precision: str,
    config: ImageConfig,
) -> None:
    """The image's convolution: as :func:`conv_layer`, to few channels and in the order of images.

    ``weights`` ``(1, 9, C_in, 16)``; ``out`` ``(N, c, H, W)``, contiguous, c at most 16; ``config`` an :class:`ImageConfig`.
    """
    _run_image(image_kernel, x, weights, bias, out, activation, slope, precision, config)


def pack_weights(taps: torch.Tensor, dtype: torch.dtype, precision: str) -> torch.Tensor:
    """Weights ``(phases, taps, C_in, C_out)`` of :func:`advkd.ops.gpu_storage.pad_layer` in the kernels' fastest layout.

    Tensor cores take float32 with the summed index fastest in memory; TensorFloat-32 is rounded here, not truncated there.
    """
    if dtype != torch.float32:
        return taps.to(dtype).contiguous()
    if precision == "ieee":
        return taps.contiguous()
    taps = round_tf32(taps) if precision == "tf32" else taps
    return taps.transpose(2, 3).contiguous().transpose(2, 3)


def is_image(layer: ConvLayer) -> bool:
    """True if :func:`conv_image` computes a layer."""
    return layer.c_out <= 4 and not layer.upsample


def configs(
    layer: ConvLayer, batch: int, dtype: torch.dtype, precision: str = "tf32", shared: int = SHARED
) -> tuple[Config | ImageConfig, ...]:
    """Configurations worth measuring for a :class:`advkd.ops.conv_layer.ConvLayer`, the most promising first, at most 8.

    ``shared``: bytes of shared memory available to a block.
    """
    c_in = input_channels(layer)
    if is_image(layer):
        return tuple(sorted(image_table(dtype, precision, c_in), key=lambda tile: _image_cost(tile, layer, batch)))
    tiles = dict.fromkeys(table(dtype, precision, c_in))
    # Barriers and the like take a few bytes more.
    tiles = [tile for tile in tiles if tile.shared(dtype) + 1024 <= shared]
    return tuple(sorted(tiles, key=lambda tile: _cost(tile, layer, batch))[:8])


def descriptor_configs(
    layer: ConvLayer, batch: int, dtype: torch.dtype, capability: tuple[int, int], shared: int
) -> tuple[DescriptorConfig, ...]:
    """Configurations of :func:`conv_descriptor` worth measuring for a layer, the most promising first, at most 4, or none.

    ``capability``: the device's compute capability; ``shared``: bytes of shared memory available to a block.
    """
    if is_image(layer) or descriptor_gap(dtype, capability):
        return ()
    tiles = dict.fromkeys(descriptor_table(input_channels(layer)))
    # A tile larger than an image computes pixels that do not exist; barriers and the like take a few bytes more.
    tiles = [tile for tile in tiles if tile.rows <= layer.height and tile.columns <= layer.width]
    tiles = [tile for tile in tiles if tile.shared(dtype) + 1024 <= shared]
    return tuple(sorted(tiles, key=lambda tile: _descriptor_cost(tile, layer, batch))[:4])


def descriptor_gap(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why :func:`conv_descriptor` cannot run for a dtype on a device of a compute capability, or None."""
    if dtype == torch.float32:
        return "tensor descriptors are read in 16-bit storage only"
    if capability < DESCRIPTORS_SINCE:
        least, found = (".".join(map(str, pair)) for pair in (DESCRIPTORS_SINCE, capability))
        return f"tensor descriptors need compute capability {least}, this device has {found}"
    return None


def descriptor_table(c_in: int) -> tuple[DescriptorConfig, ...]:
    """All configurations of :func:`conv_descriptor`, their steps fitted to ``c_in`` channels."""
    return tuple(tile._replace(inner=_inner(tile.inner, c_in)) for tile in DESCRIPTOR)


def table(dtype: torch.dtype, precision: str, c_in: int) -> tuple[Config, ...]:
    """All configurations of :func:`conv_layer`, their steps fitted to ``c_in`` channels."""
    tiles = {"tf32": WIDE, "tf32x3": THREE, "ieee": FULL}[precision] if dtype == torch.float32 else NARROW
    return tuple(tile._replace(inner=_inner(tile.inner, c_in)) for tile in tiles)


def image_table(dtype: torch.dtype, precision: str, c_in: int) -> tuple[ImageConfig, ...]:
    """All configurations of :func:`conv_image`, their steps fitted to ``c_in`` channels."""
    wide = dtype == torch.float32
    tiles = IMAGE_FULL if wide and precision == "ieee" else IMAGE
    return tuple(tile._replace(inner=_inner(tile.inner // (1 + wide), c_in)) for tile in tiles)


def default(layer: ConvLayer, batch: int, dtype: torch.dtype, precision: str = "tf32") -> Config | ImageConfig:
    """The configuration taken without a measurement; it runs on every GPU since sm_80."""
    return configs(layer, batch, dtype, precision)[0]


def conv_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    slope: float,
    upsample: bool,
    activation: str,
    precision: str | None = None,
) -> torch.Tensor:
    """Launcher of ``advkd::conv_block``: ordinary tensors of any strides, padded and packed on every call.

    ``precision``: arithmetic of float32 products, one of :data:`PRECISIONS`; by default TensorFloat-32 where torch's switch
    for convolutions allows it, else three products in it.
    """
    layer = ConvLayer(weight.shape[1], weight.shape[0], *x.shape[2:], upsample, activation)
    if precision is None:
        precision = "tf32" if product_of(x.dtype) == "tf32" else "tf32x3"
    taps, bias = pad_layer(weight, bias, layer)
    weights = pack_weights(taps, x.dtype, precision)
    x = F.pad(x.permute(0, 2, 3, 1), (0, weights.shape[2] - layer.c_in)).contiguous()
    code, config = ACTIVATIONS.index(activation), list(default(layer, len(x), x.dtype, precision))
    if is_image(layer):
        return conv_image_triton(x, weights, bias, layer.c_out, code, slope, precision, config)
    y = conv_layer_triton(x, weights, bias, upsample, code, slope, precision, config)
    return y[..., : layer.c_out].permute(0, 3, 1, 2).contiguous()


def _conv_layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    precision: str,
    config: list[int],
) -> torch.Tensor:
    out = _layer_result(x, weights, bias, upsample, activation, slope, precision, config)
    kernel = conv_kernel if INTERPRETED else wrap_triton(conv_kernel)
    _run_layer(kernel, x, weights, bias, out, upsample, activation, slope, precision, config)
    return out


def _layer_result(x, weights, bias, upsample, activation, slope, precision, config):
    scale = 2 if upsample else 1
    return x.new_empty((x.shape[0], scale * x.shape[1], scale * x.shape[2], weights.shape[3]))


def _conv_image(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    channels: int,
    activation: int,
    slope: float,
    precision: str,
    config: list[int],
) -> torch.Tensor:
    out = _image_result(x, weights, bias, channels, activation, slope, precision, config)
    kernel = image_kernel if INTERPRETED else wrap_triton(image_kernel)
    _run_image(kernel, x, weights, bias, out, activation, slope, precision, config)
    return out


def _image_result(x, weights, bias, channels, activation, slope, precision, config):
    return x.new_empty((x.shape[0], channels, x.shape[1], x.shape[2]))


def _register(name, function, result):
    """An op that compilers trace through to the kernel, or keep whole where the kernel is interpreted.

    It returns its result: an op that writes an argument would cost copies wherever a graph is functionalized. The result's
    shape has a function of its own, because the launcher's comparisons of numbers would specialize the sizes of an export.
    """
    op = (custom_op if INTERPRETED else triton_op)(f"advkd::{name}", function, mutates_args=())
    op.register_fake(result)
    return op


conv_layer_triton = _register("conv_layer_triton", _conv_layer, _layer_result)
conv_image_triton = _register("conv_image_triton", _conv_image, _image_result)


def _run_layer(kernel, x, weights, bias, out, upsample, activation, slope, precision, config):
    scale = 2 if upsample else 1
    _check_layer(x, weights, bias, out, upsample, precision)
    images, height, width, c_in = x.shape
    c_out, config = weights.shape[3], Config(*config)
    if images == 0:
        return
    tiles = _ceil(images * height * width, config.pixels)
    grid = (scale * scale * tiles * _ceil(c_out, config.columns),)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, weights, bias, out, slope, images, height, width, out.shape[3],
            C_IN=c_in, C_OUT=c_out, UPSAMPLE=upsample, ACTIVATION=activation, **_numbers(x, weights, precision),
            BLOCK_M=config.pixels, BLOCK_N=config.columns, BLOCK_K=config.inner,
            num_warps=config.warps, num_stages=config.stages, **_options(kernel is conv_kernel),
        )  # fmt: skip


def _run_descriptor(kernel, x, weights, bias, out, upsample, activation, slope, precision, config):
    _check_layer(x, weights, bias, out, upsample, precision)
    _check_descriptors(x, weights)
    images, height, width, c_in = x.shape
    c_out, config = weights.shape[3], DescriptorConfig(*config)
    if images == 0:
        return
    down, across = _ceil(height, config.rows), _ceil(width, config.columns)
    grid = ((4 if upsample else 1) * images * down * across * _ceil(c_out, config.channels),)
    # Each tap is a matrix of its own, so that reads beyond its last channel give zero and not the next tap.
    taps = weights.view(-1, c_in, c_out)
    with torch.cuda.device_of(x):
        kernel[grid](
            _descriptor(x, [1, config.rows, config.columns, config.inner]),
            _descriptor(taps, [1, config.inner, config.channels]),
            bias, out, slope, height, width, down, across, out.shape[3],
            C_IN=c_in, C_OUT=c_out, UPSAMPLE=upsample, ACTIVATION=activation,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            ROWS=config.rows, COLUMNS=config.columns, BLOCK_N=config.channels, BLOCK_K=config.inner,
            num_warps=config.warps, num_stages=config.stages, **_options(kernel is descriptor_kernel),
        )  # fmt: skip


def _descriptor(tensor, box):
    """A descriptor of a contiguous tensor; its strides are computed, as torch keeps any stride for an axis of one element."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim)]
    return TensorDescriptor(tensor, list(tensor.shape), strides, box)


def _run_image(kernel, x, weights, bias, out, activation, slope, precision, config):
    _check(x, weights, bias, (1, 9), precision)
    images, height, width, c_in = x.shape
    c_out, channels, config = weights.shape[3], out.shape[1], ImageConfig(*config)
    _check_out(out, x, (images, height, width), (out.shape[0], *out.shape[2:]))
    if c_out != IMAGE_COLUMNS or channels > c_out:
        raise InputError(f"an image has at most {IMAGE_COLUMNS} channels, padded to as many, got {channels} and {c_out}")
    if images == 0:
        return
    down, across = _ceil(height, config.rows), _ceil(width, config.columns)
    with torch.cuda.device_of(x):
        # One stage: copies that bypass registers bypass L1, too.
        kernel[(images * down * across,)](
            x, weights, bias, out, slope, height, width, down, across,
            C_IN=c_in, C_OUT=c_out, CHANNELS=channels, ACTIVATION=activation, **_numbers(x, weights, precision),
            ROWS=config.rows, COLUMNS=config.columns, BLOCK_N=c_out, BLOCK_K=config.inner,
            num_warps=config.warps, num_stages=1, **_options(kernel is image_kernel),
        )  # fmt: skip


def _numbers(x, weights, precision):
    """Compile-time constants of the weights' layout and of the arithmetic."""
    steps = {"IN_STEP": weights.stride(2), "OUT_STEP": weights.stride(3)}
    narrow = x.dtype != torch.float32
    return {**steps, "PRECISION": "tf32" if narrow else precision, "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}


def _options(direct):
    """Options of Triton's compiler; Inductor, which compiles a traced kernel, has its own."""
    return {"enable_fp_fusion": True} if direct else {}


def _check(x, weights, bias, phases, precision):
    if x.ndim != 4 or x.shape[3] % UNIT or not x.is_contiguous():
        expected = f"contiguous (N, H, W, C), C a multiple of {UNIT}"
        raise InputError(f"x must be {expected}, got {tuple(x.shape)} with strides {x.stride()}")
    product_of(x.dtype)
    expected = (*phases, x.shape[3])
    if weights.ndim != 4 or tuple(weights.shape[:3]) != expected or weights.shape[3] % UNIT:
        raise InputError(f"weights must be {expected} by a multiple of {UNIT}, got {tuple(weights.shape)}")
    if not (weights.is_contiguous() or weights.transpose(2, 3).is_contiguous()):
        raise InputError(f"weights must be contiguous, or by their last two axes swapped, got strides {weights.stride()}")
    if bias.shape != weights.shape[3:] or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise InputError(f"bias must be ({weights.shape[3]},) float32, got {tuple(bias.shape)} {bias.dtype}")
    if weights.dtype != x.dtype:
        raise InputError(f"weights must be {x.dtype} as x, got {weights.dtype}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _check_layer(x, weights, bias, out, upsample, precision):
    scale = 2 if upsample else 1
    _check(x, weights, bias, (4, 4) if upsample else (1, 9), precision)
    _check_out(out, x, (x.shape[0], scale * x.shape[1], scale * x.shape[2]), out.shape[:3])
    if out.shape[3] < weights.shape[3]:
        raise InputError(f"out has {out.shape[3]} channels, {weights.shape[3]} are written")


def _check_descriptors(x, weights):
    # Where there is no GPU the kernel is interpreted.
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else DESCRIPTORS_SINCE
    if reason := descriptor_gap(x.dtype, capability):
        raise (InputError if x.dtype == torch.float32 else BackendUnavailableError)(reason)
    if not weights.is_contiguous():
        raise InputError(f"weights must be contiguous, got strides {weights.stride()}")
    for name, tensor in (("x", x), ("weights", weights)):
        if tensor.data_ptr() % 16:
            raise InputError(f"{name} must begin on a multiple of 16 bytes")


def _check_out(out, x, expected, found):
    if tuple(found) != tuple(expected) or out.dtype != x.dtype or not out.is_contiguous():
        raise InputError(f"out must be contiguous {x.dtype} of {tuple(expected)} (N, H, W), got {tuple(found)} {out.dtype}")


def _ceil(a, b):
    return (a + b - 1) // b


def _inner(most, channels):
    """Input channels per step: few steps, with little padding beyond the last channel."""
    sizes = [size for size in (64, 32, 16) if size <= most]
    # torch 2.10's compiler traces sorted with a key, but not min with one.
    return sorted(sizes, key=lambda size: _ceil(channels, size) * (size + 16))[0]


def _cost(tile, layer, batch):
    """Relative time: waves over all multiprocessors times a tile's products, loads and overhead."""
    programs = (4 if layer.upsample else 1) * _ceil(batch * layer.height * layer.width, tile.pixels)
    programs *= _ceil(padded(layer.c_out), tile.columns)
    return _ceil(programs, PROCESSORS) * (tile.pixels + 16) * (tile.columns + 16)


def _image_cost(tile, layer, batch):
    programs = batch * _ceil(layer.height, tile.rows) * _ceil(layer.width, tile.columns)
    return _ceil(programs, PROCESSORS) * (tile.rows + 2) * (tile.columns + 2)


def _descriptor_cost(tile, layer, batch):
    """As :func:`_cost`, for two-dimensional tiles."""
    programs = (4 if layer.upsample else 1) * batch * _ceil(layer.height, tile.rows) * _ceil(layer.width, tile.columns)
    programs *= _ceil(padded(layer.c_out), tile.channels)
    return _ceil(programs, PROCESSORS) * (tile.rows * tile.columns + 16) * (tile.channels + 16)
