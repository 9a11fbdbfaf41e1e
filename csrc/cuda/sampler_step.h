// Parameters of the sampler step on NVIDIA GPUs: what the launchers fill and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kStepThreads = 256;

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
  // Filled by step_plan: blocks of threads, and for a pooled copy the work of one block as sampler_step.cu explains it.
  i64 tiles;
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

// `group`: neighbouring elements per thread.
inline void step_plan(StepParameters& p, int group) {
  if (p.pool == 0) {
    p.tiles = step_cover<i64>(p.samples * p.channels * step_cover<i64>(p.length, group), kStepThreads);
    return;
  }
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
