// Philox normals on NVIDIA GPUs. One thread draws one block: four words, two Box-Muller pairs, four neighbouring elements, stored
// as one 16-byte vector where the sample's base allows it. The grid strides over samples * blocks with 64-bit arithmetic, so that
// no tensor is too large. logf, sincosf and sqrtf are the accurate ones (no fast-math): normals stay within 2e-6 of the other
// backends. No Torch and no standard library here: NVRTC compiles this file as it is.

#include "common/philox.h"

namespace advkd {

ADVKD_INLINE void block_words(const i64* indices, i64 sample, i64 block, const PhiloxParameters& p, u32 c[4]) {
  const u64 index = static_cast<u64>(indices[sample]);
  c[0] = static_cast<u32>(block);
  c[1] = static_cast<u32>(index);
  c[2] = static_cast<u32>(index >> 32);
  c[3] = p.stream_step;
  philox_rounds(c, p.key0, p.key1);
}

ADVKD_INLINE void box_muller(u32 radius_word, u32 angle_word, float* out) {
  const float u1 = static_cast<float>((radius_word >> 8) + 1) * 5.9604644775390625e-8f;
  const float u2 = static_cast<float>(angle_word >> 8) * 5.9604644775390625e-8f;
  const float radius = __fsqrt_rn(__fmul_rn(-2.0f, logf(u1)));
  float sine, cosine;
  sincosf(__fmul_rn(6.28318530717958647f, u2), &sine, &cosine);
  out[0] = __fmul_rn(radius, cosine);
  out[1] = __fmul_rn(radius, sine);
}

extern "C" __global__ void advkd_philox_words(const i64* indices, i64 samples, PhiloxParameters p, i64* out) {
  const i64 blocks = (p.count + 3) / 4;
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 item = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; item < samples * blocks; item += stride) {
    const i64 sample = item / blocks, block = item % blocks;
    u32 c[4];
    block_words(indices, sample, block, p, c);
    for (int j = 0; j < 4; ++j)
      if (4 * block + j < p.count) out[sample * p.count + 4 * block + j] = c[j];
  }
}

extern "C" __global__ void advkd_philox_normal(const i64* indices, i64 samples, PhiloxParameters p, float* out) {
  const i64 blocks = (p.count + 3) / 4;
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 item = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; item < samples * blocks; item += stride) {
    const i64 sample = item / blocks, block = item % blocks;
    u32 c[4];
    block_words(indices, sample, block, p, c);
    float normal[4];
    box_muller(c[0], c[1], normal);
    box_muller(c[2], c[3], normal + 2);
    float* place = out + sample * p.count + 4 * block;
    if (p.count % 4 == 0) {
      *reinterpret_cast<float4*>(place) = make_float4(normal[0], normal[1], normal[2], normal[3]);
    } else {
      for (int j = 0; j < 4; ++j)
        if (4 * block + j < p.count) place[j] = normal[j];
    }
  }
}

}  // namespace advkd
