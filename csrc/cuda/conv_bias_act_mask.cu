// Bias, LeakyReLU and the sign of what went into it, on NVIDIA GPUs. A thread takes eight elements of a sample, neighbours in
// memory, in vectors of 16 bytes where alignment allows it, and writes one byte of the mask. Threads run over samples x bytes
// with 64-bit arithmetic: every sample begins a byte of its own, and the bits after its last element are zero.
// Eight biases are one value inside a plane, a vector where channels are neighbours, else looked up one by one.
// Every product and sum is rounded by itself, as in the reference. NVRTC compiles this file as it is.

#include "cuda/conv_bias_act_mask.h"

#include "cuda/block.h"
#include "cuda/kernel.h"
#include "cuda/storage.cuh"

namespace advkd {

// The biases of a sample's eight elements from `element` on.
template <typename T>
ADVKD_INLINE void biases(const ConvBiasActMaskParameters& p, i64 element, float (&to)[8]) {
  const i64 planes = element / p.inner;
  i64 channel = planes % p.channels, position = element - planes * p.inner;
  if (p.bias_vectors) {
    load<T>(p.bias, Span{channel, 8, true}, to);
    return;
  }
  const auto* bias = static_cast<const typename T::Bits*>(p.bias);
  float value = T::decode(bias[channel]);
  if (p.inner % 8 == 0) {
    for (int i = 0; i < 8; ++i) to[i] = value;
    return;
  }
  for (int i = 0; i < 8; ++i) {
    to[i] = value;
    if (++position < p.inner) continue;
    position = 0;
    channel = channel + 1 < p.channels ? channel + 1 : 0;
    value = T::decode(bias[channel]);
  }
}

template <typename T>
ADVKD_INLINE void conv_bias_act_mask(const ConvBiasActMaskParameters& p) {
  const i64 bytes = (p.length + 7) / 8, item = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const i64 sample = item / bytes, offset = (item - sample * bytes) * 8;
  if (sample >= p.samples) return;
  const Span at = span(sample * p.length + offset, p.length - offset, 8, p.vectors);
  float values[8], bias[8] = {};
  load<T>(p.p, at, values);
  if (p.bias) biases<T>(p, offset, bias);
  unsigned mask = 0;
  for (int i = 0; i < 8; ++i) {
    if (p.bias) values[i] = __fadd_rn(values[i], bias[i]);
    const bool positive = values[i] > 0.0f;
    mask |= positive && i < at.left ? 1u << i : 0u;
    if (!positive) values[i] = __fmul_rn(p.slope, values[i]);
  }
  store<T>(p.out, at, values);
  p.mask[item] = static_cast<unsigned char>(mask);
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_DTYPES
#endif
#define ADVKD_CONV_BIAS_ACT_MASK(T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads) advkd_conv_bias_act_mask_##T(const ConvBiasActMaskParameters p) { \
    conv_bias_act_mask<T>(p);                                                                                              \
  }                                                                                                                        \
  ADVKD_KERNEL(advkd_conv_bias_act_mask_##T)
ADVKD_VARIANTS(ADVKD_CONV_BIAS_ACT_MASK)

}  // namespace advkd
