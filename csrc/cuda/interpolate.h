// Parameters of interpolate on NVIDIA GPUs: what the host fills and the kernel reads. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

// Samples of `length` elements in the order of memory. Weights come from `a`, or are drawn for `indices` where `a` is null.
struct InterpolateParameters {
  const void *real, *fake;
  const float* a;
  const i64 *indices, *steps;  // steps: null where all samples share the one in stream_step
  void* out;
  i64 samples, length;
  u32 key0, key1, stream_step;
  int step_stride;  // of `steps` from sample to sample: 0 where all share one
  int merge;        // whether `out` has the real and the generated samples before the points between them
  int vectors;      // whether vectors of 16 bytes are aligned in every sample
};

}  // namespace advkd
