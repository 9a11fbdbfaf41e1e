// A convolution's epilogue on the CPU, bias, LeakyReLU and its mask; one instance per instruction set, chosen at run time.
#pragma once

#include <cstdint>
#include <numeric>

#include "cpu/pieces.h"

namespace advkd {

// Samples in the order of memory; each sample's mask begins with a byte of its own.
struct BiasActMask {
  const void* p;
  const void* bias;  // one per channel, or null
  void* out;         // may be p
  std::uint8_t* mask;
  float slope;
  i64 channels;
  i64 plane;  // neighbouring elements of a channel: 1 in channels_last, where the bias repeats with every pixel
  Pieces pieces;
  Dtype dtype;
};

// Elements of a piece: in channels_last whole pixels and whole bytes of the mask, so that every piece has the same biases.
inline i64 bias_piece(i64 channels, i64 plane) {
  if (plane > 1) return kPiece;
  const i64 unit = std::lcm(channels, i64{8});
  return (kPiece + unit - 1) / unit * unit;
}

// Make pieces begin .. end - 1 of all samples' pieces.
using BiasActMaskKernel = void (*)(const BiasActMask&, i64 begin, i64 end);

namespace isa_baseline {
void conv_bias_act_mask(const BiasActMask&, i64, i64);
}
namespace isa_avx2 {
void conv_bias_act_mask(const BiasActMask&, i64, i64);
}
namespace isa_avx512 {
void conv_bias_act_mask(const BiasActMask&, i64, i64);
}

}  // namespace advkd
