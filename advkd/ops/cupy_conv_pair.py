"""Two convolutions of few channels in one kernel, through CuPy; its plan, which the engine asks whether a pair fits.

Alone such convolutions spend as long on memory as on arithmetic, or longer. Together they read the input, with a border, and
write the output: of ``2 (C_in + C_mid + C_mid + C_out)`` bytes per pixel in 16 bits ``2 (C_in + C_out)`` remain, for ``C_in``
a quarter of it where the input is up-sampled. The price is the border of the pixels between, which neighbouring tiles compute
both: ``(th + 2) (tw + 2) / (th tw)`` of the first convolution, 1.27 for tiles of 16 x 16. ``csrc/cuda/conv_pair.cu`` predicts
where that is worth while: below about 24 channels on a card with much memory bandwidth, above that on one with less.
"""

import numpy
import torch

from ..errors import InputError
from .cupy_modules import address, compiled, cover, start, struct
from .gpu_storage import PRODUCTS, STEP, UNIT, device_limits, padded

MOST_CHANNELS = 64
"""``kMostPairChannels`` of ``csrc/cuda/conv_pair.h``."""

ROWS = 3
"""``kPairRows1`` there."""

TILES = ((16, 16), (8, 16), (8, 8))
"""Outputs of a block, rows and columns, in the order in which they are tried."""

MOST_SIDE, MOST_BLOCKS = 2**29, 2**31 - 1

HOST_LIMITS = (108, 163 * 1024)
"""Multiprocessors and bytes of shared memory per block that plans assume where there is no GPU (emulation)."""

_POINTERS = ("x", "weights1", "weights2", "bias1", "bias2", "out")
_SIZES = ("height", "width", "c_in", "c_mid", "c_out", "pitch", "upsample", "image", "activation")
_PLAN = ("tile_height", "tile_width", "down", "across", "columns", "shared", "mid_place")
_DIVISORS = ("by_input_chunks", "by_input_width", "by_grid_width", "by_sets", "by_out_chunks")
CONV_PAIR = numpy.dtype(
    [(name, "u8") for name in _POINTERS]
    + [("samples", "i8")]
    + [(name, "i4") for name in _SIZES]
    + [("slope", "f4")]
    + [(name, "i4") for name in _PLAN]
    + [(name, "u4") for name in _DIVISORS]
    + [("blocks", "i8")],
    align=True,
)
"""``ConvPairParameters`` of ``csrc/cuda/conv_pair.h``."""


