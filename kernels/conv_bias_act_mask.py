"""Bias, LeakyReLU and its mask in one pass; the specification is ``advkd.ops.conv_bias_act_mask.conv_bias_act_mask_reference``.

The tiles are those of ``mask_mul``: BLOCK elements of one sample in the order of memory, eight to a row, and a row's signs are
added up to a byte inside a thread or between two neighbours. An element's channel comes from its offset in the sample: its
plane, or, where channels are fastest, the remainder modulo their number. A division per element costs more than the element's
memory traffic, so there is one per row where planes or channels are whole rows (ROWS).
"""

import torch
import triton
import triton.language as tl

from .mask_mul import SCALARS, blocks, tile


@triton.jit
def _channel(byte, element, divisor, FASTEST: tl.constexpr, ROWS: tl.constexpr):
    """Channels of the elements, or one per row where that is enough; ``divisor`` is C where channels are fastest, else H W."""
    if FASTEST and ROWS:
        return (8 * byte % divisor)[:, None] + tl.arange(0, 8)[None, :]
    elif FASTEST:
        return element % divisor
    elif ROWS:
        return (8 * byte // divisor)[:, None]
    else:
        return element // divisor


@triton.jit(do_not_specialize=SCALARS)
def bias_act_mask_kernel(
    p, bias, out, mask, slope, divisor, count, tiles,
    FASTEST: tl.constexpr, ROWS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, byte, element = tile(tiles, INDEX, BLOCK)
    inside = element < count
    # Zero beyond the sample's end, bias and all: the last byte's spare bits are zero.
    values = tl.load(p + sample * count + element, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        channel = _channel(byte, element, divisor, FASTEST, ROWS)
        present = (8 * byte < count)[:, None] if ROWS else inside
        values += tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)
    positive = values > 0
    bits = tl.sum(positive.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask + sample * ((count - 1) // 8 + 1) + byte, bits.to(tl.uint8), mask=8 * byte < count)
    values = tl.where(positive, values, slope * values)
    tl.store(out + sample * count + element, values.to(out.dtype.element_ty), mask=inside)


def conv_bias_act_mask(p: torch.Tensor, bias: torch.Tensor | None, slope: float, out: torch.Tensor, mask: torch.Tensor) -> None:
    """Launcher of ``advkd::conv_bias_act_mask``."""
    grid, tiling = blocks(p)
    with torch.cuda.device_of(p):
        bias_act_mask_kernel[grid](p, bias, out, mask, slope, **channels(p), **tiling)


def channels(p: torch.Tensor) -> dict[str, int | bool]:
    """Kernel arguments that locate an element's channel; they do not matter without a bias."""
    plane = p[0, 0].numel() if p.ndim > 1 else 1
    fastest = plane == 1 or not p.is_contiguous()
    divisor = p.shape[1] if fastest and p.ndim > 1 else plane
    return {"divisor": divisor, "FASTEST": fastest, "ROWS": divisor % 8 == 0}
