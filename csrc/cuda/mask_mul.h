// Parameters of mask_mul on NVIDIA GPUs: what the host fills and the kernel reads. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

// Samples of `length` elements in the order of memory. A thread takes one of the mask's bytes: eight elements.
struct MaskMulParameters {
  const void* x;
  const unsigned char* mask;
  void* out;
  i64 samples, length;
  float slope;
  int vectors;  // whether vectors of 16 bytes are aligned in every sample
};

}  // namespace advkd
