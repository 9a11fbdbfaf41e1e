// Numbers as kernels store them, read and made without the kernels' own conversions; for the drivers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/pieces.h"

namespace advkd {

inline double half_value(unsigned bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  const int power = std::max(exponent, 1) - bias - mantissa_bits;
  return sign * std::ldexp(mantissa + (exponent ? 1 << mantissa_bits : 0), power);
}

// Exactly as many bytes as `count` elements have: sanitizers see what goes beyond.
struct Stored {
  Stored(Dtype kind, i64 count) : dtype(kind), bytes(count * element_bytes(kind), -1) {}

  // Multiples of 1/16 in [-2, 2), which every dtype holds exactly.
  static Stored random(Dtype dtype, i64 count, u32 seed) {
    Stored s(dtype, count);
    for (i64 i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float x = static_cast<float>(static_cast<int>(seed >> 26) - 32) / 16;
      u32 bits;
      std::memcpy(&bits, &x, 4);
      const u32 exponent = (bits >> 23 & 0xFF) - 127 + 15, sign = bits >> 16 & 0x8000;
      const u32 half = x == 0 ? 0 : sign | exponent << 10 | (bits >> 13 & 0x3FF);
      const std::uint16_t narrow = static_cast<std::uint16_t>(dtype == Dtype::bfloat16 ? bits >> 16 : half);
      if (dtype == Dtype::float32) std::memcpy(s.bytes.data() + 4 * i, &bits, 4);
      else std::memcpy(s.bytes.data() + 2 * i, &narrow, 2);
    }
    return s;
  }

  double operator[](i64 i) const {
    if (dtype == Dtype::float32) {
      float x;
      std::memcpy(&x, bytes.data() + 4 * i, 4);
      return x;
    }
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    return half_value(bits, dtype == Dtype::bfloat16 ? 8 : 5);
  }

  void* data() { return bytes.data(); }

  Dtype dtype;
  std::vector<char> bytes;
};

// Half an ulp, relative.
inline double rounding(Dtype dtype) {
  return dtype == Dtype::float32 ? 0x1p-24 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-11;
}

}  // namespace advkd
