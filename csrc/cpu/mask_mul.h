// LeakyReLU's derivative from a one-bit mask on the CPU; one instance per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/pieces.h"

namespace advkd {

// Samples in the order of memory; each sample's mask begins with a byte of its own.
struct MaskMul {
  const void* x;
  const std::uint8_t* mask;
  void* out;  // may be x
  float slope;
  Pieces pieces;
  Dtype dtype;
};

// Make pieces begin .. end - 1 of all samples' pieces.
using MaskMulKernel = void (*)(const MaskMul&, i64 begin, i64 end);

namespace isa_baseline {
void mask_mul(const MaskMul&, i64, i64);
}
namespace isa_avx2 {
void mask_mul(const MaskMul&, i64, i64);
}
namespace isa_avx512 {
void mask_mul(const MaskMul&, i64, i64);
}

}  // namespace advkd