def conv_pair(
    x: torch.Tensor,
    weights1: torch.Tensor,
    bias1: torch.Tensor,
    weights2: torch.Tensor,
    bias2: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    image: bool,
    activation: int,
    slope: float,
    product: int,
) -> None:
    """``out = activation(conv3x3(leaky_relu(conv3x3(up(x)) + bias1)) + bias2)``, both with zeros around the image.

    Args:
        x: ``(N, H, W, C_in)`` contiguous, of the product's storage dtype (:mod:`advkd.ops.gpu_storage`).
        weights1, bias1: :func:`~advkd.ops.gpu_storage.pack_fragments` of the first convolution and float32 ``(C_mid,)``.
        weights2, bias2: the same of the second; with ``image`` :func:`~advkd.ops.gpu_storage.pack_image` and ``(c_out,)``.
        out: ``(N, H', W', P)`` contiguous, of whose channels the first ``C_out <= P`` are written; with ``image``
            ``(N, c_out, H', W')`` contiguous. H' and W' are twice H and W with ``upsample``.
        upsample: double height and width of ``x`` first.
        image: the second convolution is the network's last, of 1 to 4 channels.
        activation: of the second: 0 none, 1 LeakyReLU, 2 tanh.
        slope: of LeakyReLU.
        product: place in :data:`~advkd.ops.gpu_storage.PRODUCTS`.

    Raises:
        InputError: shapes, dtypes or layouts that do not fit, more than 64 channels, too little shared memory.
    """
    _require(product in range(len(PRODUCTS)), f"product must be a place in {PRODUCTS}, got {product}")
    _require(activation in (0, 1, 2), f"activation must be 0, 1 or 2, got {activation}")
    name, upsample, image = PRODUCTS[product], bool(upsample), bool(image)
    sizes = _checked_sizes(x, weights1, bias1, weights2, bias2, out, upsample, image, name)
    if x.numel() == 0:
        return
    plan = pair_plan(*sizes, upsample, image, x.element_size(), *_limits(x.device))
    if plan is None:
        raise InputError(f"{sizes[3:]} channels in {x.dtype} do not fit in this GPU's shared memory")
    _require(plan["blocks"] <= MOST_BLOCKS, f"x is too large for one launch, got {tuple(x.shape)}")
    tensors = dict(zip(_POINTERS, map(address, (x, weights1, weights2, bias1, bias2, out))))
    named = dict(zip(("samples", "height", "width", "c_in", "c_mid", "c_out"), sizes))
    options = dict(upsample=upsample, image=image, activation=activation, slope=slope, pitch=0 if image else out.shape[3])
    parameters = struct(CONV_PAIR, {**tensors, **named, **options, **plan})
    program = compiled("conv_pair", f"-DADVKD_PRODUCTS(EACH)=EACH({name})")
    kernel = f"advkd_conv_pair_columns{plan['columns']}_{name}"
    start(program, kernel, plan["blocks"], (parameters,), x.device, shared=plan["shared"])


def fits(c_in: int, c_mid: int, c_out: int, upsample: bool, image: bool, product: str, shared_limit: int) -> bool:
    """True if a block of ``shared_limit`` bytes of shared memory can do a pair.

    Args:
        c_in, c_mid, c_out: channels in whole units; with ``image`` ``c_out`` is the image's own, 1 to 4.
        upsample, image: as in :func:`conv_pair`.
        product: one of :data:`~advkd.ops.gpu_storage.PRODUCTS`.
    """
    wide = (c_in, c_mid) if image else (c_in, c_mid, c_out)
    if any(c % UNIT or not 0 < c <= MOST_CHANNELS for c in wide) or image and not 1 <= c_out <= 4:
        return False
    return pair_plan(1, 1, 1, c_in, c_mid, c_out, upsample, image, _element(product), 1, shared_limit) is not None


def pair_plan(
    samples: int,
    height: int,
    width: int,
    c_in: int,
    c_mid: int,
    c_out: int,
    upsample: bool,
    image: bool,
    element: int,
    multiprocessors: int,
    shared_limit: int,
) -> dict[str, int] | None:
    """``pair_plan`` of ``csrc/cuda/conv_pair.h``: a tile, blocks and shared memory, or None if no tile fits.

    ``height`` and ``width``: of ``x``. ``element``: its bytes.
    """
    sizes = (samples, height, width, c_in, c_mid, c_out, upsample, image, element)
    found = None
    for tile in TILES:
        plan = _tile_plan(*tile, *sizes)
        if plan["shared"] > shared_limit:
            continue
        if found is None or found["blocks"] < multiprocessors or plan["blocks"] == found["blocks"]:
            found = plan
    return found


