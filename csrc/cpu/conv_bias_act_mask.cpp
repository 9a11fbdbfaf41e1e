// y = p + bias, out = y > 0 ? y : slope y, and one bit y > 0 per element: the epilogue of a convolution.
//
// Bound by memory: one pass, four vectors at a time, whose comparisons make one number of the mask. The bias is one register while
// a channel's plane lasts. Where elements of several channels share a vector, in channels_last and in planes of odd sizes, the
// piece's biases lie in a buffer of the first-level cache in the order of memory; in channels_last it is filled once, since a
// piece holds whole pixels.

#include "cpu/conv_bias_act_mask.h"

#include <vector>

#include "cpu/elements.h"

namespace advkd::ADVKD_ISA {
namespace {

struct NoBias {
  V add(V x, i64) const { return x; }
};

struct OneBias {
  V value;
  V add(V x, i64) const { return x + value; }
};

struct ManyBiases {
  const float* values;
  V add(V x, i64 i) const { return x + load(values + i); }
};

// Elements i .. i + kGroup - 1 of a run, and their mask.
template <typename T, typename Bias>
inline MaskBits group(const T* p, const Bias& bias, i64 i, V slope, T* out) {
  MaskBits bits = 0;
  for (int v = 0; v < kGroupVectors; ++v) {
    const V y = bias.add(load(p + v * kLanes), i + v * kLanes);
    const Lanes positive = is_positive(y);
    put(out + v * kLanes, select(positive, y, slope * y));
    bits |= static_cast<MaskBits>(static_cast<MaskBits>(bits_of(positive)) << (v * kLanes));
  }
  return bits;
}

template <typename T, typename Bias>
void run(const T* p, const Bias& bias, V slope, T* out, std::uint8_t* mask, i64 count) {
  i64 i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    const MaskBits bits = group(p + i, bias, i, slope, out + i);
    std::memcpy(mask + i / 8, &bits, sizeof bits);
  }
  if (i == count) return;
  T rest[kGroup] = {};
  std::memcpy(rest, p + i, (count - i) * sizeof(T));
  const MaskBits bits = group(rest, bias, i, slope, rest) & static_cast<MaskBits>((MaskBits{1} << (count - i)) - 1);
  std::memcpy(out + i, rest, (count - i) * sizeof(T));
  std::memcpy(mask + i / 8, &bits, (count - i + 7) / 8);
}

// Room for what a group reads beyond a buffer's last element.
std::vector<float> buffer(i64 count) {
  return std::vector<float>(count + kGroup);
}

template <typename T>
std::vector<float> widened(const T* values, i64 count) {
  std::vector<float> wide = buffer(count);
  for (i64 i = 0; i < count; i += kLanes) {
    T part[kLanes] = {};
    std::memcpy(part, values + i, std::min<i64>(kLanes, count - i) * sizeof(T));
    store(wide.data() + i, load(part));
  }
  return wide;
}

// All channels again and again.
void repeat(const std::vector<float>& bias, i64 channels, float* values, i64 count) {
  std::memcpy(values, bias.data(), channels * sizeof(float));
  for (i64 filled = channels; filled < count; filled *= 2)
    std::memcpy(values + filled, values, std::min(filled, count - filled) * sizeof(float));
}

// Calls body(channel, offset, elements) for the planes, or parts of them, that a piece consists of.
template <typename Body>
void for_each_plane(const BiasActMask& s, i64 first, i64 size, const Body& body) {
  i64 plane = first / s.plane, end = (plane + 1) * s.plane - first;
  for (i64 offset = 0; offset < size; offset = end, end += s.plane, ++plane)
    body(plane % s.channels, offset, std::min(end, size) - offset);
}

template <typename T>
void make_pieces(const BiasActMask& s, i64 begin, i64 end) {
  const i64 count = s.pieces.count, row = (count + 7) / 8;
  const V slope = splat(s.slope);
  const auto make = [&](i64 sample, i64 first, i64 size, const auto& bias) {
    const i64 place = sample * count + first;
    run(static_cast<const T*>(s.p) + place, bias, slope, static_cast<T*>(s.out) + place, s.mask + sample * row + first / 8, size);
  };
  if (!s.bias) {
    for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) { make(sample, first, size, NoBias{}); });
    return;
  }
  const std::vector<float> bias = widened(static_cast<const T*>(s.bias), s.channels);
  if (s.plane % kGroup == 0) {
    for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
      for_each_plane(s, first, size, [&](i64 channel, i64 offset, i64 part) {
        make(sample, first + offset, part, OneBias{splat(bias[channel])});
      });
    });
    return;
  }
  const i64 largest = std::min(s.pieces.piece, count);
  std::vector<float> values = buffer(largest);
  if (s.plane == 1) repeat(bias, s.channels, values.data(), largest);
  for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
    if (s.plane > 1)
      for_each_plane(s, first, size, [&](i64 channel, i64 offset, i64 part) {
        std::fill_n(values.data() + offset, part, bias[channel]);
      });
    make(sample, first, size, ManyBiases{values.data()});
  });
}

}  // namespace

void conv_bias_act_mask(const BiasActMask& s, i64 begin, i64 end) {
  static constexpr BiasActMaskKernel kernels[] = {make_pieces<float>, make_pieces<bf16>, make_pieces<f16>};
  kernels[static_cast<int>(s.dtype)](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
