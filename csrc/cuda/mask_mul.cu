// LeakyReLU's derivative from a one-bit mask on NVIDIA GPUs. A thread takes one byte of the mask and its eight elements, read
// and written in vectors of 16 bytes where alignment allows it. Threads run over samples x bytes with 64-bit arithmetic: every
// sample begins a byte of its own, and its last thread may have fewer than eight elements.
// Numbers that the mask lets pass keep their bits; the rest is scaled in float32 and rounded once.
// No Torch and no standard library here: NVRTC compiles this file as it is.

#include "cuda/mask_mul.h"

#include "cuda/block.h"
#include "cuda/kernel.h"
#include "cuda/storage.cuh"

namespace advkd {

template <typename T>
ADVKD_INLINE void mask_mul(const MaskMulParameters& p) {
  const i64 bytes = (p.length + 7) / 8, item = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const i64 sample = item / bytes, offset = (item - sample * bytes) * 8;
  if (sample >= p.samples) return;
  const Span at = span(sample * p.length + offset, p.length - offset, 8, p.vectors);
  const unsigned mask = p.mask[item];
  auto group = load_bits<T, 8>(p.x, at);
  for (int i = 0; i < 8; ++i)
    if (!(mask >> i & 1u)) group.bits[i] = T::encode(__fmul_rn(p.slope, T::decode(group.bits[i])));
  store_bits<T>(p.out, at, group);
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_DTYPES
#endif
#define ADVKD_MASK_MUL(T)                                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads) advkd_mask_mul_##T(const MaskMulParameters p) { \
    mask_mul<T>(p);                                                                                      \
  }                                                                                                      \
  ADVKD_KERNEL(advkd_mask_mul_##T)
ADVKD_VARIANTS(ADVKD_MASK_MUL)

}  // namespace advkd
