// x where the mask's bit is set, slope x elsewhere.
//
// Bound by memory: one pass, four vectors and the number that is their mask at a time. With AVX-512 sixteen bits of it are a
// vector's mask register; else they are spread over the lanes and each keeps its own. A piece begins at a byte of the mask, so
// that threads share none.

#include "cpu/mask_mul.h"

#include "cpu/elements.h"

namespace advkd::ADVKD_ISA {
namespace {

template <typename T>
inline void group(const T* x, MaskBits bits, V slope, T* out) {
  for (int v = 0; v < kGroupVectors; ++v) {
    const V value = load(x + v * kLanes);
    const Lanes kept = lanes_of(static_cast<std::uint32_t>(bits >> (v * kLanes)));
    put(out + v * kLanes, select(kept, value, slope * value));
  }
}

template <typename T>
void run(const T* x, const std::uint8_t* mask, V slope, T* out, i64 count) {
  MaskBits bits = 0;
  i64 i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    std::memcpy(&bits, mask + i / 8, sizeof bits);
    group(x + i, bits, slope, out + i);
  }
  if (i == count) return;
  T rest[kGroup] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(T));
  std::memcpy(&bits, mask + i / 8, (count - i + 7) / 8);
  group(rest, bits, slope, rest);
  std::memcpy(out + i, rest, (count - i) * sizeof(T));
}

template <typename T>
void make_pieces(const MaskMul& s, i64 begin, i64 end) {
  const i64 count = s.pieces.count, row = (count + 7) / 8;
  for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
    const i64 place = sample * count + first;
    const std::uint8_t* mask = s.mask + sample * row + first / 8;
    run(static_cast<const T*>(s.x) + place, mask, splat(s.slope), static_cast<T*>(s.out) + place, size);
  });
}

}  // namespace

void mask_mul(const MaskMul& s, i64 begin, i64 end) {
  static constexpr MaskMulKernel kernels[] = {make_pieces<float>, make_pieces<bf16>, make_pieces<f16>};
  kernels[static_cast<int>(s.dtype)](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
