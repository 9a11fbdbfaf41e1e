// Parameters of the sampler step on NVIDIA GPUs: what the launchers fill and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kStepThreads = 256;

// All tensors have one dense layout: per sample `length` elements of each of `channels` channels that alternate in memory. NCHW
// and memory order are one such channel, NHWC has C of them. Tensors that are not wanted are null.
struct StepParameters {
  const void *x, *m;
  const float* table;  // rows of eight
  const void *previous_x0, *noise;
  const i64 *indices, *steps;
  void *out, *x0, *pooled;
  int* flags;
  i64 samples, channels, length, width, pool;
  // Filled by step_plan: blocks of threads; for a pooled copy the work of one block (sampler_step.cu says how it is shared out).
  i64 tiles, column_tiles, channel_tiles, outputs;
  int tile_channels, lanes, rows, strips;
  u32 key0, key1, stream_step;
  int row_stride, step_stride;  // of `table` and `steps` from sample to sample: 0 where all share one
  int vectors;                  // whether vectors of 16 bytes (with `pool`, of four elements) are aligned
};

#ifndef __CUDACC_RTC__
// `group`: neighbouring elements per thread.
inline void step_plan(StepParameters& p, i64 group) {
  const auto cover = [](i64 n, i64 part) { return (n + part - 1) / part; };
  const auto clamp = [](i64 n, i64 most) { return n < 1 ? 1 : n < most ? n : most; };
  if (p.pool == 0) {
    p.tiles = cover(p.samples * p.channels * cover(p.length, group), kStepThreads);
    return;
  }
  const i64 outputs = p.width / p.pool, tile_channels = clamp(kStepThreads / cover(p.pool, group), p.channels);
  p.outputs = clamp(kStepThreads / tile_channels * group / p.pool, outputs);
  // A tile should start at a vector.
  if (p.outputs < outputs && p.outputs >= group) p.outputs -= p.outputs % group;
  p.tile_channels = static_cast<int>(tile_channels);
  p.lanes = static_cast<int>(clamp(cover(p.outputs * p.pool, group) * tile_channels, kStepThreads));
  p.rows = static_cast<int>(clamp(kStepThreads / p.lanes, p.pool));
  p.strips = kStepThreads / (p.lanes * p.rows);
  p.column_tiles = cover(outputs, p.outputs);
  p.channel_tiles = cover(p.channels, tile_channels);
  p.tiles = cover(p.samples * (p.length / p.width / p.pool), p.strips) * p.column_tiles * p.channel_tiles;
}
#endif

}  // namespace advkd
