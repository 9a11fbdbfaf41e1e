// Parameters of the sampler step on NVIDIA GPUs: what the launchers fill and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kStepThreads = 256, kStepLanes = 32;
static_assert(kStepThreads % kStepLanes == 0, "blocks are whole warps");

// All tensors have one dense layout: per sample `length` elements of each of `channels` channels that alternate in memory. NCHW
// and memory order are one such channel, NHWC has C of them. A tensor that is not wanted is null.
struct StepParameters {
  const void *x, *m;
  const float* table;  // rows of eight
  const void *previous_x0, *noise;
  const i64 *indices, *steps;
  void *out, *x0, *pooled;
  int* flags;
  i64 samples, length;
  int channels, width, pool;
  // Filled by step_plan: blocks of threads. With a pooled copy also a block's work, as sampler_step.cu explains it; without one
  // warps per sample, vectors of 16 bytes per thread (0 where none are aligned), and the inverses of `warps` and `channels`.
  i64 tiles;
  u64 inverse_warps, inverse_channels;
  u32 warps;
  int vectors_each;
  int column_tiles, channel_tiles, tile_channels, outputs, lanes, rows, strips;
  u32 key0, key1, stream_step;
  int row_stride, step_stride;  // of `table` and `steps` from sample to sample: 0 where all share one
  int vectors;                  // whether vectors of 16 bytes (with `pool`, of four elements) are aligned
};

#ifndef __CUDACC_RTC__
template <typename T>
inline T step_cover(T n, T part) {
  return (n + part - 1) / part;
}

inline int step_clamp(int n, int most) {
  return n < 1 ? 1 : n < most ? n : most;
}

// The kernels multiply instead of dividing: n / d is the upper half of the 128-bit product (n + 1) * step_inverse(d), exactly,
// as long as (n + 1) * d is at most 2^64.
inline u64 step_inverse(u64 d) {
  return ~u64{0} / d;
}

// Blocks that one launch may have. The flat kernel counts its warps, eight per block, in 32 bits.
inline i64 step_most_tiles(const StepParameters& p) {
  return p.pool ? (i64{1} << 31) - 1 : (i64{1} << 29) - 1;
}

// Two vectors per thread where every warp of a sample is then full. Threads that draw normals have enough work with one.
inline void step_plan_flat(StepParameters& p, int group) {
  const bool two = !p.indices && p.length % (2 * kStepLanes * group) == 0;
  p.vectors_each = p.vectors ? 1 + two : 0;
  const i64 groups = p.channels * step_cover<i64>(p.length, p.vectors ? group : 4);
  const i64 warps = step_cover<i64>(groups, p.vectors_each == 2 ? 2 * kStepLanes : kStepLanes);
  p.warps = static_cast<u32>(warps);
  p.inverse_warps = step_inverse(warps);
  p.inverse_channels = step_inverse(p.channels);
  p.tiles = step_cover<i64>(p.samples * warps, kStepThreads / kStepLanes);
}

// `group`: elements of a vector of 16 bytes (with `pool`, four). The other fields are filled before.
inline void step_plan(StepParameters& p, int group) {
  if (p.pool == 0) return step_plan_flat(p, group);
  const int outputs = p.width / p.pool;
  p.tile_channels = step_clamp(kStepThreads / step_cover(p.pool, group), p.channels);
  p.outputs = step_clamp(kStepThreads / p.tile_channels * group / p.pool, outputs);
  // A tile should start at a vector.
  if (p.outputs < outputs && p.outputs >= group) p.outputs -= p.outputs % group;
  p.lanes = step_clamp(step_cover(p.outputs * p.pool, group) * p.tile_channels, kStepThreads);
  p.rows = step_clamp(kStepThreads / p.lanes, p.pool);
  p.strips = kStepThreads / (p.lanes * p.rows);
  p.column_tiles = step_cover(outputs, p.outputs);
  p.channel_tiles = step_cover(p.channels, p.tile_channels);
  const i64 strips = p.samples * (p.length / p.width / p.pool);
  p.tiles = step_cover<i64>(strips, p.strips) * p.column_tiles * p.channel_tiles;
}
#endif

}  // namespace advkd
