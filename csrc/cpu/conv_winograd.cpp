// Winograd's convolution: tiles of m x m outputs (of the low-resolution grid where up-sampling).
//
// A task's block of tiles is small enough that what it transforms stays in the second-level cache. The block's inputs are
// transformed once; then per panel all points' products are made and transformed back while they are still in cache.

#include <unistd.h>

#include <algorithm>

#include "cpu/conv_units.h"
#include "cpu/winograd.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Tile {
  i64 image, y, x;  // first output pixel
};

template <int m>
Tile tile_of(const ConvLayer& layer, i64 unit) {
  const i64 across = (layer.width + m - 1) / m, down = (layer.height + m - 1) / m;
  return {unit / (across * down), m * (unit / across % down), m * (unit % across)};
}

// Goes on to the next tile.
template <int m>
void advance(const ConvLayer& layer, Tile& tile) {
  if ((tile.x += m) < layer.width) return;
  tile.x = 0;
  if ((tile.y += m) < layer.height) return;
  tile.y = 0;
  ++tile.image;
}

// A line of padding between points: without it all points of a channel fall into one set of the first-level cache.
template <typename T>
constexpr i64 kPointPadding = 64 / sizeof(T);

template <int m, typename S, typename P>
void transform_input(const S* in, i64 row, i64 pixel, P* out, i64 point_stride) {
  constexpr int n = m + 2;
  V half[n][n];
  for (int x = 0; x < n; ++x) {
    V d[n], t[n];
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y) d[y] = load(in + y * row + x * pixel);
    Winograd<m>::input(d, t);
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y) half[y][x] = t[y];
  }
  for (int y = 0; y < n; ++y) {
    V t[n];
    Winograd<m>::input(half[y], t);
#pragma GCC unroll 8
    for (int x = 0; x < n; ++x) store(out + (y * n + x) * point_stride, t[x]);
  }
}

// The pixels of a tile that lie within the image, and zeros for the others.
template <int n, typename S>
void copy_pixels(const S* in, i64 row, i64 pixel, i64 rows, i64 columns, S* out) {
  std::fill_n(out, n * n * kLanes, S{});
  for (i64 y = 0; y < std::min<i64>(rows, n); ++y)
    for (i64 x = 0; x < std::min<i64>(columns, n); ++x)
      std::copy_n(in + y * row + x * pixel, kLanes, out + (y * n + x) * kLanes);
}

template <int m, typename S, typename P>
void transform_inputs(const ConvJob& job, i64 begin, i64 end, P* out, i64 point_stride) {
  constexpr int n = m + 2;
  // By value: fields behind a reference would be read again after every store.
  const ConvLayer layer = job.layer;
  const i64 channels = padded(layer.c_in), used = vectors(layer.c_in) * kLanes, row = job.in.row(), pixel = job.in.channels;
  Tile tile = tile_of<m>(layer, begin);
  for (i64 unit = begin; unit < end; ++unit, out += channels, advance<m>(layer, tile)) {
    // The tile's halo begins at output pixel (y - 1, x - 1), which is memory pixel (y, x).
    const S* in = static_cast<const S*>(job.in.data) + tile.image * job.in.image() + tile.y * row + tile.x * pixel;
    const i64 rows = layer.height + 2 - tile.y, columns = layer.width + 2 - tile.x;
    const bool whole = rows >= n && columns >= n;
    for (i64 c = 0; c < used; c += kLanes) {
      S pixels[n * n * kLanes];
      if (!whole) copy_pixels<n>(in + c, row, pixel, rows, columns, pixels);
      transform_input<m>(whole ? in + c : pixels, whole ? row : n * kLanes, whole ? pixel : kLanes, out + c, point_stride);
    }
  }
}

// tanh is for a student's last layer, which is no Winograd's: not in the way of the others.
__attribute__((noinline)) void tanh_of(V* x, int count) {
  for (int i = 0; i < count; ++i) x[i] = tanh(x[i]);
}

