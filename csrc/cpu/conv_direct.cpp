// The direct convolution: pixels in groups of four along a row, whose sums over taps and input channels stay in registers.

#include <algorithm>

#include "cpu/conv_units.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Group {
  i64 in, out;  // offsets of the first pixel
  int valid;
};

// The groups of a range of units. A division for every unit would cost more than to go on along its row.
void list_groups(const ConvJob& job, i64 begin, i64 end, Group* groups) {
  const i64 across = (job.layer.width + 3) / 4, s = job.layer.scale();
  i64 row = begin / across, x = 4 * (begin % across);  // row of all images
  for (i64 unit = begin; unit < end; ++row, x = 0) {
    const i64 image = row / job.layer.height, y = row % job.layer.height;
    const i64 in = image * job.in.image() + (y + 1) * job.in.row() + job.in.channels;
    const i64 out = image * job.out.image() + (s * y + 1) * job.out.row() + job.out.channels;
    for (; x < job.layer.width && unit < end; x += 4, ++unit)
      *groups++ = {in + x * job.in.channels, out + s * x * job.out.channels, static_cast<int>(std::min<i64>(4, job.layer.width - x))};
  }
}

// tanh is for a student's last layer, of few channels: not in the way of the others.
__attribute__((noinline)) V tanh_apart(V x) {
  return tanh(x);
}

template <typename S, int N>
void direct_panel(const ConvJob& job, const Group* groups, i64 count, const Segments& taps, const S* weights, const float* bias, S* out) {
  const Epilogue<tanh_apart> epilogue{job.layer.activation, job.layer.slope};
  const i64 out_stride = job.out.channels * job.layer.scale();
  V offset[N];
  for (int j = 0; j < N; ++j) offset[j] = load(bias + j * kLanes);
  for_groups<N>(count, [&]<int G>(i64 first) __attribute__((always_inline)) {
    const S* rows[G];
    for (int g = 0; g < G; ++g) rows[g] = static_cast<const S*>(job.in.data) + groups[first + g].in;
    product_block<S, G, N>(rows, job.in.channels, taps, weights, [&](int g, int r, const V(&sum)[N]) __attribute__((always_inline)) {
      if (r >= groups[first + g].valid) return;
      S* pixel = out + groups[first + g].out + r * out_stride;
      for (int j = 0; j < N; ++j) store(pixel + j * kLanes, epilogue(sum[j] + offset[j]));
    });
  });
}

template <typename S>
void run_groups(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const ConvLayer& layer = job.layer;
  const i64 begin = task % schedule.blocks * schedule.block, end = std::min(begin + schedule.block, schedule.units);
  auto* groups = static_cast<Group*>(scratch);
  list_groups(job, begin, end, groups);
  const i64 total = vectors(layer.c_out), panels = panel_count(total), pairs = phases(layer) * panels;
  const i64 chunk = task / schedule.blocks;
  for (i64 pair = pairs * chunk / schedule.chunks; pair < pairs * (chunk + 1) / schedule.chunks; ++pair) {
    const Phase phase = phase_of(layer, static_cast<int>(pair / panels));
    const Panel panel = panel_of(total, pair % panels);
    const Range rows = axis(phase.vertical, 3), columns = axis(phase.horizontal, 3);
    i64 offsets[9];
    int count = 0;
    for (int y = 0; y < rows.count; ++y)
      for (int x = 0; x < columns.count; ++x)
        offsets[count++] = (rows.first + y - 1) * job.in.row() + (columns.first + x - 1) * job.in.channels;
    const i64 channels = product_channels(layer);
    const Segments taps{offsets, count, channels};
    const S* weights = packed_weights<S>(job) + ((pair / panels) * total + panel.first) * kLanes * count * channels;
    const float* bias = packed_bias(job.packed) + panel.first * kLanes;
    S* out = static_cast<S*>(job.out.data) + panel.first * kLanes;
    if (layer.upsample) out += phase.vertical * job.out.row() + phase.horizontal * job.out.channels;
    for_panel(panel.width, [&]<int N>() { direct_panel<S, N>(job, groups, end - begin, taps, weights, bias, out); });
  }
}

}  // namespace

#if !defined(ADVKD_BFLOAT16_ALONE)
ConvSchedule direct_schedule(const ConvLayer& layer, i64 images, i64 threads) {
  const i64 units = images * layer.height * ((layer.width + 3) / 4);
  ConvSchedule result = cut(units, 96, 6, phase_panels(layer), threads);
  result.scratch_bytes = result.block * static_cast<i64>(sizeof(Group));
  return result;
}

void direct_float32(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  run_groups<float>(job, schedule, task, scratch);
}
#endif

void direct_bfloat16(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  run_groups<bf16>(job, schedule, task, scratch);
}

}  // namespace advkd::ADVKD_ISA
