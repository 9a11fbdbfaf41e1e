"""The student's first layers in one launch, through CuPy: the launcher of ``csrc/cuda/student_stem.cu`` and its plan."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..errors import InputError
from .conv_layer import ConvLayer
from .cupy_modules import THREADS, address, compiled, cover, start, struct
from .gpu_storage import PRODUCTS, device_limits, stem_numbers

LAYERS = 32
"""``kStemLayers`` of ``csrc/cuda/student_stem.h``."""

WARPS = THREADS // 32
ZEROS = 32
PITCH = 40
"""``kStemWarps``, ``kStemZeros`` and ``kStemPitch`` there."""

MOST_SIDE = 32
CLUSTERS = (1, 2, 4, 8)

HOST_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may have where there is no device to ask."""

_SPLIT = ("shift", "part_shift", "rows", "line_shift", "bias_place")
LAYER = numpy.dtype(
    [("weights", "u8"), ("bias", "u8")] + [(name, "i4") for name in ("c_in", "c_out", "side", "upsample", *_SPLIT)], align=True
)
"""``StemLayer`` there."""

STEM = numpy.dtype(
    [("x", "u8"), ("out", "u8"), ("samples", "i8"), ("layers", LAYER, (LAYERS,))]
    + [(name, "i4") for name in ("count", "images", "out_pitch")]
    + [("slope", "f4"), ("bias", "i4"), ("sums", "i4"), ("buffers", "i4", (2,))],
    align=True,
)
"""``StemParameters`` there."""


def student_stem(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    layers: Sequence[int],
    slope: float,
    product: int,
    cluster: int,
    images: int,
) -> None:
    """3x3 convolutions with LeakyReLU one after the other, on 4x4 to 32x32 pixels, in one launch.

    Args:
        x: ``(N, 4, 4, C)`` contiguous, channels in whole units, in the product's storage dtype.
        weights: per layer :func:`advkd.ops.gpu_storage.pack_fragments` of its taps.
        biases: per layer ``(C_out,)`` float32.
        out: ``(N, R, R, P)`` contiguous, P at least the last layer's C_out and in whole units: channels [0, C_out) are written.
        layers: five integers per layer: channels in and out, in whole units, height and width of the input, whether it is
            up-sampled first (:func:`stem_numbers`).
        slope: LeakyReLU's slope for negative values.
        product: an index into :data:`advkd.ops.gpu_storage.PRODUCTS`.
        cluster: blocks that compute a group of images together, 1, 2, 4 or 8; more than one from compute capability 9.0 on.
        images: images of a group. An image's bits depend neither on it nor on the cluster.

    Raises:
        InputError: layers, tensors or numbers that do not fit; layers for whose activations shared memory is too small.
    """
    name = PRODUCTS[product] if 0 <= product < len(PRODUCTS) else None
    if name is None:
        raise InputError(f"product must be 0 to {len(PRODUCTS) - 1}, got {product}")
    table = _table(layers)
    _check_numbers(x, cluster, images, slope)
    _check_tensors(x, weights, biases, out, table, name)
    if len(x) == 0:
        return
    limit = shared_limit(x.device)
    plan = stem_plan(table, name, cluster, images, limit)
    if plan["layers"] < len(table):
        raise InputError(
            f"{plan['layers']} of {len(table)} layers fit in {limit} bytes of shared memory with {images} images in a group"
        )
    rows = [
        (address(weight), address(bias), c_in, c_out, side, upsample, *split)
        for weight, bias, (c_in, c_out, side, _, upsample), split in zip(weights, biases, table, plan["splits"])
    ]
    fields = {
        **dict(x=address(x), out=address(out), samples=len(x), count=len(table), images=images),
        **dict(out_pitch=out.shape[3], slope=slope, bias=plan["bias"], sums=plan["sums"], buffers=plan["buffers"]),
        "layers": rows + [(0,) * len(LAYER)] * (LAYERS - len(table)),  # type: ignore[arg-type]
    }
    program = compiled("student_stem", f"-DADVKD_PRODUCTS(EACH)=EACH({name})")
    kernel, blocks = f"advkd_student_stem_cluster{cluster}_{name}", cover(len(x), images) * cluster
    start(program, kernel, blocks, (struct(STEM, fields),), x.device, shared=plan["bytes"])


def stem_layers(layers: Sequence[ConvLayer], product: str, images: int, shared_limit: int) -> int:
    """How many of the leading layers :func:`student_stem` can compute in one launch.

    Args:
        layers: :class:`advkd.ops.conv_layer.ConvLayer` objects, the first of 4x4 pixels.
        product: one of :data:`advkd.ops.gpu_storage.PRODUCTS`.
        images: images of a group.
        shared_limit: bytes of shared memory that a block may have.

    They end before a layer with channels of the latent's details, one without LeakyReLU, one whose output has more than 32
    pixels to a side, and before what does not fit.
    """
    leading, side = [], 4
    for layer in layers[:LAYERS]:
        after = side * (2 if layer.upsample else 1)
        if layer.detail or layer.activation != "leaky_relu" or (layer.height, layer.width) != (side, side) or after > MOST_SIDE:
            break
        leading.append(layer)
        side = after
    return stem_plan(_rows(stem_numbers(leading)), product, 1, images, shared_limit)["layers"]