// The products of one tile, one vector of channels and phase (pv, ph) to m x m pixels.
template <int m, int pv, int ph>
void transform_output(const float* in, i64 point_stride, V bias, Activation activation, float slope, V (&out)[m][m]) {
  constexpr int n = m + 2;
  constexpr int first_y = pv == 1, count_y = pv < 0 ? n : n - 1, first_x = ph == 1, count_x = ph < 0 ? n : n - 1;
  V half[m][n];
  for (int x = first_x; x < first_x + count_x; ++x) {
    V products[n], t[m];
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y)
      products[y] = y < first_y || y >= first_y + count_y ? V{} : load(in + ((y - first_y) * count_x + x - first_x) * point_stride);
    Winograd<m>::template output<pv != 1, pv != 0>(products, t);
#pragma GCC unroll 8
    for (int y = 0; y < m; ++y) half[y][x] = t[y];
  }
  for (int y = 0; y < m; ++y) {
    V t[m];
    Winograd<m>::template output<ph != 1, ph != 0>(half[y], t);
    for (int x = 0; x < m; ++x) {
      const V sum = t[x] + bias;
      out[y][x] = activation == Activation::leaky_relu ? leaky_relu(sum, slope) : sum;
    }
  }
  if (activation == Activation::tanh) tanh_of(out[0], m * m);
}

template <int m, typename S, int pv, int ph>
void transform_outputs(const ConvJob& job, i64 begin, i64 end, Panel panel, const float* in, i64 point_stride) {
  // By value: fields behind a reference would be read again after every store.
  const ConvLayer layer = job.layer;
  const i64 s = layer.scale(), image = job.out.image(), row = s * job.out.row(), pixel = s * job.out.channels;
  S* const first = static_cast<S*>(job.out.data) + (1 + (pv > 0)) * job.out.row() + (1 + (ph > 0)) * job.out.channels + panel.first * kLanes;
  const float* bias = packed_bias(job.packed) + panel.first * kLanes;
  Tile tile = tile_of<m>(layer, begin);
  for (i64 unit = begin; unit < end; ++unit, in += panel.width * kLanes, advance<m>(layer, tile)) {
    S* out = first + tile.image * image + tile.y * row + tile.x * pixel;
    const i64 rows = std::min<i64>(layer.height - tile.y, m), columns = std::min<i64>(layer.width - tile.x, m);
    const bool whole = rows == m && columns == m;
    for (int j = 0; j < panel.width; ++j) {
      V pixels[m][m];
      transform_output<m, pv, ph>(in + j * kLanes, point_stride, load(bias + j * kLanes), layer.activation, layer.slope, pixels);
      if (whole) {
        for (int y = 0; y < m; ++y)
          for (int x = 0; x < m; ++x) store(out + j * kLanes + y * row + x * pixel, pixels[y][x]);
      } else {
        for (int y = 0; y < rows; ++y)
          for (int x = 0; x < columns; ++x) store(out + j * kLanes + y * row + x * pixel, pixels[y][x]);
      }
    }
  }
}

template <int m, typename S>
void transform_outputs(const ConvJob& job, Phase phase, i64 begin, i64 end, const Panel& panel, const float* in, i64 stride) {
  if (phase.vertical < 0) return transform_outputs<m, S, -1, -1>(job, begin, end, panel, in, stride);
  switch (2 * phase.vertical + phase.horizontal) {
    case 0: return transform_outputs<m, S, 0, 0>(job, begin, end, panel, in, stride);
    case 1: return transform_outputs<m, S, 0, 1>(job, begin, end, panel, in, stride);
    case 2: return transform_outputs<m, S, 1, 0>(job, begin, end, panel, in, stride);
    default: return transform_outputs<m, S, 1, 1>(job, begin, end, panel, in, stride);
  }
}

