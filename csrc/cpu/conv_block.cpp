// The student's convolution, for one instruction set. Top-down: tables of taps, packing, then the three ways to compute a layer
// (dot, direct, Winograd), each as `run` of one task, then how a layer is cut into tasks.
//
// Tiling: a task owns a block of rows (groups of four pixels, or Winograd tiles) small enough that what it transforms stays in
// the second-level cache, and a range of (phase, panel of output channels). Weights are packed panel by panel in the order in
// which the product reads them, so they stream; Winograd transforms the block's inputs once, then per panel makes all points'
// products and transforms them back while they are still in cache.

#include "cpu/conv_block.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <type_traits>

#include "cpu/product.h"
#include "cpu/vector.h"
#include "cpu/winograd.h"

namespace advkd::ADVKD_ISA {
namespace {

// What a layer looks like to the kernels.

i64 padded(i64 channels) {
  return round_up(channels, 16);
}

i64 vectors(i64 channels) {
  return (channels + kLanes - 1) / kLanes;
}

// The rows of a 3-tap filter that phase 0 or 1 of an up-sampled axis uses on the low-resolution input; -1: no up-sampling.
void fold_taps(int phase, const double (&w)[3], double (&out)[3]) {
  out[0] = phase == 1 ? 0.0 : w[0];
  out[1] = phase == 0 ? w[1] + w[2] : phase == 1 ? w[0] + w[1] : w[1];
  out[2] = phase == 0 ? 0.0 : w[2];
}

void fold_filter(int phase, const float* weight, double (&out)[3][3]) {
  const int vertical = phase < 0 ? -1 : phase / 2, horizontal = phase < 0 ? -1 : phase % 2;
  double rows[3][3];
  for (int i = 0; i < 3; ++i) fold_taps(horizontal, {weight[3 * i], weight[3 * i + 1], weight[3 * i + 2]}, rows[i]);
  for (int j = 0; j < 3; ++j) {
    double column[3];
    fold_taps(vertical, {rows[0][j], rows[1][j], rows[2][j]}, column);
    for (int i = 0; i < 3; ++i) out[i][j] = column[i];
  }
}

// First and count of the taps (of 3) or points (of n) along an axis: a phase leaves out the last or the first.
struct Range {
  int first, count;
};

Range axis(int phase, int n) {
  return phase < 0 ? Range{0, n} : phase == 0 ? Range{0, n - 1} : Range{1, n - 1};
}

int phases(const ConvLayer& layer) {
  return layer.upsample ? 4 : 1;
}

// Phase number p of a layer as (vertical, horizontal), each -1 without up-sampling.
struct Phase {
  int vertical, horizontal;
};

Phase phase_of(const ConvLayer& layer, int p) {
  return layer.upsample ? Phase{p / 2, p % 2} : Phase{-1, -1};
}

// Panels of output channels: first vector and width of panel number `index`.
struct Panel {
  i64 first;
  int width;
};

Panel panel_of(i64 total, i64 index) {
  i64 first = 0;
  for (; index > 0; --index) first += panel_width(total - first);
  return {first, panel_width(total - first)};
}

i64 panel_count(i64 total) {
  i64 count = 0;
  for (i64 first = 0; first < total; first += panel_width(total - first)) ++count;
  return count;
}

// Channels that products of this layer go through: bfloat16 takes them in pairs.
i64 product_channels(const ConvLayer& layer) {
  return layer.products() == Storage::bfloat16 ? round_up(layer.c_in, 2) : layer.c_in;
}

// Matrices (taps or points) of packed weights per phase.
i64 matrices(const ConvLayer& layer) {
  const i64 side = layer.tile() ? layer.tile() + 2 : 3, used = layer.upsample ? side - 1 : side;
  return used * used;
}

// Packed: the header, the bias, the weights.
const float* packed_bias(const void* packed) {
  return reinterpret_cast<const float*>(static_cast<const char*>(packed) + sizeof(PackedHeader));
}

i64 leading_bytes(const ConvLayer& layer) {
  return static_cast<i64>(sizeof(PackedHeader)) + 4 * padded(layer.c_out);
}

template <typename P>
const P* packed_weights(const ConvJob& job) {
  return reinterpret_cast<const P*>(static_cast<const char*>(job.packed) + leading_bytes(job.layer));
}

PackedHeader header_of(const ConvLayer& layer) {
  return {kLanes, layer.c_in, layer.c_out, layer.upsample, static_cast<i64>(layer.storage), static_cast<i64>(layer.algorithm), 1, 0};
}

bool fits(const ConvLayer& layer, const void* packed) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof header);
  return header == header_of(layer);
}

