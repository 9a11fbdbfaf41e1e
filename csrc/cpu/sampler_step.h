// One step of a diffusion sampler on the CPU; one instance per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cpu/pieces.h"

namespace advkd {

// Columns of the table of coefficients: those of plain steps, and of extended ones.
struct StepRow {
  float k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z;
};
struct ExtendedStepRow : StepRow {
  float c_g, s_0, s_x, s_m;
};

// A step as pointers and sizes. All tensors have the same dense layout: `samples` samples of `planes * height` rows of `width`
// elements. NCHW: planes are the channels. NHWC: one plane, whose rows hold `channels` neighbouring elements per pixel.
struct SamplerStep {
  const void* x;
  const void* model_output;
  const void* previous_x0;  // or null, as the following ones
  const void* history;      // of an extended step
  const void* noise;
  void* out;
  void* x0;
  void* pooled;
  std::int32_t* flags;  // one per sample, set where the next state is not finite
  const void* rows;             // StepRow, or ExtendedStepRow of an extended step
  i64 row_count;                // 1, or one per sample
  const std::int64_t* indices;  // with them the noise is drawn here
  const std::int64_t* steps;    // step_count of them, or null: then the step is in `philox`
  i64 step_count;
  PhiloxParameters philox;
  i64 samples, planes, height, width;
  i64 channels;  // of a pixel: 1 in NCHW
  i64 pool;      // 0: none
  int kernel;    // of step_kernel
  bool stream;   // stores pass the caches by
};

// Number of the kernel for a step: plain steps of the states' dtypes and the outputs', then extended ones.
inline int step_kernel(Dtype dtype, Dtype model_dtype, bool extended) {
  return 9 * extended + 3 * static_cast<int>(dtype) + static_cast<int>(model_dtype);
}

// Elements of a piece of work: a strip of `pool` rows, else a run that fits the first-level cache, in NHWC one of whole pixels.
inline i64 step_piece(const SamplerStep& s) {
  if (s.pool) return s.pool * s.width;
  constexpr i64 kRun = 2048, kPixels = 64;
  const i64 pixels = kRun / s.channels / kPixels * kPixels;
  return (pixels > 0 ? pixels : kPixels) * s.channels;
}

inline i64 step_pieces_per_sample(const SamplerStep& s) {
  const i64 piece = step_piece(s);
  return (s.planes * s.height * s.width + piece - 1) / piece;
}

// Make pieces begin .. end - 1 of all samples' pieces, in order.
using SamplerStepKernel = void (*)(const SamplerStep&, i64 begin, i64 end);

namespace isa_baseline {
void sampler_step(const SamplerStep&, i64, i64);
}
namespace isa_avx2 {
void sampler_step(const SamplerStep&, i64, i64);
}
namespace isa_avx512 {
void sampler_step(const SamplerStep&, i64, i64);
}

}  // namespace advkd
