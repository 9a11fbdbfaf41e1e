// Philox normals on NVIDIA GPUs. One thread draws one block: four words, two Box-Muller pairs, four neighbouring elements, stored
// as one 16-byte vector where the sample's base allows it. The grid strides over samples * blocks with 64-bit arithmetic, so that
// no tensor is too large. Logarithm and square root are the accurate ones (no fast-math): normals stay within 2e-6 of the other
// backends. No Torch and no standard library here: NVRTC compiles this file as it is.

#include "cuda/philox.h"

#include "cuda/kernel.h"
#include "cuda/normals.cuh"

namespace advkd {

extern "C" __global__ void advkd_philox_words(const DrawParameters parameters) {
  const PhiloxParameters& p = parameters.draw;
  const i64 samples = parameters.samples, blocks = (p.count + 3) / 4;
  auto* out = static_cast<i64*>(parameters.out);
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 item = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; item < samples * blocks; item += stride) {
    const i64 sample = item / blocks, block = item % blocks;
    u32 c[4];
    draw_words(static_cast<u64>(parameters.indices[sample]), block, p.key0, p.key1, p.stream_step, c);
    for (int j = 0; j < 4; ++j)
      if (4 * block + j < p.count) out[sample * p.count + 4 * block + j] = c[j];
  }
}
ADVKD_KERNEL(advkd_philox_words)

extern "C" __global__ void advkd_philox_normal(const DrawParameters parameters) {
  const PhiloxParameters& p = parameters.draw;
  const i64 samples = parameters.samples, blocks = (p.count + 3) / 4;
  auto* out = static_cast<float*>(parameters.out);
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 item = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; item < samples * blocks; item += stride) {
    const i64 sample = item / blocks, block = item % blocks;
    u32 c[4];
    draw_words(static_cast<u64>(parameters.indices[sample]), block, p.key0, p.key1, p.stream_step, c);
    float normal[4];
    normals_of(c, normal);
    float* place = out + sample * p.count + 4 * block;
    if (p.count % 4 == 0) {
      *reinterpret_cast<float4*>(place) = make_float4(normal[0], normal[1], normal[2], normal[3]);
    } else {
      for (int j = 0; j < 4; ++j)
        if (4 * block + j < p.count) place[j] = normal[j];
    }
  }
}
ADVKD_KERNEL(advkd_philox_normal)

}  // namespace advkd
