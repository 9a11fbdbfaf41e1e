// Parts that the units of the student's convolution share, for one instruction set: their view of a layer and of its packed
// weights, the epilogue, and each unit's functions.
//
// Weights are packed panel by panel in the order in which the product reads them, so they stream. A task owns a block of rows
// (groups of four pixels, Winograd tiles, or rows of an image) and a range of (phase, panel of output channels).
#pragma once

#include <algorithm>

#include "cpu/conv_block.h"
#include "cpu/product.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

inline i64 padded(i64 channels) {
  return round_up(channels, 16);
}

inline i64 vectors(i64 channels) {
  return (channels + kLanes - 1) / kLanes;
}

// First and count of the taps (of 3) or points (of n) along an axis: a phase leaves out the last or the first.
struct Range {
  int first, count;
};

inline Range axis(int phase, int n) {
  return phase < 0 ? Range{0, n} : phase == 0 ? Range{0, n - 1} : Range{1, n - 1};
}

inline int phases(const ConvLayer& layer) {
  return layer.upsample ? 4 : 1;
}

// Phase number p of a layer as (vertical, horizontal), each -1 without up-sampling.
struct Phase {
  int vertical, horizontal;
};

inline Phase phase_of(const ConvLayer& layer, int p) {
  return layer.upsample ? Phase{p / 2, p % 2} : Phase{-1, -1};
}

// Panels of output channels: first vector and width of panel number `index`.
struct Panel {
  i64 first;
  int width;
};

inline Panel panel_of(i64 total, i64 index) {
  i64 first = 0;
  for (; index > 0; --index) first += panel_width(total - first);
  return {first, panel_width(total - first)};
}

inline i64 panel_count(i64 total) {
  i64 count = 0;
  for (i64 first = 0; first < total; first += panel_width(total - first)) ++count;
  return count;
}

// Pairs of a phase and a panel, each of which a task can make alone.
inline i64 phase_panels(const ConvLayer& layer) {
  return phases(layer) * panel_count(vectors(layer.c_out));
}

// Channels that products of this layer go through: bfloat16 takes them in pairs.
inline i64 product_channels(const ConvLayer& layer) {
  return layer.products() == Storage::bfloat16 ? round_up(layer.c_in, 2) : layer.c_in;
}

// Matrices (taps or points) of packed weights per phase.
inline i64 matrices(const ConvLayer& layer) {
  const i64 side = layer.tile() ? layer.tile() + 2 : 3, used = layer.upsample ? side - 1 : side;
  return used * used;
}

// Packed: the header, the bias, the weights.
inline const float* packed_bias(const void* packed) {
  return reinterpret_cast<const float*>(static_cast<const char*>(packed) + sizeof(PackedHeader));
}

inline i64 leading_bytes(const ConvLayer& layer) {
  return static_cast<i64>(sizeof(PackedHeader)) + 4 * padded(layer.c_out);
}

template <typename P>
const P* packed_weights(const ConvJob& job) {
  return reinterpret_cast<const P*>(static_cast<const char*>(job.packed) + leading_bytes(job.layer));
}

inline V leaky_relu(V x, float slope) {
  return x > 0.0f ? x : x * slope;
}

// y = activation(x); kTanh is tanh in line or apart.
template <V (*kTanh)(V)>
struct Epilogue {
  Activation activation;
  float slope;
  V operator()(V x) const {
    if (activation == Activation::leaky_relu) return leaky_relu(x, slope);
    return activation == Activation::tanh ? kTanh(x) : x;
  }
};

// Blocks of at most `largest` units, a multiple of `smallest`; with too few blocks for the threads, smaller ones and then chunks
// of the pairs of phase and panel.
inline ConvSchedule cut(i64 units, i64 largest, i64 smallest, i64 pairs, i64 threads) {
  constexpr i64 kTasksPerThread = 4;
  const i64 wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  const i64 block = std::clamp(round_up((units + wanted - 1) / wanted, smallest), smallest, std::max(smallest, largest));
  ConvSchedule schedule{units, block, (units + block - 1) / block, 1, 0};
  if (schedule.blocks < threads) schedule.chunks = std::min(pairs, (wanted + schedule.blocks - 1) / schedule.blocks);
  return schedule;
}

// The ways to compute a layer (conv_direct.cpp, conv_winograd.cpp, conv_dot.cpp): one task, and how a layer is cut into tasks.
ConvRun direct_bfloat16, winograd_bfloat16;

}  // namespace advkd::ADVKD_ISA

// Kernels that bfloat16's instructions do not serve exist up to AVX-512.
#if defined(ADVKD_BFLOAT16_ALONE)
#define ADVKD_PLAIN_ISA isa_avx512
#else
#define ADVKD_PLAIN_ISA ADVKD_ISA
#endif

namespace advkd::ADVKD_PLAIN_ISA {

ConvRun direct_float32, winograd_float32, run_dot;
ConvScheduler direct_schedule, winograd_schedule, dot_schedule;

// Packing (conv_pack.cpp).
i64 packed_bytes(const ConvLayer&);
void pack(const ConvLayer&, const float* weight, const float* bias, void* packed);
bool fits(const ConvLayer&, const void* packed);

}  // namespace advkd::ADVKD_PLAIN_ISA

namespace advkd::ADVKD_ISA {
using namespace ADVKD_PLAIN_ISA;
}