def _tile_plan(tile_height, tile_width, samples, height, width, c_in, c_mid, c_out, upsample, image, element):
    """``pair_try`` there."""
    mid_height, mid_width = tile_height + 2, tile_width + 2
    if upsample:
        input_height, input_width = tile_height // 2 + 2, tile_width // 2 + 2
        grid_height, grid_width = mid_height // 2, mid_width // 2
    else:
        input_height, input_width = tile_height + 4, tile_width + 4
        grid_height, grid_width = mid_height, mid_width
    mid, units = mid_height * mid_width, c_mid // UNIT
    inputs = input_height * input_width * _pitch(c_in, element)
    outputs = mid * (9 * c_out | 1) * 4 if image else tile_height * tile_width * _pitch(c_out, element)
    down, across = cover(height << upsample, tile_height), cover(width << upsample, tile_width)
    return dict(
        tile_height=tile_height,
        tile_width=tile_width,
        down=down,
        across=across,
        columns=cover(units, 2) if tile_height * tile_width < 256 or units > 3 else units,
        shared=max(inputs, outputs) + mid * _pitch(c_mid, element),
        mid_place=max(inputs, outputs),
        by_input_chunks=_divisor(c_in * element // 16),
        by_input_width=_divisor(input_width),
        by_grid_width=_divisor(grid_width),
        by_sets=_divisor(cover(grid_height * grid_width, 16 * ROWS)),
        by_out_chunks=_divisor(1 if image else c_out * element // 16),
        blocks=samples * down * across,
    )


def _pitch(channels, element):
    return channels * element + 16


def _divisor(n):
    return 2**20 // n + 1


def _element(product):
    return 2 if product in ("bf16", "f16") else 4


def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of shared memory per block of a device."""
    return device_limits(device) if device.type == "cuda" else HOST_LIMITS


def _checked_sizes(x, weights1, bias1, weights2, bias2, out, upsample, image, product) -> tuple[int, int, int, int, int, int]:
    """``(samples, height, width, c_in, c_mid, c_out)`` of tensors that fit together."""
    _require(x.ndim == 4 and out.ndim == 4, "x and out must have four dimensions")
    n, height, width, c_in = x.shape
    c_mid, c_out = bias1.numel(), bias2.numel()
    _require(max(height, width) <= MOST_SIDE, f"x must have at most 2^29 rows and columns, got {tuple(x.shape)}")
    wide = (c_in, c_mid) if image else (c_in, c_mid, c_out)
    fit = all(c % UNIT == 0 and 0 < c <= MOST_CHANNELS for c in wide)
    _require(fit, f"channels must be multiples of {UNIT} up to {MOST_CHANNELS}, got {wide}")
    _require(not image or 1 <= c_out <= 4, f"an image must have 1 to 4 channels, got {c_out}")
    _check_out(out, (n, height << upsample, width << upsample), c_out, image)
    _check_weights(weights1, 4 if upsample else 1, 4 if upsample else 9, c_in, c_mid)
    _check_weights(weights2, 1, 1 if image else 9, c_mid, padded(9 * c_out) if image else c_out)
    storage = {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, torch.float32)
    for tensor in (x, weights1, weights2, out, bias1, bias2):
        dtype = torch.float32 if tensor is bias1 or tensor is bias2 else storage
        _require(tensor.dtype == dtype, f"a tensor must be {dtype} for product {product}, got {tensor.dtype}")
        _require(tensor.is_contiguous() and tensor.device == x.device, "tensors must be contiguous and on one device")
    vectors = (x, weights1, weights2) if image else (x, weights1, weights2, out)
    _require(not any(address(tensor) % 16 for tensor in vectors), "tensors must be aligned to 16 bytes")
    return n, height, width, c_in, c_mid, c_out


def _check_out(out, sides, c_out, image):
    n, height, width = sides
    if image:
        _require(out.shape == (n, c_out, height, width), f"out must be {(n, c_out, height, width)}, got {tuple(out.shape)}")
        return
    pitch = out.shape[3]
    fit = out.shape[:3] == sides and c_out <= pitch <= MOST_SIDE and pitch % UNIT == 0
    _require(fit, f"out must be {sides} by {c_out} channels or {UNIT}, {2 * UNIT}, ... more, got {tuple(out.shape)}")


def _check_weights(weights, phases, taps, c_in, c_out):
    element = weights.element_size()
    shape = (phases, c_in * element // STEP, taps, c_out // UNIT, 32, 16 // element)
    _require(weights.shape == shape, f"packed weights must have shape {shape}, got {tuple(weights.shape)}")


def _require(condition, message):
    if not condition:
        raise InputError(f"conv_pair: {message}")
