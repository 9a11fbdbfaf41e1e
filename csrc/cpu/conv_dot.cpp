// Few output channels: sums over vectors of input channels.

#include <algorithm>
#include <cstring>

#include "cpu/conv_units.h"

#if !defined(ADVKD_BFLOAT16_ALONE)

namespace advkd::ADVKD_ISA {
namespace {

template <typename S, int O>
void dot_pixels(const ConvJob& job, const S* in, float* out) {
  // Four pixels at once; a loaded pixel serves the three taps of a row.
  V sum[4][O] = {};
  const float* weights = packed_weights<float>(job);
  for (int dy = 0; dy < 3; ++dy, in += job.in.row())
    for (i64 c = 0; c < vectors(job.layer.c_in) * kLanes; c += kLanes, weights += 3 * O * kLanes) {
      V pixels[6];
#pragma GCC unroll 8
      for (int x = 0; x < 6; ++x) pixels[x] = load(in + x * job.in.channels + c);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
        for (int dx = 0; dx < 3; ++dx) {
          const V w = load(weights + (3 * o + dx) * kLanes);
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) sum[x][o] = fma(pixels[x + dx], w, sum[x][o]);
        }
    }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o) {
    const V column[4] = {sum[0][o], sum[1][o], sum[2][o], sum[3][o]};
    sum_lanes(column, out + 4 * o);
  }
}

// One row of one image.
template <typename S, int O>
void dot_row(const ConvJob& job, i64 image, i64 y, float* scratch) {
  const ConvLayer& layer = job.layer;
  const i64 stride = round_up(layer.width, kLanes);
  const S* in = static_cast<const S*>(job.in.data) + image * job.in.image() + y * job.in.row();
  for (i64 x = 0; x < layer.width; x += 4) {
    float sums[4 * O];
    dot_pixels<S, O>(job, in + x * job.in.channels, sums);
    for (int o = 0; o < O; ++o) std::memcpy(scratch + o * stride + x, sums + 4 * o, 4 * sizeof(float));
  }
  const Epilogue<tanh> epilogue{layer.activation, layer.slope};
  const float* bias = packed_bias(job.packed);
  for (int o = 0; o < O; ++o) {
    float* row = scratch + o * stride;
    for (i64 x = 0; x < layer.width; x += kLanes) store(row + x, epilogue(load(row + x) + splat(bias[o])));
    S* out = static_cast<S*>(job.planar) + ((image * O + o) * layer.height + y) * layer.width;
    for (i64 x = 0; x < layer.width; ++x) from_float(row[x], out[x]);
  }
}

template <typename S>
void run_rows(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const i64 begin = task * schedule.block, end = std::min(begin + schedule.block, schedule.units);
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 image = unit / job.layer.height, y = unit % job.layer.height;
    auto* rows = static_cast<float*>(scratch);
    switch (job.layer.c_out) {
      case 1: dot_row<S, 1>(job, image, y, rows); break;
      case 2: dot_row<S, 2>(job, image, y, rows); break;
      case 3: dot_row<S, 3>(job, image, y, rows); break;
      default: dot_row<S, 4>(job, image, y, rows);
    }
  }
}

}  // namespace

ConvSchedule dot_schedule(const ConvLayer& layer, i64 images, i64 threads) {
  ConvSchedule result = cut(images * layer.height, 64, 1, 1, threads);
  result.scratch_bytes = 4 * layer.c_out * round_up(layer.width, kLanes) + 4 * kLanes;
  return result;
}

void run_dot(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  if (job.layer.storage == Storage::float32) return run_rows<float>(job, schedule, task, scratch);
  run_rows<bf16>(job, schedule, task, scratch);
}

}  // namespace advkd::ADVKD_ISA

#endif
