// Parameters of the sampler step on NVIDIA GPUs: what the host fills and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kStepThreads = 256, kStepLanes = 32;
static_assert(kStepThreads % kStepLanes == 0, "blocks are whole warps");

// All tensors have one dense layout: per sample `length` elements of each of `channels` channels that alternate in memory. NCHW
// and memory order are one such channel, NHWC has C of them. A tensor that is not wanted is null.
struct StepParameters {
  const void *x, *m;
  const float* table;  // rows of eight, of extended steps of twelve
  const void *previous_x0, *history, *noise;
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

}  // namespace advkd
