"""LeakyReLU's derivative from a one-bit mask, in Triton; the specification is ``advkd.ops.mask_mul.mask_mul_reference``.

A program takes BLOCK elements of one sample in the order of memory, as BLOCK / 8 rows of eight: a row is a byte of the mask.
A thread holds four or eight neighbours of a row, which it loads and stores as 16 bytes where a sample's size is a multiple of
sixteen elements (Triton compiles such sizes separately), and reads their bits from the one byte that its row's threads share.
Where samples do not begin at whole vectors the same code works element by element. Offsets of samples have 64 bits; those of
elements within a sample have 32 where that is enough.
"""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048
# The number of a sample's tiles must not become a compile-time constant when it is 1.
SCALARS = ["tiles"]


@triton.jit
def tile(tiles, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample, its bytes of the mask, and their elements, one row of eight per byte."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    byte = (program % tiles).to(INDEX) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    return sample, byte, 8 * byte[:, None] + tl.arange(0, 8)[None, :]


@triton.jit(do_not_specialize=SCALARS)
def mask_mul_kernel(x, mask, out, slope, count, tiles, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    sample, byte, element = tile(tiles, INDEX, BLOCK)
    inside = element < count
    values = tl.load(x + sample * count + element, mask=inside).to(tl.float32)
    bits = tl.load(mask + sample * ((count - 1) // 8 + 1) + byte, mask=8 * byte < count).to(tl.int32)
    positive = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    values = tl.where(positive != 0, values, slope * values)
    tl.store(out + sample * count + element, values.to(out.dtype.element_ty), mask=inside)


def mask_mul(x: torch.Tensor, mask: torch.Tensor, slope: float, out: torch.Tensor) -> None:
    """Launcher of ``advkd::mask_mul``."""
    grid, tiling = blocks(x)
    with torch.cuda.device_of(x):
        mask_mul_kernel[grid](x, mask, out, slope, **tiling)


def blocks(x: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid over a dense tensor's samples in blocks, and the kernel arguments that go with it."""
    count = x.numel() // len(x)
    tiles = triton.cdiv(count, BLOCK)
    index = tl.int32 if tiles * BLOCK < 2**31 else tl.int64
    options = {"BLOCK": BLOCK, "INDEX": index, "enable_fp_fusion": False}
    return (len(x) * tiles,), {"count": count, "tiles": tiles, **options}
