// Parameters of norm_act's kernels on NVIDIA GPUs: what the host fills and the kernels read. No Torch, no standard library.
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

}  // namespace advkd