// Packing.

i64 packed_bytes(const ConvLayer& layer) {
  if (layer.algorithm == Algorithm::dot) return leading_bytes(layer) + 9 * vectors(layer.c_in) * layer.c_out * kLanes * 4;
  const i64 numbers = phases(layer) * matrices(layer) * product_channels(layer) * vectors(layer.c_out) * kLanes;
  return leading_bytes(layer) + numbers * element_bytes(layer.products());
}

// [row of taps][vector of input channels][output channel][tap][lane]
void pack_dot(const ConvLayer& layer, const float* weight, float* out) {
  for (int dy = 0; dy < 3; ++dy)
    for (i64 c = 0; c < vectors(layer.c_in); ++c)
      for (i64 o = 0; o < layer.c_out; ++o)
        for (int dx = 0; dx < 3; ++dx)
          for (i64 lane = 0; lane < kLanes; ++lane) {
            const i64 channel = c * kLanes + lane;
            *out++ = channel < layer.c_in ? weight[(o * layer.c_in + channel) * 9 + 3 * dy + dx] : 0.0f;
          }
}

// The matrices of one phase and one pair of channels: its taps, or its points.
template <int m>
void filter_matrices(Phase phase, const double (&g)[3][3], double* out) {
  const Range rows = axis(phase.vertical, m + 2), columns = axis(phase.horizontal, m + 2);
  double half[3][m + 2];
  for (int i = 0; i < 3; ++i) {
    const auto values = Winograd<m>::filter(g[i][0], g[i][1], g[i][2]);
    std::copy(values.begin(), values.end(), half[i]);
  }
  for (int x = 0; x < columns.count; ++x) {
    const int j = columns.first + x;
    const auto values = Winograd<m>::filter(half[0][j], half[1][j], half[2][j]);
    for (int y = 0; y < rows.count; ++y) out[y * columns.count + x] = values[rows.first + y];
  }
}

void direct_matrices(Phase phase, const double (&g)[3][3], double* out) {
  const Range rows = axis(phase.vertical, 3), columns = axis(phase.horizontal, 3);
  for (int y = 0; y < rows.count; ++y)
    for (int x = 0; x < columns.count; ++x) *out++ = g[rows.first + y][columns.first + x];
}

// [phase][panel][matrix][step of input channels][vector of the panel][lane][channel of the step]
template <typename P>
void pack_products(const ConvLayer& layer, const float* weight, P* out) {
  constexpr int step = Product<P>::step;
  const i64 total = vectors(layer.c_out), count = matrices(layer), channels = product_channels(layer);
  for (int p = 0; p < phases(layer); ++p) {
    for (i64 first = 0; first < total; first += panel_width(total - first)) {
      const i64 width = panel_width(total - first) * kLanes;
      for (i64 o = 0; o < width; ++o)
        for (i64 c = 0; c < channels; ++c) {
          double values[64] = {};
          const i64 output = first * kLanes + o;
          if (output < layer.c_out && c < layer.c_in) {
            double g[3][3];
            fold_filter(layer.upsample ? p : -1, weight + (output * layer.c_in + c) * 9, g);
            const Phase phase = phase_of(layer, p);
            switch (layer.tile()) {
              case 2: filter_matrices<2>(phase, g, values); break;
              case 4: filter_matrices<4>(phase, g, values); break;
              case 6: filter_matrices<6>(phase, g, values); break;
              default: direct_matrices(phase, g, values);
            }
          }
          for (i64 matrix = 0; matrix < count; ++matrix)
            from_float(static_cast<float>(values[matrix]), out[(matrix * channels + c / step * step) * width + o * step + c % step]);
        }
      out += count * channels * width;
    }
  }
}

