// From a critic's input gradient to the penalty and its derivative, on NVIDIA GPUs, in two kernels of one grid: `parts` blocks
// per sample, whose threads take groups of eight elements in turn, in vectors of 16 bytes where alignment allows it.
// The first writes each block's sum of squares; the second begins by adding up its sample's sums, every block in the same
// order, and scales the block's elements. No atomics: equal bits on every call, and for a sample alone as in a batch.
// NVRTC compiles this file as it is.

#include "cuda/penalty_reduce.h"

#include "cuda/kernel.h"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"

namespace advkd {

// A block's work: its threads' first group of elements, and the distance to their next.
struct Part {
  i64 sample, offset, stride;
  int number;
};

ADVKD_INLINE Part part_of(const PenaltyParameters& p) {
  const i64 sample = static_cast<i64>(blockIdx.x) / p.parts;
  const int number = static_cast<int>(blockIdx.x - sample * p.parts);
  const i64 thread = static_cast<i64>(number) * kThreads + threadIdx.x;
  return {sample, thread * 8, static_cast<i64>(p.parts) * kThreads * 8, number};
}

template <typename T>
ADVKD_INLINE void penalty_sums(const PenaltyParameters& p) {
  const Part part = part_of(p);
  float sum[1] = {};
  for (i64 offset = part.offset; offset < p.length; offset += part.stride) {
    float g[8], squares[8];
    load<T>(p.g, span(part.sample * p.length + offset, p.length - offset, 8, p.vectors), g);
    for (int i = 0; i < 8; ++i) squares[i] = g[i] * g[i];
    sum[0] += ((squares[0] + squares[1]) + (squares[2] + squares[3])) + ((squares[4] + squares[5]) + (squares[6] + squares[7]));
  }
  block_reduce<Add>(sum, 1, kThreads);
  if (threadIdx.x == 0) p.partials[part.sample * p.parts + part.number] = sum[0];
}

// A sample's penalty, and the factor from its gradient to the penalty's derivative.
ADVKD_INLINE float penalty_of(const PenaltyParameters& p, float squares, float& factor) {
  if (p.mode == 2) {
    factor = p.share;
    return __fmul_rn(0.5f * p.share, squares);
  }
  const float norm = __fsqrt_rn(squares);
  float excess = __fadd_rn(norm, -p.target);
  // A comparison rather than fmaxf: NaN must survive.
  if (p.mode == 1 && excess < 0.0f) excess = 0.0f;
  factor = norm == 0.0f ? 0.0f : __fdiv_rn(__fmul_rn(2.0f * p.share, excess), norm);
  return __fmul_rn(p.share, __fmul_rn(excess, excess));
}

template <typename T>
ADVKD_INLINE void penalty_apply(const PenaltyParameters& p) {
  __shared__ float shared;
  const Part part = part_of(p);
  const int thread = threadIdx.x;
  float sum[1] = {thread < p.parts ? p.partials[part.sample * p.parts + thread] : 0.0f};
  block_reduce<Add>(sum, 1, kThreads);
  if (thread == 0) {
    const float penalty = penalty_of(p, sum[0], shared);
    if (part.number == 0) p.penalties[part.sample] = penalty;
  }
  __syncthreads();
  const float factor = shared;
  for (i64 offset = part.offset; offset < p.length; offset += part.stride) {
    const Span at = span(part.sample * p.length + offset, p.length - offset, 8, p.vectors);
    float g[8];
    load<T>(p.g, at, g);
    for (int i = 0; i < 8; ++i) g[i] = __fmul_rn(factor, g[i]);
    store<T>(p.out, at, g);
  }
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_DTYPES
#endif
#define ADVKD_PENALTY(KIND, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kThreads) advkd_penalty_##KIND##_##T(const PenaltyParameters p) { \
    penalty_##KIND<T>(p);                                                                                        \
  }                                                                                                              \
  ADVKD_KERNEL(advkd_penalty_##KIND##_##T)
#define ADVKD_PENALTY_ENTRIES(T) ADVKD_PENALTY(sums, T) ADVKD_PENALTY(apply, T)
ADVKD_VARIANTS(ADVKD_PENALTY_ENTRIES)

}  // namespace advkd
