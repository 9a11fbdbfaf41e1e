// Parameters of penalty_reduce on NVIDIA GPUs: what the host fills and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"
#include "cuda/block.h"

namespace advkd {

// Samples of `length` elements in the order of memory, each the work of `parts` blocks.
struct PenaltyParameters {
  const void* g;
  void* out;
  float *penalties, *partials;  // partials: samples x parts
  i64 samples, length;
  float target, share;  // share: weight / samples
  int mode;             // 0: two-sided, 1: one-sided, 2: r1
  int parts;
  int vectors;  // whether vectors of 16 bytes are aligned in every sample
};

}  // namespace advkd
