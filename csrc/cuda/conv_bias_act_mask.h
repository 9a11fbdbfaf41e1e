// Parameters of conv_bias_act_mask on NVIDIA GPUs: what the host fills and the kernel reads. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

// Samples of `length` elements in the order of memory, the channel of element e is e / inner % channels: `inner` is a plane's
// size, or 1 where channels are neighbours. A thread takes eight elements: one of the mask's bytes.
struct ConvBiasActMaskParameters {
  const void *p, *bias;  // bias: of the elements' dtype, or null
  void* out;
  unsigned char* mask;
  i64 samples, length, inner, channels;
  float slope;
  int vectors, bias_vectors;  // whether vectors of 16 bytes are aligned in every sample; whether eight biases are one
};

}  // namespace advkd
