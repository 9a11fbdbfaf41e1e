"""The student's convolutions as GPUs keep them: channels in whole units, batch norm folded, weights packed once per layer.

Activations are ``(N, H, W, C)`` with C a multiple of :data:`UNIT`, the channels beyond a layer's own being zeros: every pixel
begins on a vector of 16 bytes and every step of the sum is whole. Where detail bands of the latent enter, their channels follow
those of the layer before, in units of their own.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..errors import InputError
from .conv_layer import ConvLayer

UNIT = 16
"""Channels come in multiples of it."""

PRODUCTS = ("bf16", "f16", "tf32", "f32")
"""How numbers are multiplied: bfloat16 and float16 as they are stored, float32 rounded to TensorFloat-32 or in full."""

STEP = 32
"""Bytes of input channels that one tensor-core instruction sums over."""


def product_of(dtype: torch.dtype) -> str:
    """The name in :data:`PRODUCTS` for ``dtype``; float32 is TensorFloat-32 where torch's switch for convolutions says so."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "f32"
    names = {torch.bfloat16: "bf16", torch.float16: "f16"}
    if dtype not in names:
        raise InputError(f"the dtype must be float32, bfloat16 or float16 on a GPU's kernels, got {dtype}")
    return names[dtype]


def padded(channels: int) -> int:
    """``channels`` in whole units."""
    return -(-channels // UNIT) * UNIT


def input_channels(layer: ConvLayer) -> int:
    """Channels of a layer's stored input: those of the layer before, then those of the latent."""
    return padded(layer.c_in - layer.detail) + (padded(layer.detail) if layer.detail else 0)


def fold_taps(weight: torch.Tensor, upsample: bool) -> torch.Tensor:
    """``(phases, taps, C_in, C_out)`` of ``(C_out, C_in, 3, 3)``: one phase of nine taps, or four of four.

    Nearest-neighbour up-sampling and the convolution after it are four convolutions of the low-resolution input, one for each
    parity (a, b) of the output's row and column: along an axis the taps are (w0, w1 + w2) at rows (-1, 0) for parity 0 and
    (w0 + w1, w2) at rows (0, 1) for parity 1. Phase 2 a + b, tap 2 i + j; without up-sampling tap 3 i + j.
    """
    if not upsample:
        return weight.permute(2, 3, 1, 0).reshape(1, 9, *weight.shape[1::-1])
    fold = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    taps = torch.einsum("ocij,aui,bvj->abuvco", weight, fold, fold)
    return taps.reshape(4, 4, *weight.shape[1::-1])


def pad_layer(weight: torch.Tensor, bias: torch.Tensor, layer: ConvLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's taps and bias with channels in whole units: ``(phases, taps, C_in, C_out)`` and ``(C_out,)``, float32."""
    taps = fold_taps(weight.double(), layer.upsample).float()
    own, extra = layer.c_in - layer.detail, padded(layer.c_out) - layer.c_out
    parts = [taps[:, :, :own], taps[:, :, own:]] if layer.detail else [taps]
    parts = [F.pad(part, (0, extra, 0, padded(part.shape[2]) - part.shape[2])) for part in parts]
    return torch.cat(parts, 2).contiguous(), F.pad(bias.float(), (0, extra))


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 numbers rounded to TensorFloat-32, to nearest with ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)


def pack_fragments(taps: torch.Tensor, product: str) -> torch.Tensor:
    """Weights in the order in which a warp's lanes multiply them.

    Args:
        taps: ``(phases, taps, C_in, C_out)`` float32 of :func:`pad_layer`.
        product: one of :data:`PRODUCTS`.

    Returns:
        ``(phases, steps, taps, C_out / 16, 32, E)`` in the product's storage dtype, 16 bytes for each of 32 lanes: with
        g = lane / 4 and t = lane % 4 the words t and t + 4 of a step of channel 16 n + g, then those of channel 16 n + 8 + g
        (``csrc/cuda/warp.cuh``). A step is :data:`STEP` bytes of C_in.
    """
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(product, torch.float32)
    taps = round_tf32(taps) if product == "tf32" else taps.to(dtype)
    phases, count, c_in, c_out = taps.shape
    word = 4 // taps.element_size()
    steps = c_in * taps.element_size() // STEP
    parts = taps.reshape(phases, count, steps, 2, 4, word, c_out // 16, 2, 8)
    #                    phase   tap    step   half t element   n      m  g
    ordered = parts.permute(0, 2, 1, 6, 8, 4, 7, 3, 5)
    return ordered.reshape(phases, steps, count, c_out // 16, 32, 4 * word).contiguous()


def pack_image(taps: torch.Tensor, c_out: int, product: str) -> torch.Tensor:
    """Weights of the image's layer, whose few output channels would leave most of a tensor-core product empty.

    The nine taps' results stand side by side, output channel ``c_out * tap + channel``, as one product of the input's pixels
    that reads them once; the kernel then adds up nine neighbours. ``taps``: ``(1, 9, C_in, padded C_out)``; the result is
    :func:`pack_fragments` of one tap with ``9 * c_out`` channels in whole units.
    """
    columns = taps[0, :, :, :c_out].permute(1, 0, 2).reshape(taps.shape[2], 9 * c_out)
    columns = F.pad(columns, (0, padded(9 * c_out) - 9 * c_out))
    return pack_fragments(columns[None, None], product)


def stem_numbers(layers: Iterable[ConvLayer]) -> list[int]:
    """:class:`advkd.ops.conv_layer.ConvLayer` objects as ``student_stem`` takes them: a flat list, five numbers per layer."""
    rows = ((input_channels(i), padded(i.c_out), i.height, i.width, int(i.upsample)) for i in layers)
    return [number for row in rows for number in row]


def device_limits(device: torch.device) -> tuple[int, int]:
    """``(multiprocessors, bytes of shared memory that a block may have)`` of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
