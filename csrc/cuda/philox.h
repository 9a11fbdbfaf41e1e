// Parameters of philox on NVIDIA GPUs: what the host fills and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

struct DrawParameters {
  const i64* indices;
  void* out;  // of words or of normals, (samples, draw.count)
  i64 samples;
  PhiloxParameters draw;
};

}  // namespace advkd
