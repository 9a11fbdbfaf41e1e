"""Philox words and normals in Triton.

One program draws BLOCK blocks of four elements of one sample (programs run over samples x block tiles along one grid axis, with
64-bit offsets). The four words of a block land in four registers, so the stores are four strided ones; a normal costs one
Philox call per four elements. The rounds are written out rather than taken from ``tl.philox``: the counter's layout is ours.
"""

import torch
import triton
import triton.language as tl

BLOCK = 256
# A seed or a count that happens to be 1 must not become a compile-time constant.
SCALARS = ["key", "stream_step", "count", "tiles"]


@triton.jit
def _multiply(a, b):
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _rounds(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def draw(indices, sample, block, key, stream_step):
    """Four words for each of a sample's blocks."""
    index = tl.load(indices + sample).to(tl.uint64)
    key = tl.cast(key, tl.uint64)
    c0 = block.to(tl.uint32)
    zero = c0 ^ c0
    c1, c2 = zero + index.to(tl.uint32), zero + (index >> 32).to(tl.uint32)
    c3 = zero + tl.cast(stream_step, tl.uint32)
    k0, k1 = zero + key.to(tl.uint32), zero + (key >> 32).to(tl.uint32)
    return _rounds(c0, c1, c2, c3, k0, k1)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of an angle in [0, 2 pi], as in csrc/cuda/normals.cuh: the library's functions need a stack frame."""
    quarter = tl.fma(angle, 0.636619772367581, 0.5).to(tl.int32)
    turns = quarter.to(tl.float32)
    r = tl.fma(turns, -4.83826794897e-4, tl.fma(turns, -1.5703125, angle))
    w = r * r
    s = tl.fma(w, 2.75573192e-6, -1.98412698e-4)
    s = tl.fma(tl.fma(s, w, 8.33333333e-3), w, -0.166666667)
    s = tl.fma(s * w, r, r)
    c = tl.fma(w, -2.75573192e-7, 2.48015873e-5)
    c = tl.fma(tl.fma(c, w, -1.38888889e-3), w, 4.16666667e-2)
    c = tl.fma(tl.fma(c, w, -0.5), w, 1.0)
    odd = (quarter & 1) != 0
    a, b = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -a, a), tl.where((quarter & 2) != 0, -b, b)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words."""
    u1 = ((radius_word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8
    u2 = (angle_word >> 8).to(tl.float32) * 5.9604644775390625e-8
    radius = tl.sqrt_rn(-2.0 * tl.log(u1))
    cosine, sine = _cos_sin(6.2831854820251465 * u2)
    return radius * cosine, radius * sine


@triton.jit
def _store(out, offset, left, v0, v1, v2, v3):
    tl.store(out + offset, v0, mask=left > 0)
    tl.store(out + offset + 1, v1, mask=left > 1)
    tl.store(out + offset + 2, v2, mask=left > 2)
    tl.store(out + offset + 3, v3, mask=left > 3)


@triton.jit(do_not_specialize=SCALARS)
def words_kernel(indices, out, key, stream_step, count, tiles, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    block = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = draw(indices, sample, block, key, stream_step)
    left = count - 4 * block
    offset = sample * count + 4 * block
    _store(out, offset, left, w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64))


@triton.jit(do_not_specialize=SCALARS)
def normal_kernel(indices, out, key, stream_step, count, tiles, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    block = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = draw(indices, sample, block, key, stream_step)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    _store(out, sample * count + 4 * block, count - 4 * block, n0, n1, n2, n3)


def philox_words(indices: torch.Tensor, seed: int, stream: int, step: int, out: torch.Tensor) -> None:
    """Launcher of ``advkd::philox_words``: fills ``out``, int64."""
    _launch(words_kernel, indices, seed, stream, step, out)


def philox_normal(indices: torch.Tensor, seed: int, stream: int, step: int, out: torch.Tensor) -> None:
    """Launcher of ``advkd::philox_normal``: fills ``out``, float32."""
    _launch(normal_kernel, indices, seed, stream, step, out)


def _launch(kernel, indices, seed, stream, step, out):
    if out.numel():
        count = out.numel() // len(out)
        tiles = triton.cdiv(count, 4 * BLOCK)
        with torch.cuda.device_of(out):
            kernel[(len(out) * tiles,)](indices, out, seed, stream << 24 | step, count, tiles, BLOCK=BLOCK)
