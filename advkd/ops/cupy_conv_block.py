"""The student's convolutions (``csrc/cuda/conv_block.cu``) through CuPy, and the plan of their tiles."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy
import torch

from ..errors import InputError
from .cupy_modules import clamp, compiled, cover, start, struct
from .gpu_storage import PRODUCTS, STEP, UNIT, device_limits

PLAN = (
    "shape pixel_warps channel_warps parts chunk chunks stages resident log_height log_width tile_images halo_height "
    "halo_width tile_rows tile_columns tiles channel_blocks walkers stages_place stage_bytes shared_bytes"
).split()
SIZES = "images height width steps columns channels side phases activation".split()
PARAMETERS = numpy.dtype(
    [(name, "u8") for name in ("x", "weights", "bias", "out")]
    + [(name, "i4") for name in SIZES]
    + [("slope", "f4")]
    + [(name, "i4") for name in PLAN],
    align=True,
)
"""``ConvBlockParameters`` of ``csrc/cuda/conv_block.h``."""

WARPS = 8
SHAPES = ((4, 4, 1), (4, 3, 1), (4, 2, 2), (4, 1, 2), (2, 2, 2), (1, 1, 2))
"""A warp's sums: times 16 pixels, times 16 channels, and how many blocks a multiprocessor's registers hold."""

MOST_TILES = 2**30
IMAGE_PLANE = 340
TANH = 2
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

MULTIPROCESSORS, SHARED_LIMIT = 108, 163 * 1024
"""Numbers of the device that plans assume where kernels run without one."""


def conv_layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    upsample: bool,
    activation: int,
    slope: float,
    product: int,
) -> None:
    """A 3x3 convolution, of the up-sampled input or of the input, with bias and activation.

    Args:
        x: ``(N, H, W, C_in)`` contiguous, channels in whole units, in the product's storage dtype.
        weights: of :func:`advkd.ops.gpu_storage.pack_fragments`.
        bias: ``(C_out,)`` float32.
        out: ``(N, H', W', P)`` contiguous like x: channels ``[0, C_out)`` of its ``P >= C_out`` are written.
        upsample: H' = 2 H and W' = 2 W, else H and W.
        activation: 0 none, 1 LeakyReLU with ``slope``, 2 tanh.
        product: index into :data:`advkd.ops.gpu_storage.PRODUCTS`.

    Raises:
        InputError: dtypes, shapes or layouts that do not fit.
    """
    sizes = layer_sizes(x, weights, bias, out, upsample, activation, product)
    if x.numel() == 0:
        return
    plan = layer_plan(**sizes, element=x.element_size(), split=PRODUCTS[product] == "f32", **plan_device(x.device))
    rows, columns, _ = SHAPES[plan["shape"]]
    blocks = plan["walkers"] * plan["channel_blocks"] * sizes["phases"]
    _start(f"conv_layer_{rows}x{columns}", blocks, (x, weights, bias, out), {**sizes, **plan}, slope, product)


def conv_image(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, activation: int, slope: float, product: int
) -> None:
    """The student's last convolution, 3x3 of C_in to 1 to 4 channels, with bias and activation.

    Args:
        x, activation, slope, product: as of :func:`conv_layer`.
        weights: of :func:`advkd.ops.gpu_storage.pack_image`.
        bias: ``(C_out,)`` float32, C_out 1 to 4.
        out: ``(N, C_out, H, W)`` contiguous, x's dtype.

    Raises:
        InputError: dtypes, shapes or layouts that do not fit.
    """
    sizes = image_sizes(x, weights, bias, out, activation, product)
    if x.numel() == 0:
        return
    plan = image_plan(**sizes, element=x.element_size(), split=False, **plan_device(x.device))
    _start(f"conv_image_{sizes['columns']}", plan["walkers"], (x, weights, bias, out), {**sizes, **plan}, slope, product)


def _start(kernel, blocks, tensors, numbers, slope, product):
    name = PRODUCTS[product]
    program = compiled("conv_block", f"-DADVKD_PRODUCTS(EACH)=EACH({name})")
    addresses = {field: tensor.data_ptr() for field, tensor in zip(("x", "weights", "bias", "out"), tensors)}
    # LeakyReLU with the slope 1 is no activation.
    fields = {**addresses, **numbers, "slope": slope if numbers["activation"] else 1.0}
    arguments = (struct(PARAMETERS, fields),)
    start(program, f"advkd_{kernel}_{name}", blocks, arguments, tensors[0].device, shared=numbers["shared_bytes"])


def layer_sizes(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, upsample: bool, activation: int, product: int
) -> dict[str, int]:
    """The sizes of a layer, after its launcher's checks."""
    steps = _check_input(x, activation, product)
    scale, phases, taps = (2, 4, 4) if upsample else (1, 1, 9)
    columns = len(bias) // UNIT
    expected = (x.shape[0], scale * x.shape[1], scale * x.shape[2])
    if bias.ndim != 1 or len(bias) % UNIT or columns == 0:
        raise InputError(f"bias must have a multiple of {UNIT} channels, got shape {tuple(bias.shape)}")
    _check("bias", bias, (UNIT * columns,), torch.float32, x, whole=False)
    _check("weights", weights, (phases, steps, taps, columns, 32, 16 // x.element_size()), x.dtype, x)
    channels = out.shape[-1] if out.ndim else 0
    if channels < UNIT * columns or channels % UNIT:
        raise InputError(f"out must have a multiple of {UNIT} channels, at least {UNIT * columns}, got {tuple(out.shape)}")
    _check("out", out, (*expected, channels), x.dtype, x)
    n, height, width, _ = x.shape
    numbers = (n, height, width, steps, columns, channels, 2 if upsample else 3, phases, activation)
    return dict(zip(SIZES, numbers, strict=True))


def image_sizes(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, activation: int, product: int
) -> dict[str, int]:
    """The sizes of an image's layer, after its launcher's checks."""
    steps = _check_input(x, activation, product)
    if bias.ndim != 1 or not 1 <= len(bias) <= 4:
        raise InputError(f"bias must have 1 to 4 channels, got shape {tuple(bias.shape)}")
    columns, (n, height, width, _) = cover(9 * len(bias), UNIT), x.shape
    _check("bias", bias, (len(bias),), torch.float32, x, whole=False)
    _check("weights", weights, (1, steps, 1, columns, 32, 16 // x.element_size()), x.dtype, x)
    _check("out", out, (n, len(bias), height, width), x.dtype, x, whole=False)
    # One tap: the nine are a part of the columns.
    return dict(zip(SIZES, (n, height, width, steps, columns, len(bias), 1, 1, activation), strict=True))


def _check_input(x, activation, product):
    if not 0 <= product < len(PRODUCTS):
        raise InputError(f"product must be an index into {PRODUCTS}, got {product}")
    if activation not in (0, 1, TANH):
        raise InputError(f"activation must be 0, 1 or 2, got {activation}")
    if x.ndim != 4 or x.shape[3] % UNIT or min(x.shape[1:]) < 1:
        raise InputError(f"x must have shape (N, H, W, C) with channels in units of {UNIT}, got {tuple(x.shape)}")
    if max(x.shape) >= MOST_TILES:
        raise InputError(f"x must have sides below 2^30, got {tuple(x.shape)}")
    _check("x", x, x.shape, DTYPES.get(PRODUCTS[product], torch.float32), x)
    return x.shape[3] * x.element_size() // STEP


def _check(name, tensor, shape, dtype, x, whole=True):
    """``whole``: read or written in vectors of 16 bytes."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise InputError(f"{name} must be {dtype} of shape {tuple(shape)}, got {tensor.dtype} of {tuple(tensor.shape)}")
    if not tensor.is_contiguous() or tensor.device != x.device:
        raise InputError(f"{name} must be contiguous and on x's device")
    if whole and tensor.data_ptr() % 16:
        raise InputError(f"{name} must begin at a multiple of 16 bytes")


def plan_device(device: torch.device) -> dict[str, int]:
    """Limits of a device that plans use: its multiprocessors, and bytes of shared memory that a block may have."""
    limits = device_limits(device) if device.type == "cuda" else (MULTIPROCESSORS, SHARED_LIMIT)
    return dict(zip(("multiprocessors", "shared_limit"), limits))


def layer_plan(**sizes: int) -> dict[str, int]:
    """``conv_layer_plan`` of ``csrc/cuda/conv_block.h``: the fields of :data:`PLAN`."""
    return dict(_layer_plan(tuple(sizes.values()), tuple(sizes)))


@functools.lru_cache(1024)
def _layer_plan(values, names):
    sizes = dict(zip(names, values))
    plans = [plan for plan in map(functools.partial(layer_try, sizes), layer_candidates(sizes)) if plan]
    if not plans or min(plans, key=lambda plan: plan[0])[1]["tiles"] >= MOST_TILES:
        raise InputError(f"no tile of such a layer fits the device: {sizes}")
    return min(plans, key=lambda plan: plan[0])[1]


def layer_candidates(sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """``(shape, channel_warps, parts, resident)`` of every plan that may suit a layer, in the order of comparison."""
    best, powers = _best_columns(sizes["columns"]), [2**i for i in range(4)]
    every = itertools.product(range(len(SHAPES)), powers, powers, (1, 0))
    return [candidate for candidate in every if _suits(sizes, best, *candidate[:3])]


def _suits(sizes, best, shape, channel_warps, parts):
    rows, columns, _ = SHAPES[shape]
    if rows * columns > 1 and (parts > 1 or sizes["activation"] == TANH):
        return False
    if rows == 4 and columns != best:
        return False
    return (channel_warps == 1 or columns * channel_warps // 2 < sizes["columns"]) and parts * channel_warps <= WARPS


def _best_columns(columns):
    return min((4, 3, 2, 1), key=lambda c: cover(columns, c) * (c + 4))


def layer_try(sizes: Mapping[str, int], candidate: Sequence[int]) -> tuple[float, dict[str, int]] | None:
    """A candidate's predicted cycles and its plan, or None."""
    shape, channel_warps, parts, resident = candidate
    rows, columns, most = SHAPES[shape]
    pixel_warps = WARPS // (channel_warps * parts)
    log_pixels = _log(16 * rows * pixel_warps)
    plan = {**dict(zip(PLAN, (shape, pixel_warps, channel_warps, parts))), **_tile(sizes, log_pixels)}
    if plan.pop("empty") and log_pixels > 4:
        return None
    plan["channel_blocks"] = cover(sizes["columns"], columns * channel_warps)
    weights = sizes["side"] ** 2 * columns * channel_warps * 512
    most = 1 if sizes["split"] and rows * columns >= 8 else most
    blocks = _fit(sizes, plan, most, resident, weights, WARPS * store_bytes(columns, sizes["element"]))
    if not blocks:
        return None
    turns = _share(sizes, plan, blocks, plan["channel_blocks"] * sizes["phases"])
    return _cost(sizes, plan, rows, columns, blocks, turns), plan


def store_bytes(columns: int, element: int) -> int:
    """``conv_store_bytes``: shared memory in which a warp turns results into vectors."""
    wide = 4 if columns == 1 else element
    return 16 * (16 * columns * wide + 8 * wide)


def _tile(sizes, log_pixels):
    log_width = min(_log(sizes["width"]), 5 if log_pixels >= 9 else 4, log_pixels)
    log_height = min(_log(sizes["height"]), log_pixels - log_width)
    images = 2 ** (log_pixels - log_width - log_height)
    return dict(
        log_height=log_height,
        log_width=log_width,
        tile_images=images,
        halo_height=2**log_height + sizes["side"] - 1,
        halo_width=2**log_width + sizes["side"] - 1,
        tile_rows=cover(sizes["height"], 2**log_height),
        tile_columns=cover(sizes["width"], 2**log_width),
        empty=images > 1 and images > 2 ** _log(sizes["images"]),
    )


def _halo(plan):
    return plan["tile_images"] * plan["halo_height"] * plan["halo_width"]


def _fit(sizes, plan, most_blocks, resident, weights, before):
    """Fills in chunks, stages and places; the number of blocks on a multiprocessor, or 0."""
    steps, place = sizes["steps"], before + (sizes["steps"] * weights if resident else 0)
    for blocks, least, chunk in itertools.product(range(most_blocks, 0, -1), (3, 2), (4, 3, 2, 1)):
        room = (sizes["shared_limit"] + 1024) // blocks - 1024 - place
        stage = _halo(plan) * (32 * chunk + 16) + (0 if resident else chunk * weights)
        if steps % chunk == 0 and room >= least * stage:
            stages = clamp(room // stage, 4)
            plan.update(chunk=chunk, chunks=steps // chunk, stages=stages, resident=resident)
            plan.update(stages_place=place, stage_bytes=stage, shared_bytes=place + stages * stage)
            return blocks
    return 0


def _share(sizes, plan, blocks, per_tile):
    """Fills in tiles and who walks over them; turns of a block."""
    tiles = cover(sizes["images"], plan["tile_images"]) * plan["tile_rows"] * plan["tile_columns"]
    turns = cover(tiles, clamp(blocks * sizes["multiprocessors"] // per_tile, tiles))
    plan.update(tiles=clamp(tiles, MOST_TILES), walkers=cover(tiles, turns))
    return turns


def _cost(sizes, plan, rows, columns, blocks, turns):
    """Predicted cycles: see ``conv_cost``."""
    taps = sizes["side"] ** 2
    work = cover(sizes["steps"] * taps, plan["parts"])
    grid = plan["walkers"] * plan["channel_blocks"] * sizes["phases"]
    active = clamp(cover(grid, sizes["multiprocessors"]), blocks)
    rounds = turns * cover(grid, active * sizes["multiprocessors"])
    products, reads = work * rows * columns * (72 if sizes["split"] else 24), work * (rows + columns) * 32
    weights = sizes["steps"] * taps * columns * plan["channel_warps"] * 512
    made = 256 * rows * plan["pixel_warps"] * columns * plan["channel_warps"] * sizes["element"]
    moved = _halo(plan) * sizes["steps"] * 32 + made + (0 if plan["resident"] else weights)
    busiest = max(active * max(products, reads, moved // 16), 40 * work)
    return rounds * (busiest + active * moved // 64 + 600) + (active * weights // 16 if plan["resident"] else 0)


def image_plan(**sizes: int) -> dict[str, int]:
    """``conv_image_plan`` of ``csrc/cuda/conv_block.h``: the fields of :data:`PLAN`."""
    plan = dict(
        shape=sizes["columns"] - 1,
        **dict(pixel_warps=WARPS, channel_warps=1, parts=1, channel_blocks=1),
        **dict(log_height=3, log_width=5, tile_images=1, halo_height=10, halo_width=34),
        tile_rows=cover(sizes["height"], 8),
        tile_columns=cover(sizes["width"], 32),
    )
    blocks = _fit(sizes, plan, 2, 0, sizes["columns"] * 512, 9 * sizes["channels"] * IMAGE_PLANE * 4)
    if not blocks:
        raise InputError(f"no tile of such an image fits the device: {sizes}")
    _share(sizes, plan, blocks, 1)
    if plan["tiles"] >= MOST_TILES:
        raise InputError(f"x has too many pixels for one launch: {sizes}")
    return plan


def _log(n):
    return (n - 1).bit_length()