void pack(const ConvLayer& layer, const float* weight, const float* bias, void* packed) {
  const PackedHeader header = header_of(layer);
  std::memcpy(packed, &header, sizeof header);
  auto* padded_bias = reinterpret_cast<float*>(static_cast<char*>(packed) + sizeof header);
  std::fill(padded_bias, padded_bias + padded(layer.c_out), 0.0f);
  std::copy(bias, bias + layer.c_out, padded_bias);
  void* weights = padded_bias + padded(layer.c_out);
  if (layer.algorithm == Algorithm::dot) return pack_dot(layer, weight, static_cast<float*>(weights));
  if (layer.products() == Storage::bfloat16) return pack_products(layer, weight, static_cast<bf16*>(weights));
  pack_products(layer, weight, static_cast<float*>(weights));
}

// The epilogue.

struct Epilogue {
  Activation activation;
  float slope;
  V operator()(V x) const {
    if (activation == Activation::leaky_relu) return x > 0.0f ? x : x * slope;
    return activation == Activation::tanh ? tanh(x) : x;
  }
};

// Direct: pixels in groups of four along a row.

struct Group {
  i64 in, out;  // offsets of the first pixel
  int valid;
};

Group group_of(const ConvJob& job, i64 unit) {
  const ConvLayer& layer = job.layer;
  const i64 across = (layer.width + 3) / 4;
  const i64 image = unit / (layer.height * across), y = unit / across % layer.height, x = 4 * (unit % across);
  const i64 s = layer.scale();
  return {
      image * job.in.image() + (y + 1) * job.in.row() + (x + 1) * job.in.channels,
      image * job.out.image() + (s * y + 1) * job.out.row() + (s * x + 1) * job.out.channels,
      static_cast<int>(std::min<i64>(4, layer.width - x)),
  };
}

