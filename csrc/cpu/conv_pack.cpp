// Packing a layer's weights: taps or Winograd's points of each phase, panel by panel.

#include <algorithm>
#include <cstring>

#include "cpu/conv_units.h"
#include "cpu/winograd.h"

#if !defined(ADVKD_BFLOAT16_ALONE)

namespace advkd::ADVKD_ISA {
namespace {

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

PackedHeader header_of(const ConvLayer& layer) {
  return {kLanes, layer.c_in, layer.c_out, layer.upsample, static_cast<i64>(layer.storage), static_cast<i64>(layer.algorithm), 1, 0};
}

// [row of taps][vector of input channels][output channel][tap][lane]
void pack_dot(const ConvLayer& layer, const float* weight, float* out) {
  for (int dy = 0; dy < 3; ++dy)
    for (i64 c = 0; c < vectors(layer.c_in); ++c)
      for (i64 o = 0; o < layer.c_out; ++o)
        for (int dx = 0; dx < 3; ++dx) {
          const float* taps = weight + (o * layer.c_in + c * kLanes) * 9 + 3 * dy + dx;
          for (i64 lane = 0; lane < kLanes; ++lane) *out++ = c * kLanes + lane < layer.c_in ? taps[9 * lane] : 0.0f;
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
          double values[64];
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
          } else {
            std::fill_n(values, count, 0.0);
          }
          for (i64 matrix = 0; matrix < count; ++matrix)
            from_float(static_cast<float>(values[matrix]), out[(matrix * channels + c / step * step) * width + o * step + c % step]);
        }
      out += count * channels * width;
    }
  }
}

}  // namespace

i64 packed_bytes(const ConvLayer& layer) {
  if (layer.algorithm == Algorithm::dot) return leading_bytes(layer) + 9 * vectors(layer.c_in) * layer.c_out * kLanes * 4;
  const i64 numbers = phases(layer) * matrices(layer) * product_channels(layer) * vectors(layer.c_out) * kLanes;
  return leading_bytes(layer) + numbers * element_bytes(layer.products());
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

bool fits(const ConvLayer& layer, const void* packed) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof header);
  return header == header_of(layer);
}

}  // namespace advkd::ADVKD_ISA

#endif
