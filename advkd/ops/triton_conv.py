"""The student's convolutions on Triton: launchers that check their arguments, torch ops, and the choice of tiles.

The kernels are in ``kernels/conv_block.py``, their tiles in ``kernels/conv_tiles.py``. Importing this module imports Triton.
"""

import torch
import torch.nn.functional as F
from torch.library import custom_op, triton_op, wrap_triton

from advkd.kernels.conv_block import (
    INTERPRETED,
    conv_kernel,
    descriptor_kernel,
    image_kernel,
    launch_descriptor,
    launch_image,
    launch_layer,
)
from advkd.kernels.conv_tiles import (
    DESCRIPTORS_SINCE,
    PROCESSORS,
    SHARED,
    Config,
    DescriptorConfig,
    ImageConfig,
    ceil,
    descriptor_gap,
    descriptor_table,
    image_table,
    table,
)

from ..errors import BackendUnavailableError, InputError
from .conv_layer import ACTIVATIONS, ConvLayer
from .gpu_storage import UNIT, input_channels, pad_layer, padded, product_of, round_tf32

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""Arithmetic of float32 products: in full without tensor cores, as TensorFloat-32, in full as three products of those."""

IMAGE_COLUMNS = 16
"""Output channels of the image's product: a tensor core has no fewer."""


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
    layer = ConvLayer(weight.shape[1], weight.shape[0], x.shape[2], x.shape[3], upsample, activation)
    if precision is None:
        precision = "tf32" if product_of(x.dtype) == "tf32" else "tf32x3"
    taps, bias = pad_layer(weight, bias, layer)
    weights = pack_weights(taps, x.dtype, precision)
    x = F.pad(x.permute(0, 2, 3, 1), (0, weights.shape[2] - layer.c_in)).contiguous()
    code, config = ACTIVATIONS.index(activation), list(default(layer, len(x), x.dtype, precision))
    if has_few_channels(layer):
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
    _check_layer(x, weights, bias, out, upsample, precision)
    launch_layer(kernel, x, weights, bias, out, upsample, activation, slope, precision, config)
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
    _check_image(x, weights, bias, out, precision)
    launch_image(kernel, x, weights, bias, out, activation, slope, precision, config)
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
    _check_layer(x, weights, bias, out, upsample, precision)
    launch_layer(conv_kernel, x, weights, bias, out, upsample, activation, slope, precision, config)


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
    _check_layer(x, weights, bias, out, upsample, precision)
    _check_descriptors(x, weights)
    launch_descriptor(descriptor_kernel, x, weights, bias, out, upsample, activation, slope, config)


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
    _check_image(x, weights, bias, out, precision)
    launch_image(image_kernel, x, weights, bias, out, activation, slope, precision, config)


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


def has_few_channels(layer: ConvLayer) -> bool:
    """True if :func:`conv_image` computes a layer, whatever its activation."""
    return layer.c_out <= 4 and not layer.upsample


def configs(
    layer: ConvLayer, batch: int, dtype: torch.dtype, precision: str = "tf32", shared: int = SHARED
) -> tuple[Config | ImageConfig, ...]:
    """Configurations worth measuring for a :class:`advkd.ops.conv_layer.ConvLayer`, the most promising first, at most 8.

    ``shared``: bytes of shared memory available to a block.
    """
    c_in = input_channels(layer)
    if has_few_channels(layer):
        return tuple(sorted(image_table(dtype, precision, c_in), key=lambda tile: _image_cost(tile, layer, batch)))
    # Barriers and the like take a few bytes more.
    tiles = [tile for tile in dict.fromkeys(table(dtype, precision, c_in)) if tile.shared(dtype) + 1024 <= shared]
    return tuple(sorted(tiles, key=lambda tile: _cost(tile, layer, batch))[:8])


def descriptor_configs(
    layer: ConvLayer, batch: int, dtype: torch.dtype, capability: tuple[int, int], shared: int
) -> tuple[DescriptorConfig, ...]:
    """Configurations of :func:`conv_descriptor` worth measuring for a layer, the most promising first, at most 4, or none.

    ``capability``: the device's compute capability; ``shared``: bytes of shared memory available to a block.
    """
    if has_few_channels(layer) or descriptor_gap(dtype, capability):
        return ()
    known = dict.fromkeys(descriptor_table(input_channels(layer)))
    # A tile larger than an image computes pixels that do not exist; barriers and the like take a few bytes more.
    tiles = [tile for tile in known if tile.rows <= layer.height and tile.columns <= layer.width]
    tiles = [tile for tile in tiles if tile.shared(dtype) + 1024 <= shared]
    return tuple(sorted(tiles, key=lambda tile: _descriptor_cost(tile, layer, batch))[:4])


def default(layer: ConvLayer, batch: int, dtype: torch.dtype, precision: str = "tf32") -> Config | ImageConfig:
    """The configuration taken without a measurement; it runs on every GPU since sm_80."""
    return configs(layer, batch, dtype, precision)[0]


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


def _check_image(x, weights, bias, out, precision):
    _check(x, weights, bias, (1, 9), precision)
    _check_out(out, x, x.shape[:3], (out.shape[0], *out.shape[2:]))
    c_out, channels = weights.shape[3], out.shape[1]
    if c_out != IMAGE_COLUMNS or channels > c_out:
        raise InputError(f"an image has at most {IMAGE_COLUMNS} channels, padded to as many, got {channels} and {c_out}")


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


def _cost(tile, layer, batch):
    """Relative time: waves over all multiprocessors times a tile's products, loads and overhead."""
    programs = (4 if layer.upsample else 1) * ceil(batch * layer.height * layer.width, tile.pixels)
    programs *= ceil(padded(layer.c_out), tile.columns)
    return ceil(programs, PROCESSORS) * (tile.pixels + 16) * (tile.columns + 16)


def _image_cost(tile, layer, batch):
    programs = batch * ceil(layer.height, tile.rows) * ceil(layer.width, tile.columns)
    return ceil(programs, PROCESSORS) * (tile.rows + 2) * (tile.columns + 2)


def _descriptor_cost(tile, layer, batch):
    """As :func:`_cost`, for two-dimensional tiles."""
    programs = (4 if layer.upsample else 1) * batch * ceil(layer.height, tile.rows) * ceil(layer.width, tile.columns)
    programs *= ceil(padded(layer.c_out), tile.channels)
    return ceil(programs, PROCESSORS) * (tile.rows * tile.columns + 16) * (tile.channels + 16)
