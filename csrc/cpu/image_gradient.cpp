// The transposed convolution down to an image: every pixel gathers, tap by tap, the dot products of its channels' weights with a
// pixel of features.
//
// Lanes run over the features. Pixels of a row that are one stride apart have the same taps, and neighbouring pixels of features
// under them: four of them are made at once, so that a weight is loaded once for four products and a feature once for each of the
// image's channels. Lanes are added up at the end, four sums together.

#include "cpu/image_gradient.h"

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr int kPixels = 4;

// A tap, or a row of them: the features of the first pixel, and the weights.
struct Tap {
  const float* d;
  const float* weights;
};

constexpr int kMostTaps = 64;

// kCount pixels, `apart` numbers from each other in the image; their features are neighbours, `offset` numbers from the taps'.
template <int kChannels, int kCount, bool kWhole>
void pixels(const Tap* taps, int count, i64 offset, i64 features, float* out, i64 apart) {
  V sums[kChannels][kPixels] = {};
  float rest[kChannels][kPixels] = {};
  const i64 whole = features / kLanes * kLanes;
  for (int t = 0; t < count; ++t) {
    const float *d = taps[t].d + offset, *weights = taps[t].weights;
    for (i64 k = 0; k < whole; k += kLanes) {
      V x[kCount];
      for (int j = 0; j < kCount; ++j) x[j] = load(d + j * features + k);
      for (int c = 0; c < kChannels; ++c) {
        const V w = load(weights + c * features + k);
        for (int j = 0; j < kCount; ++j) sums[c][j] = fma(w, x[j], sums[c][j]);
      }
    }
    if (kWhole) continue;
    for (i64 k = whole; k < features; ++k)
      for (int c = 0; c < kChannels; ++c)
        for (int j = 0; j < kCount; ++j) rest[c][j] += weights[c * features + k] * d[j * features + k];
  }
  for (int c = 0; c < kChannels; ++c) {
    float total[kPixels];
    sum_lanes(sums[c], total);
    for (int j = 0; j < kCount; ++j) out[j * apart + c] = kWhole ? total[j] : total[j] + rest[c][j];
  }
}

// A kernel tap along one axis that pixels of a phase have, and the feature pixel under the phase's first one: pixel j of the phase
// has feature pixel `source + j`, where there is one.
struct AxisTap {
  i64 tap, source;
};

// Fills `found` with the taps of the pixels phase, phase + stride, ...: coordinate + padding = stride * source + dilation * tap.
int find_axis_taps(const ImageGradient& s, int axis, i64 phase, AxisTap* found) {
  int count = 0;
  for (i64 tap = 0; tap < s.kernel[axis]; ++tap) {
    const i64 place = phase + s.padding[axis] - tap * s.dilation[axis];
    const i64 source = (place >= 0 ? place : place - s.stride[axis] + 1) / s.stride[axis];
    if (place == source * s.stride[axis]) found[count++] = {tap, source};
  }
  return count;
}

template <int kChannels, bool kWhole>
class Row {
 public:
  Row(const ImageGradient& s, i64 row) : s_(s) {
    const i64 image = row / s.height, y = row % s.height;
    out_ = s.out + row * s.width * kChannels;
    AxisTap taps[kMostTaps];
    const int count = find_axis_taps(s, 0, y, taps);
    for (int i = 0; i < count; ++i) {
      if (taps[i].source < 0 || taps[i].source >= s.rows) continue;
      rows_[row_count_].d = s.d + (image * s.rows + taps[i].source) * s.columns * s.features;
      rows_[row_count_++].weights = s.weights + taps[i].tap * s.kernel[1] * kChannels * s.features;
    }
  }

  void make() {
    for (i64 phase = 0; phase < s_.stride[1] && phase < s_.width; ++phase) make_phase(phase);
  }

 private:
  // Pixels that have all their feature pixels in groups, the others one by one.
  void make_phase(i64 phase) {
    column_count_ = find_axis_taps(s_, 1, phase, columns_);
    const i64 count = (s_.width - phase + s_.stride[1] - 1) / s_.stride[1];
    i64 first = 0, last = count;
    for (int i = 0; i < column_count_; ++i) {
      if (first < -columns_[i].source) first = -columns_[i].source;
      if (last > s_.columns - columns_[i].source) last = s_.columns - columns_[i].source;
    }
    i64 j = 0;
    for (; j < count && j < first; ++j) make_pixels<1>(phase, j, j + 1);
    if (j + kPixels <= last) j = make_pixels<kPixels>(phase, j, last);
    for (; j < count; ++j) make_pixels<1>(phase, j, j + 1);
  }

  // Groups of kCount pixels from `j` on while they end before `last`; the first pixel that is left.
  template <int kCount>
  i64 make_pixels(i64 phase, i64 j, i64 last) {
    Tap taps[kMostTaps];
    int count = 0;
    for (int r = 0; r < row_count_; ++r)
      for (int i = 0; i < column_count_; ++i) {
        const i64 source = columns_[i].source + j;
        if (source < 0 || source >= s_.columns) continue;
        taps[count++] = {rows_[r].d + source * s_.features, rows_[r].weights + columns_[i].tap * kChannels * s_.features};
      }
    const i64 apart = s_.stride[1] * kChannels;
    float* out = out_ + phase * kChannels + j * apart;
    for (i64 offset = 0; j + kCount <= last; j += kCount, offset += kCount * s_.features, out += kCount * apart)
      pixels<kChannels, kCount, kWhole>(taps, count, offset, s_.features, out, apart);
    return j;
  }

  const ImageGradient& s_;
  float* out_;
  Tap rows_[kMostTaps];
  AxisTap columns_[kMostTaps];
  int row_count_ = 0, column_count_ = 0;
};

template <int kChannels>
void make_rows(const ImageGradient& s, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    if (s.features % kLanes == 0) {
      Row<kChannels, true>(s, row).make();
    } else {
      Row<kChannels, false>(s, row).make();
    }
  }
}

}  // namespace

void image_gradient(const ImageGradient& s, i64 begin, i64 end) {
  static constexpr ImageGradientKernel kernels[] = {make_rows<1>, make_rows<2>, make_rows<3>, make_rows<4>};
  kernels[s.channels - 1](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
