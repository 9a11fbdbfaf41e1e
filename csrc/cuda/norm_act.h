// Parameters of norm_act's kernels on NVIDIA GPUs: what the launchers fill and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"
#include "cuda/block.h"

namespace advkd {

// x as samples x height x columns positions of a channel (planes) or of a group of channels (channels last). A position holds
// a group of elements that are neighbours in memory: of a row of `width` elements, or of a pixel's channels.
//   planes:        samples N, height 1, width H W; to up-sample height H, width W; columns: groups in a row
//   channels last: samples N H, height 1, width and columns W
struct NormParameters {
  const void *x, *gradient;
  const float *weights, *statistics, *means;  // (2, channels) each
  void* out;                                  // y, dx or, where it is wanted, d
  float *results, *partials;                  // (2, channels); (parts, 3, channels)
  i64 width;
  int samples, height, columns, channels;
  // Filled by norm_plan: a block works on one of `tiles` channels or sets of channels, as one of `parts`; its threads are
  // `rows` positions times `lanes` groups of channels. From a thread's position to its next there are so many steps.
  int tiles, parts, lanes, rows, sample_step, row_step, column_step;
  float eps, slope;
  int upsample, masked;  // masked: `gradient` is that by the values before LeakyReLU, of x's shape, and `upsample` is off
  int group;  // elements of a position: those of 16 bytes where such vectors are aligned at every position, else one
};

#ifndef __CUDACC_RTC__
constexpr i64 kMostNormSide = i64{1} << 29;  // of what is counted in 32 bits
constexpr i64 kNormBlocks = 1024;            // enough for every multiprocessor: with more work than that, threads take turns
constexpr i64 kMostNormTurns = 8;            // enough for what a thread does once

inline i64 norm_cover(i64 n, i64 part) {
  return (n + part - 1) / part;
}

inline i64 norm_clamp(i64 n, i64 most) {
  return n < 1 ? 1 : n < most ? n : most;
}

// `last`: channels last; `reduces`: whether each block leaves a partial result, so that fewer blocks are better.
inline void norm_plan(NormParameters& p, bool last, bool reduces) {
  const i64 groups = last ? p.channels / p.group : 1, turns = reduces ? kMostNormSide : kMostNormTurns;
  p.lanes = static_cast<int>(norm_clamp(groups, kThreads));
  p.rows = kThreads / p.lanes;
  p.tiles = static_cast<int>(last ? norm_cover(groups, p.lanes) : p.channels);
  const i64 positions = static_cast<i64>(p.samples) * p.height * p.columns;
  const i64 wanted = norm_clamp(norm_cover(positions, p.rows) * p.tiles / kNormBlocks, turns);
  p.parts = static_cast<int>(norm_cover(positions, p.rows * wanted));
  const i64 step = static_cast<i64>(p.parts) * p.rows;
  p.column_step = static_cast<int>(step % p.columns);
  p.row_step = static_cast<int>(step / p.columns % p.height);
  p.sample_step = static_cast<int>(step / p.columns / p.height);
}
#endif

}  // namespace advkd