// All points of one phase and panel: products[point][tile][channel of the panel].
template <int m, typename P, int N>
void multiply_points(const ConvLayer& layer, Phase phase, i64 tiles, const P* in, i64 in_stride, const P* weights, float* out, i64 out_stride) {
  const i64 channels = product_channels(layer), stride = padded(layer.c_in), zero = 0;
  const Segments whole{&zero, 1, channels};
  constexpr int n = m + 2;
  const Range rows = axis(phase.vertical, n), columns = axis(phase.horizontal, n);
  for (int y = 0; y < rows.count; ++y)
    for (int x = 0; x < columns.count; ++x) {
      const P* point = in + ((rows.first + y) * n + columns.first + x) * in_stride;
      for_groups<N>((tiles + 3) / 4, [&]<int G>(i64 first) __attribute__((always_inline)) {
        const P* base[G];
        for (int g = 0; g < G; ++g) base[g] = point + 4 * (first + g) * stride;
        product_block<P, G, N>(base, stride, whole, weights, [&](int g, int r, const V(&sum)[N]) __attribute__((always_inline)) {
          for (int j = 0; j < N; ++j) store(out + (4 * (first + g) + r) * N * kLanes + j * kLanes, sum[j]);
        });
      });
      weights += channels * N * kLanes;
      out += out_stride;
    }
}

template <typename P>
i64 input_point_stride(const ConvLayer& layer, i64 tiles) {
  return round_up(tiles, 4) * padded(layer.c_in) + kPointPadding<P>;
}

i64 product_point_stride(i64 tiles) {
  return round_up(tiles, 4) * kMaxPanel * kLanes + kPointPadding<float>;
}

template <int m, typename S, typename P>
void run_tiles(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const ConvLayer& layer = job.layer;
  const i64 begin = task % schedule.blocks * schedule.block, end = std::min(begin + schedule.block, schedule.units);
  const i64 in_stride = input_point_stride<P>(layer, schedule.block), out_stride = product_point_stride(schedule.block);
  auto* transformed = static_cast<P*>(scratch);
  auto* products = reinterpret_cast<float*>(transformed + (m + 2) * (m + 2) * in_stride);
  transform_inputs<m, S, P>(job, begin, end, transformed, in_stride);
  const i64 total = vectors(layer.c_out), panels = panel_count(total), pairs = phases(layer) * panels;
  const i64 chunk = task / schedule.blocks, channels = product_channels(layer);
  for (i64 pair = pairs * chunk / schedule.chunks; pair < pairs * (chunk + 1) / schedule.chunks; ++pair) {
    const Phase phase = phase_of(layer, static_cast<int>(pair / panels));
    const Panel panel = panel_of(total, pair % panels);
    const P* weights = packed_weights<P>(job) + ((pair / panels) * total + panel.first) * kLanes * matrices(layer) * channels;
    for_panel(panel.width, [&]<int N>() {
      multiply_points<m, P, N>(layer, phase, end - begin, transformed, in_stride, weights, products, out_stride);
    });
    transform_outputs<m, S>(job, phase, begin, end, panel, products, out_stride);
  }
}

}  // namespace

#if !defined(ADVKD_BFLOAT16_ALONE)
static i64 cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const i64 size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 512 << 10;
}

ConvSchedule winograd_schedule(const ConvLayer& layer, i64 images, i64 threads) {
  const i64 m = layer.tile(), element = element_bytes(layer.products()), points = (m + 2) * (m + 2);
  const i64 tile_bytes = points * (padded(layer.c_in) * element + kMaxPanel * kLanes * 4);
  const i64 units = images * ((layer.height + m - 1) / m) * ((layer.width + m - 1) / m);
  const i64 budget = cache_bytes() * 5 / 8;
  ConvSchedule result = cut(units, std::clamp<i64>(budget / tile_bytes / 24 * 24, 24, 192), 12, phase_panels(layer), threads);
  const i64 tiles = round_up(result.block, 4);
  result.scratch_bytes = points * ((tiles * padded(layer.c_in) * element + 64) + (tiles * kMaxPanel * kLanes * 4 + 64));
  return result;
}

void winograd_float32(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  switch (job.layer.tile()) {
    case 2: return run_tiles<2, float, float>(job, schedule, task, scratch);
    case 4: return run_tiles<4, float, float>(job, schedule, task, scratch);
    default: return run_tiles<6, float, float>(job, schedule, task, scratch);
  }
}
#endif

void winograd_bfloat16(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  switch (job.layer.tile()) {
    case 2: return run_tiles<2, bf16, bf16>(job, schedule, task, scratch);
    case 4: return run_tiles<4, bf16, float>(job, schedule, task, scratch);
    default: return run_tiles<6, bf16, float>(job, schedule, task, scratch);
  }
}

}  // namespace advkd::ADVKD_ISA
