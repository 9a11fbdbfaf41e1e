// The register-blocked product under every algorithm but `dot`: rows of pixels (or Winograd tiles) by a panel of output channels.
// A block holds 4 G rows by N vectors in registers; per input channel it loads N vectors of packed weights and broadcasts 4 G
// pixels. Rows come in groups of four at one stride, so that a group is one address register and two strides. The input channels
// of a row may lie in several segments (the taps of a direct convolution), each at its own offset from the row.
#pragma once

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

// Vectors of output channels in the next panel when `left` remain: three where that divides, else two.
inline int panel_width(i64 left) {
  return left % 3 == 0 ? 3 : left >= 2 ? 2 : 1;
}

constexpr int kMaxPanel = 3;

// Groups of rows that fit the registers beside a panel of N vectors.
template <int N>
constexpr int kGroups = kAccumulators / (4 * N) < 1 ? 1 : kAccumulators / (4 * N) > 3 ? 3 : kAccumulators / (4 * N);

struct Segments {
  const i64* offsets;
  int count;
  i64 channels;  // a multiple of Product<P>::step
};

template <typename P, int G, int N, typename Finish>
inline __attribute__((always_inline)) void product_block(
    const P* const (&rows)[G], i64 stride, const Segments& segments, const P* weights, Finish&& finish) {
  using Op = Product<P>;
  V sum[4 * G][N] = {};
  for (int s = 0; s < segments.count; ++s) {
    const P* base[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) base[g] = rows[g] + segments.offsets[s];
    for (i64 c = 0; c < segments.channels; c += Op::step) {
      typename Op::Weight w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = Op::weight(weights + j * kLanes * Op::step);
      weights += N * kLanes * Op::step;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const typename Op::Pixel x = Op::pixel(base[g] + r * stride);
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) sum[4 * g + r][j] = Op::add(sum[4 * g + r][j], w[j], x);
        }
        base[g] += Op::step;
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) finish(g, r, sum[4 * g + r]);
}

// Call `body` with the number of groups as a constant, for `groups` groups in all: as many full blocks as there are, then one
// block of the rest.
template <int N, typename Body>
inline void for_groups(i64 groups, Body&& body) {
  constexpr int kFull = kGroups<N>;
  i64 g = 0;
  for (; g + kFull <= groups; g += kFull) body.template operator()<kFull>(g);
  if constexpr (kFull > 2) {
    if (groups - g == 2) return body.template operator()<2>(g);
  }
  if constexpr (kFull > 1) {
    if (groups - g == 1) return body.template operator()<1>(g);
  }
}

// Call `body` with a panel's width as a constant.
template <typename Body>
inline void for_panel(int width, Body&& body) {
  switch (width) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    default: return body.template operator()<3>();
  }
}

}  // namespace advkd::ADVKD_ISA
