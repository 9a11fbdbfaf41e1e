// Points between real and generated samples on NVIDIA GPUs. A thread takes eight elements of a sample, neighbours in memory,
// in vectors of 16 bytes where alignment allows it; with `merge` it also copies both inputs, bit for bit, which it has read
// anyway. Threads run over samples x groups of eight with 64-bit arithmetic. A weight that is drawn costs each thread one
// Philox call, which hides behind its memory traffic.
// Every product and sum is rounded by itself, as in the reference. NVRTC compiles this file as it is.

#include "cuda/interpolate.h"

#include "cuda/normals.cuh"
#include "cuda/block.h"
#include "cuda/kernel.h"
#include "cuda/storage.cuh"

namespace advkd {

ADVKD_INLINE float weight_of(const InterpolateParameters& p, i64 sample) {
  if (p.a) return p.a[sample];
  u32 words[4], stream_step = p.stream_step;
  if (p.steps) stream_step |= static_cast<u32>(p.steps[sample * p.step_stride]);
  draw_words(static_cast<u64>(p.indices[sample]), 0, p.key0, p.key1, stream_step, words);
  return static_cast<float>(words[0] >> 8) * 5.9604644775390625e-8f;
}

template <typename T>
ADVKD_INLINE void interpolate(const InterpolateParameters& p) {
  const i64 groups = (p.length + 7) / 8, item = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const i64 sample = item / groups, offset = (item - sample * groups) * 8, part = p.samples * p.length;
  if (sample >= p.samples) return;
  Span at = span(sample * p.length + offset, p.length - offset, 8, p.vectors);
  const auto real = load_bits<T, 8>(p.real, at), fake = load_bits<T, 8>(p.fake, at);
  const float a = weight_of(p, sample), rest = __fadd_rn(1.0f, -a);
  float between[8];
  for (int i = 0; i < 8; ++i)
    between[i] = __fadd_rn(__fmul_rn(a, T::decode(real.bits[i])), __fmul_rn(rest, T::decode(fake.bits[i])));
  if (p.merge) {
    store_bits<T>(p.out, at, real);
    at.place += part;
    store_bits<T>(p.out, at, fake);
    at.place += part;
  }
  store<T>(p.out, at, between);
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_DTYPES
#endif
#define ADVKD_INTERPOLATE(T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads) advkd_interpolate_##T(const InterpolateParameters p) { \
    interpolate<T>(p);                                                                                          \
  }                                                                                                             \
  ADVKD_KERNEL(advkd_interpolate_##T)
ADVKD_VARIANTS(ADVKD_INTERPOLATE)

}  // namespace advkd
