// Points between real and generated samples on the CPU; one instance per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cpu/pieces.h"

namespace advkd {

// Samples in the order of memory.
struct Interpolate {
  const void* real;
  const void* fake;
  const float* a;               // one weight per sample, or null:
  const std::int64_t* indices;  // then drawn
  const std::int64_t* steps;    // step_count of them, or null: then the step is in `philox`
  i64 step_count;
  PhiloxParameters philox;
  void* out;   // the points, or with `merge` real samples, generated ones and points
  bool merge;
  Pieces pieces;
  Dtype dtype;
};

// The weight of a real sample.
inline float interpolation_weight(const Interpolate& s, i64 sample) {
  if (s.a) return s.a[sample];
  const u64 index = static_cast<u64>(s.indices[sample]);
  const u32 step = s.steps ? static_cast<u32>(s.steps[s.step_count > 1 ? sample : 0]) : 0;
  u32 words[4] = {0, static_cast<u32>(index), static_cast<u32>(index >> 32), s.philox.stream_step | step};
  philox_rounds(words, s.philox.key0, s.philox.key1);
  return static_cast<float>(words[0] >> 8) * 0x1p-24f;
}

// Make pieces begin .. end - 1 of all samples' pieces.
using InterpolateKernel = void (*)(const Interpolate&, i64 begin, i64 end);

namespace isa_baseline {
void interpolate(const Interpolate&, i64, i64);
}
namespace isa_avx2 {
void interpolate(const Interpolate&, i64, i64);
}
namespace isa_avx512 {
void interpolate(const Interpolate&, i64, i64);
}

}  // namespace advkd