@functools.lru_cache(1024)
def stem_plan(table: tuple[tuple[int, ...], ...], product: str, cluster: int, images: int, limit: int) -> dict[str, Any]:
    """``stem_plan`` of ``csrc/cuda/student_stem.h``.

    Args:
        table: a tuple of five integers per layer.
        product: one of :data:`advkd.ops.gpu_storage.PRODUCTS`.

    Returns:
        ``layers`` that fit and the ``bytes`` they need, places in shared memory, and ``splits``: per layer
        ``shift``, ``part_shift``, ``rows``, ``line_shift`` and ``bias_place``.
    """
    element, products = (2 if product in ("bf16", "f16") else 4), (3 if product == "f32" else 1)
    plan: dict[str, Any] = dict(layers=0, bytes=0, bias=0, sums=0, buffers=(0, 0), splits=())
    biases, sums, buffers = 0, 0, [0, 0]
    for i, (c_in, c_out, side, _, upsample) in enumerate(table):
        split = stem_split(c_in, c_out, side, upsample, element, products, cluster, images)
        plan["splits"] += ((*split, biases // 4),)
        pixel = c_in * element
        biases += 4 * c_out
        sums = max(sums, WARPS * 16 * split[2] * PITCH * 4)
        buffers[i % 2] = max(buffers[i % 2], images * side * side * (pixel + 16))
        total = ZEROS + biases + sums + sum(buffers)
        if total > limit:
            break
        inputs = ZEROS + biases + sums
        plan.update(layers=i + 1, bytes=total, bias=ZEROS, sums=ZEROS + biases, buffers=(inputs, inputs + buffers[0]))
    return plan


def stem_split(
    c_in: int, c_out: int, side: int, upsample: int, element: int, products: int, cluster: int, images: int
) -> tuple[int, ...]:
    """``stem_split`` there: ``shift``, ``part_shift``, ``rows`` and ``line_shift`` of a layer."""
    phases, taps, columns, pixels = (4 if upsample else 1), (4 if upsample else 9), c_out // 16, images * side * side
    parts = max(1, WARPS // (phases * (side * side // 32 if side > 4 else 1)))
    rows = 2 if pixels > 16 else 1
    units, lines = taps * c_in * element // 32, phases * cover(pixels // 16, rows)
    costs = []
    for blocks in CLUSTERS[: CLUSTERS.index(cluster) + 1]:
        column, line = cover(columns, cluster // blocks), cover(lines, blocks)
        multiply = cover(line * column * parts, 4) * (WARPS // parts) * 16 * rows * products
        read = 8 * 11 * column * cover(phases, blocks)
        receive = pixels if upsample or blocks == 1 else min(pixels, line * rows * 16 + 2 * side + 2)
        costs.append(max(multiply, read) * units + receive * c_in * element // 2)
    return side.bit_length() - 1, parts.bit_length() - 1, rows, costs.index(min(costs))


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block on ``device`` may have."""
    return device_limits(device)[1] if device.type == "cuda" else HOST_LIMIT


def _rows(numbers):
    return tuple(tuple(numbers[i : i + 5]) for i in range(0, len(numbers), 5))


def _table(numbers):
    """The layers as rows of five, checked one against the other."""
    numbers = [int(n) for n in numbers]
    if not numbers or len(numbers) % 5 or len(numbers) > 5 * LAYERS:
        raise InputError(f"layers must be five numbers for each of 1 to {LAYERS} layers, got {len(numbers)} numbers")
    table, side, channels = _rows(numbers), 4, numbers[0]
    for i, (c_in, c_out, height, width, upsample) in enumerate(table):
        if c_in != channels or min(c_in, c_out) < 16 or c_in % 16 or c_out % 16:
            raise InputError(f"layer {i} must take {channels} channels, all in multiples of 16, got {c_in} and {c_out}")
        if (height, width) != (side, side) or upsample not in (0, 1):
            raise InputError(f"layer {i} must have a side of {side} and upsample 0 or 1, got {height}x{width} and {upsample}")
        side, channels = side * (1 + upsample), c_out
        if side > MOST_SIDE:
            raise InputError(f"layer {i} makes images of {side} pixels to a side, more than {MOST_SIDE}")
    return table


def _check_numbers(x, cluster, images, slope):
    if cluster not in CLUSTERS:
        raise InputError(f"cluster must be 1, 2, 4 or 8, got {cluster}")
    if cluster > 1 and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] < 9:
        raise InputError(f"cluster must be 1 before compute capability 9.0, got {cluster}")
    if not 1 <= images <= 4096:
        raise InputError(f"images must be 1 to 4096, got {images}")
    if not math.isfinite(slope):
        raise InputError(f"slope must be finite, got {slope}")


def _check_tensors(x, weights, biases, out, table, product):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, torch.float32)
    (c_in, *_), (_, c_out, side, _, upsample) = table[0], table[-1]
    _check("x", x, (x.shape[0] if x.ndim else 0, 4, 4, c_in), dtype, x.device)
    side *= 1 + upsample
    pitch = out.shape[-1] if out.ndim == 4 else 0
    if pitch < c_out or pitch % 16:
        raise InputError(f"out must have at least {c_out} channels, in whole units of 16, got shape {tuple(out.shape)}")
    _check("out", out, (len(x), side, side, pitch), dtype, x.device)
    if not len(weights) == len(biases) == len(table):
        raise InputError(f"there must be weights and biases for {len(table)} layers, got {len(weights)} and {len(biases)}")
    for i, (weight, bias, (c_in, c_out, _, _, upsample)) in enumerate(zip(weights, biases, table)):
        phases, taps = (4, 4) if upsample else (1, 9)
        shape = (phases, c_in * dtype.itemsize // 32, taps, c_out // 16, 32, 16 // dtype.itemsize)
        _check(f"weights[{i}]", weight, shape, dtype, x.device)
        _check(f"biases[{i}]", bias, (c_out,), torch.float32, x.device)


def _check(name, tensor, shape, dtype, device):
    fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device == device
    if not fits or not tensor.is_contiguous() or address(tensor) % 16:
        came = f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} must be {shape}, {dtype} on {device}, contiguous and aligned to 16 bytes, got {came}")