template <typename S, int N>
void direct_panel(const ConvJob& job, const Group* groups, i64 count, const Segments& taps, const S* weights, const float* bias, S* out) {
  const Epilogue epilogue{job.layer.activation, job.layer.slope};
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
void run_direct(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const ConvLayer& layer = job.layer;
  const i64 begin = task % schedule.blocks * schedule.block, end = std::min(begin + schedule.block, schedule.units);
  auto* groups = static_cast<Group*>(scratch);
  for (i64 unit = begin; unit < end; ++unit) groups[unit - begin] = group_of(job, unit);
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

// Winograd: tiles of m x m outputs (of the low-resolution grid where up-sampling).

struct Tile {
  i64 image, y, x;  // first output pixel
};

template <int m>
Tile tile_of(const ConvLayer& layer, i64 unit) {
  const i64 across = (layer.width + m - 1) / m, down = (layer.height + m - 1) / m;
  return {unit / (across * down), m * (unit / across % down), m * (unit % across)};
}

// A line of padding between points: without it all points of a channel fall into one set of the first-level cache.
template <typename T>
constexpr i64 kPointPadding = 64 / sizeof(T);

template <int m, typename S, typename P, bool edge>
void transform_input(const S* in, i64 row, i64 pixel, i64 rows, i64 columns, P* out, i64 point_stride) {
  constexpr int n = m + 2;
  V half[n][n];
#pragma GCC unroll 8
  for (int x = 0; x < n; ++x) {
    V d[n], t[n];
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y) d[y] = !edge || (y < rows && x < columns) ? load(in + y * row + x * pixel) : V{};
    Winograd<m>::input(d, t);
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 8
  for (int y = 0; y < n; ++y) {
    V t[n];
    Winograd<m>::input(half[y], t);
#pragma GCC unroll 8
    for (int x = 0; x < n; ++x) store(out + (y * n + x) * point_stride, t[x]);
  }
}

template <int m, typename S, typename P>
void transform_inputs(const ConvJob& job, i64 begin, i64 end, P* out, i64 point_stride) {
  const i64 channels = padded(job.layer.c_in);
  for (i64 unit = begin; unit < end; ++unit, out += channels) {
    const Tile tile = tile_of<m>(job.layer, unit);
    // The tile's halo begins at output pixel (y - 1, x - 1), which is memory pixel (y, x).
    const S* in = static_cast<const S*>(job.in.data) + tile.image * job.in.image() + tile.y * job.in.row() + tile.x * job.in.channels;
    const i64 rows = job.layer.height + 2 - tile.y, columns = job.layer.width + 2 - tile.x;
    const bool edge = rows < m + 2 || columns < m + 2;
    for (i64 c = 0; c < vectors(job.layer.c_in) * kLanes; c += kLanes) {
      if (edge)
        transform_input<m, S, P, true>(in + c, job.in.row(), job.in.channels, rows, columns, out + c, point_stride);
      else
        transform_input<m, S, P, false>(in + c, job.in.row(), job.in.channels, rows, columns, out + c, point_stride);
    }
  }
}

// The products of one tile, one vector of channels and phase (pv, ph) to m x m pixels.
template <int m, typename S, int pv, int ph>
void transform_output(const float* in, i64 point_stride, V bias, const Epilogue& epilogue, i64 rows, i64 columns, S* out, i64 row, i64 pixel) {
  constexpr int n = m + 2;
  constexpr int first_y = pv == 1, count_y = pv < 0 ? n : n - 1, first_x = ph == 1, count_x = ph < 0 ? n : n - 1;
  V half[m][n];
#pragma GCC unroll 8
  for (int x = 0; x < n; ++x) {
    if (x < first_x || x >= first_x + count_x) continue;
    V products[n], t[m];
#pragma GCC unroll 8
    for (int y = 0; y < n; ++y)
      products[y] = y < first_y || y >= first_y + count_y ? V{} : load(in + ((y - first_y) * count_x + x - first_x) * point_stride);
    Winograd<m>::template output<pv != 1, pv != 0>(products, t);
#pragma GCC unroll 8
    for (int y = 0; y < m; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 8
  for (int y = 0; y < m; ++y) {
    if (y >= rows) break;
    V t[m];
    Winograd<m>::template output<ph != 1, ph != 0>(half[y], t);
#pragma GCC unroll 8
    for (int x = 0; x < m; ++x)
      if (x < columns) store(out + y * row + x * pixel, epilogue(t[x] + bias));
  }
}

template <int m, typename S, int pv, int ph>
void transform_outputs(const ConvJob& job, i64 begin, i64 end, const Panel& panel, const float* in, i64 point_stride) {
  const ConvLayer& layer = job.layer;
  const i64 s = layer.scale();
  const Epilogue epilogue{layer.activation, layer.slope};
  for (i64 unit = begin; unit < end; ++unit, in += panel.width * kLanes) {
    const Tile tile = tile_of<m>(layer, unit);
    S* out = static_cast<S*>(job.out.data) + tile.image * job.out.image() + panel.first * kLanes;
    out += (s * tile.y + 1 + (pv > 0)) * job.out.row() + (s * tile.x + 1 + (ph > 0)) * job.out.channels;
    for (int j = 0; j < panel.width; ++j) {
      const V bias = load(packed_bias(job.packed) + (panel.first + j) * kLanes);
      transform_output<m, S, pv, ph>(
          in + j * kLanes, point_stride, bias, epilogue, layer.height - tile.y, layer.width - tile.x, out + j * kLanes,
          s * job.out.row(), s * job.out.channels);
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
  const Range rows = axis(phase.vertical, m + 2), columns = axis(phase.horizontal, m + 2);
  for (int y = 0; y < rows.count; ++y)
    for (int x = 0; x < columns.count; ++x) {
      const P* point = in + ((rows.first + y) * (m + 2) + columns.first + x) * in_stride;
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
void run_winograd(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
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

// Dot: few output channels, sums over vectors of input channels.

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
void run_dot(const ConvJob& job, i64 image, i64 y, float* scratch) {
  const ConvLayer& layer = job.layer;
  const i64 stride = round_up(layer.width, kLanes);
  const S* in = static_cast<const S*>(job.in.data) + image * job.in.image() + y * job.in.row();
  for (i64 x = 0; x < layer.width; x += 4) {
    float sums[4 * O];
    dot_pixels<S, O>(job, in + x * job.in.channels, sums);
    for (int o = 0; o < O; ++o) std::memcpy(scratch + o * stride + x, sums + 4 * o, 4 * sizeof(float));
  }
  const Epilogue epilogue{layer.activation, layer.slope};
  const float* bias = packed_bias(job.packed);
  for (int o = 0; o < O; ++o) {
    float* row = scratch + o * stride;
    for (i64 x = 0; x < layer.width; x += kLanes) store(row + x, epilogue(load(row + x) + splat(bias[o])));
    S* out = static_cast<S*>(job.planar) + ((image * O + o) * layer.height + y) * layer.width;
    for (i64 x = 0; x < layer.width; ++x) from_float(row[x], out[x]);
  }
}

template <typename S>
void run_dot(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const i64 begin = task * schedule.block, end = std::min(begin + schedule.block, schedule.units);
  for (i64 unit = begin; unit < end; ++unit) {
    const i64 image = unit / job.layer.height, y = unit % job.layer.height;
    auto* rows = static_cast<float*>(scratch);
    switch (job.layer.c_out) {
      case 1: run_dot<S, 1>(job, image, y, rows); break;
      case 2: run_dot<S, 2>(job, image, y, rows); break;
      case 3: run_dot<S, 3>(job, image, y, rows); break;
      default: run_dot<S, 4>(job, image, y, rows);
    }
  }
}

// Tasks.

i64 cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const i64 size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 512 << 10;
}

// Blocks of at most `largest` units, a multiple of `multiple`; with too few blocks for the threads, smaller ones and then chunks
// of output channels.
ConvSchedule cut(i64 units, i64 largest, i64 smallest, i64 pairs, i64 threads) {
  constexpr i64 kTasksPerThread = 4;
  const i64 wanted = threads == 1 ? 1 : kTasksPerThread * threads;
  const i64 block = std::clamp(round_up((units + wanted - 1) / wanted, smallest), smallest, std::max(smallest, largest));
  ConvSchedule schedule{units, block, (units + block - 1) / block, 1, 0};
  if (schedule.blocks < threads) schedule.chunks = std::min(pairs, (wanted + schedule.blocks - 1) / schedule.blocks);
  return schedule;
}

ConvSchedule schedule(const ConvLayer& layer, i64 images, i64 threads) {
  const i64 pairs = phases(layer) * panel_count(vectors(layer.c_out));
  if (layer.algorithm == Algorithm::dot) {
    ConvSchedule result = cut(images * layer.height, 64, 1, 1, threads);
    result.scratch_bytes = 4 * layer.c_out * round_up(layer.width, kLanes) + 4 * kLanes;
    return result;
  }
  const i64 budget = cache_bytes() * 5 / 8;
  const i64 m = layer.tile();
  if (m == 0) {
    const i64 units = images * layer.height * ((layer.width + 3) / 4);
    ConvSchedule result = cut(units, 96, 6, pairs, threads);
    result.scratch_bytes = result.block * static_cast<i64>(sizeof(Group));
    return result;
  }
  const i64 element = element_bytes(layer.products()), points = (m + 2) * (m + 2);
  const i64 tile_bytes = points * (padded(layer.c_in) * element + kMaxPanel * kLanes * 4);
  const i64 units = images * ((layer.height + m - 1) / m) * ((layer.width + m - 1) / m);
  ConvSchedule result = cut(units, std::clamp<i64>(budget / tile_bytes / 24 * 24, 24, 192), 12, pairs, threads);
  const i64 tiles = round_up(result.block, 4);
  result.scratch_bytes = points * ((tiles * padded(layer.c_in) * element + 64) + (tiles * kMaxPanel * kLanes * 4 + 64));
  return result;
}

template <int m>
void run_winograd(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  if (job.layer.storage == Storage::float32) return run_winograd<m, float, float>(job, schedule, task, scratch);
  run_winograd<m, bf16, std::conditional_t<m == 2, bf16, float>>(job, schedule, task, scratch);
}

void run(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  const bool single = job.layer.storage == Storage::float32;
  switch (job.layer.tile()) {
    case 2: return run_winograd<2>(job, schedule, task, scratch);
    case 4: return run_winograd<4>(job, schedule, task, scratch);
    case 6: return run_winograd<6>(job, schedule, task, scratch);
    default: break;
  }
  if (job.layer.algorithm == Algorithm::dot)
    return single ? run_dot<float>(job, schedule, task, scratch) : run_dot<bf16>(job, schedule, task, scratch);
  single ? run_direct<float>(job, schedule, task, scratch) : run_direct<bf16>(job, schedule, task, scratch);
}

// The borders of the engine.

template <typename S>
void import_image(const float* planar, i64 c, const Activations& out, i64 first, i64 image) {
  // Zeros up to the next vector: kernels read whole vectors of channels.
  const i64 end = std::min(round_up(first + c, 16), out.channels);
  for (i64 y = 0; y < out.height; ++y) {
    S* pixel = static_cast<S*>(out.data) + image * out.image() + (y + 1) * out.row() + out.channels;
    for (i64 x = 0; x < out.width; ++x, pixel += out.channels)
      for (i64 k = first; k < end; ++k)
        from_float(k < first + c ? planar[((k - first) * out.height + y) * out.width + x] : 0.0f, pixel[k]);
  }
}

void import_planar(const float* planar, i64 stride, i64 c, const Activations& out, Storage storage, i64 first, i64 image) {
  planar += image * stride;
  storage == Storage::float32 ? import_image<float>(planar, c, out, first, image) : import_image<bf16>(planar, c, out, first, image);
}

template <typename S>
void export_image(const Activations& in, i64 c, i64 image, S* planar) {
  planar += image * c * in.height * in.width;
  for (i64 k = 0; k < c; ++k)
    for (i64 y = 0; y < in.height; ++y) {
      const S* pixel = static_cast<const S*>(in.data) + image * in.image() + (y + 1) * in.row() + in.channels + k;
      for (i64 x = 0; x < in.width; ++x) *planar++ = pixel[x * in.channels];
    }
}

void export_planar(const Activations& in, Storage storage, i64 c, i64 image, void* planar) {
  storage == Storage::float32 ? export_image(in, c, image, static_cast<float*>(planar))
                              : export_image(in, c, image, static_cast<bf16*>(planar));
}

void clear_halo(const Activations& a, Storage storage, i64 image, i64 images) {
  const i64 bytes = element_bytes(storage), row = a.row() * bytes, pixel = a.channels * bytes;
  char* first = static_cast<char*>(a.data) + image * a.image() * bytes;
  // The right halo pixel of a row and the left one of the next are neighbours.
  std::memset(first, 0, row + pixel);
  for (i64 y = 1; y < a.height; ++y) std::memset(first + (y + 1) * row - pixel, 0, 2 * pixel);
  // Beyond the last image lie the pixels that a whole group of four may reach.
  std::memset(first + (a.height + 1) * row - pixel, 0, row + pixel + (image + 1 == images ? 4 * pixel : 0));
}

// The machine's own rate.

#if defined(__aarch64__)
#define ADVKD_IN_REGISTER(x) "+w"(x)
#elif defined(__AVX512F__)
#define ADVKD_IN_REGISTER(x) "+v"(x)
#elif defined(__x86_64__)
#define ADVKD_IN_REGISTER(x) "+x"(x)
#else
#define ADVKD_IN_REGISTER(x) "+m"(x)
#endif

template <typename P>
double measured_rate(double seconds) {
  using Op = Product<P>;
  alignas(64) P operands[32 * kLanes] = {};
  for (auto& x : operands) from_float(1e-3f, x);
  V sum[12] = {};
  const typename Op::Weight w = Op::weight(operands);
  const typename Op::Pixel x = Op::pixel(operands + 2);
  constexpr i64 kRounds = 4096;
  i64 rounds = 0;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  do {
    for (i64 i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) {
        sum[j] = Op::add(sum[j], w, x);
        // Each sum must pass through a register here, so no addition is merged with the next.
        asm volatile("" : ADVKD_IN_REGISTER(sum[j]));
      }
    }
    rounds += kRounds;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  } while (elapsed < seconds);
  return static_cast<double>(rounds) * 12 * kLanes * Op::step / elapsed;
}

double product_rate(Storage storage, double seconds) {
  return storage == Storage::float32 ? measured_rate<float>(seconds) : measured_rate<bf16>(seconds);
}

}  // namespace

#define ADVKD_TEXT_(x) #x
#define ADVKD_TEXT(x) ADVKD_TEXT_(x)

const ConvKernels conv_kernels{
    ADVKD_TEXT(ADVKD_ISA) + 4, packed_bytes, pack, fits, schedule, run, import_planar, export_planar, clear_halo, product_rate,
};

}  // namespace advkd::ADVKD_ISA
