"""A gradient's penalties and their derivative; the specification is ``advkd.ops.penalty_reduce.penalty_reduce_reference``.

Two kernels, deterministic and without atomics. The first: a program adds up the squares of every ``parts``-th block of BLOCK
elements of one sample, lane by lane, then over the lanes, to one partial sum. The second: a program takes one block again, adds
up its sample's partial sums (at most PARTS, which lie in L2, in the same order in every program), and scales its elements.
R1's derivative needs no norm: the first kernel writes it while it reads, and the second only finishes the penalties.
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048
PARTS = 512
# Places in advkd.ops.penalty_reduce.MODES.
ONE_SIDED, R1 = tl.constexpr(1), tl.constexpr(2)
# How many blocks and parts a sample has must not become compile-time constants where it is one.
SCALARS = ["tiles", "parts"]


@triton.jit(do_not_specialize=SCALARS)
def squares_kernel(g, out, partial, share, count, tiles, parts, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    total = tl.zeros((BLOCK,), tl.float32)
    # Not range(): a tensor's range stops the interpreter of Triton 3.6 with NumPy 2.4.
    tile = part
    while tile < tiles:
        element = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        inside = element < count
        values = tl.load(g + sample * count + element, mask=inside, other=0.0).to(tl.float32)
        total += values * values
        if out is not None:
            tl.store(out + sample * count + element, (share * values).to(out.dtype.element_ty), mask=inside)
        tile += parts
    tl.store(partial + sample * parts + part, tl.sum(total))


@triton.jit(do_not_specialize=SCALARS)
def penalty_kernel(
    g, out, partial, penalties, target, share, count, tiles, parts,
    MODE: tl.constexpr, PARTS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    part = tl.arange(0, PARTS)
    squares = tl.sum(tl.load(partial + sample * parts + part, mask=part < parts, other=0.0))
    if MODE == R1:
        tl.store(penalties + sample, 0.5 * share * squares)
    else:
        norm = tl.sqrt_rn(squares)
        excess = norm - target
        if MODE == ONE_SIDED:
            # A comparison rather than max: NaN must survive.
            excess = tl.where(excess < 0, 0.0, excess)
        if tile == 0:
            tl.store(penalties + sample, share * (excess * excess))
        factor = tl.where(norm == 0, 0.0, tl.div_rn(2 * share * excess, norm))
        element = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        inside = element < count
        values = tl.load(g + sample * count + element, mask=inside).to(tl.float32)
        tl.store(out + sample * count + element, (factor * values).to(out.dtype.element_ty), mask=inside)


def penalty_reduce(
    g: torch.Tensor, target: float, weight: float, mode: int, out: torch.Tensor, penalties: torch.Tensor
) -> None:
    """Launcher of ``advkd::penalty_reduce``."""
    samples, count = len(g), g.numel() // len(g)
    tiles = triton.cdiv(count, BLOCK)
    parts = min(tiles, PARTS)
    index = tl.int32 if tiles * BLOCK < 2**31 else tl.int64
    options = {"INDEX": index, "BLOCK": BLOCK, "enable_fp_fusion": False}
    partial = torch.empty((samples, parts), dtype=torch.float32, device=g.device)
    share = weight / samples
    written, finishers = (out, 1) if mode == R1.value else (None, tiles)
    with torch.cuda.device_of(g):
        squares_kernel[(samples * parts,)](g, written, partial, share, count, tiles, parts, **options)
        options |= {"MODE": mode, "PARTS": triton.next_power_of_2(parts)}
        penalty_kernel[(samples * finishers,)](g, out, partial, penalties, target, share, count, finishers, parts, **options)
