"""Points between real and generated samples; the specification is ``advkd.ops.interpolate.interpolate_reference``.

A program takes BLOCK elements of one sample in the order of memory, in vectors of 16 bytes where samples begin at whole ones
(Triton compiles sizes that sixteen divides separately). A sample has one weight: a program loads it, or draws it with a single
Philox call, whose hundred instructions are spread over the sixteen elements of each thread. With three parts in the output
(MERGE) the two inputs, which the program holds anyway, are written beside the point between them, so nothing is read twice.
"""

import torch
import triton
import triton.language as tl

from ..runtime.sources import STREAMS
from .philox import draw

BLOCK = 2048
# A seed or a step that happens to be 1 must not become a compile-time constant. The size may: it carries the alignment.
SCALARS = ["key", "stream_step", "step_stride", "samples", "tiles"]


@triton.jit
def _weight(a, indices, steps, step_stride, sample, key, stream_step):
    if a is not None:
        return tl.load(a + sample)
    else:
        if steps is not None:
            stream_step = stream_step | tl.load(steps + sample * step_stride)
        word, _, _, _ = draw(indices, sample, sample - sample, key, stream_step)
        return (word >> 8).to(tl.float32) * 5.9604644775390625e-8


@triton.jit(do_not_specialize=SCALARS)
def interpolate_kernel(
    real, fake, a, indices, steps, out, key, stream_step, step_stride, samples, count, tiles,
    MERGE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    element = (tl.program_id(0) % tiles).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    weight = _weight(a, indices, steps, step_stride, sample, key, stream_step)
    left = tl.load(real + sample * count + element, mask=inside)
    right = tl.load(fake + sample * count + element, mask=inside)
    if MERGE:
        tl.store(out + sample * count + element, left, mask=inside)
        tl.store(out + (samples + sample) * count + element, right, mask=inside)
        sample += 2 * samples
    between = weight * left.to(tl.float32) + (1.0 - weight) * right.to(tl.float32)
    tl.store(out + sample * count + element, between.to(out.dtype.element_ty), mask=inside)


def interpolate(
    real: torch.Tensor,
    fake: torch.Tensor,
    a: torch.Tensor | None,
    indices: torch.Tensor | None,
    seed: int,
    step: int,
    steps: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launcher of ``advkd::interpolate``."""
    count = real.numel() // len(real)
    tiles = triton.cdiv(count, BLOCK)
    index = tl.int32 if tiles * BLOCK < 2**31 else tl.int64
    step_stride = int(steps is not None and steps.numel() > 1)
    scalars = (seed, STREAMS["interpolation"] << 24 | (step if steps is None else 0), step_stride, len(real), count, tiles)
    options = {"MERGE": len(out) > len(real), "INDEX": index, "BLOCK": BLOCK, "enable_fp_fusion": False}
    with torch.cuda.device_of(real):
        interpolate_kernel[(len(real) * tiles,)](real, fake, a, indices, steps, out, *scalars, **options)
