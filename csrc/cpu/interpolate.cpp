// a real + (1 - a) fake, one weight per sample, and beside it copies of both where the caller wants them in one batch.
//
// Bound by memory: one pass. A piece fits the first-level cache, so that its copies and its points read memory once. Products and
// sum in the reference's order and without contraction: every instruction set gives the same bits.

#include "cpu/interpolate.h"

#include "cpu/elements.h"

namespace advkd::ADVKD_ISA {
namespace {

template <typename T>
inline void point(const T* real, const T* fake, V a, V b, T* out) {
  put(out, a * load(real) + b * load(fake));
}

template <typename T>
void run(const T* real, const T* fake, float a, T* out, i64 count) {
  const V weight = splat(a), other = splat(1.0f - a);
  i64 i = 0;
  for (; i + kLanes <= count; i += kLanes) point(real + i, fake + i, weight, other, out + i);
  if (i == count) return;
  T rest_real[kLanes] = {}, rest_fake[kLanes] = {};
  std::memcpy(rest_real, real + i, (count - i) * sizeof(T));
  std::memcpy(rest_fake, fake + i, (count - i) * sizeof(T));
  point(rest_real, rest_fake, weight, other, rest_real);
  std::memcpy(out + i, rest_real, (count - i) * sizeof(T));
}

template <typename T>
void make_pieces(const Interpolate& s, i64 begin, i64 end) {
  const i64 count = s.pieces.count, all = s.pieces.samples * count;
  for_each_piece(s.pieces, begin, end, [&](i64 sample, i64 first, i64 size) {
    const i64 place = sample * count + first;
    const T *real = static_cast<const T*>(s.real) + place, *fake = static_cast<const T*>(s.fake) + place;
    T* out = static_cast<T*>(s.out) + place;
    if (s.merge) {
      std::memcpy(out, real, size * sizeof(T));
      std::memcpy(out + all, fake, size * sizeof(T));
      out += 2 * all;
    }
    run(real, fake, interpolation_weight(s, sample), out, size);
  });
}

}  // namespace

void interpolate(const Interpolate& s, i64 begin, i64 end) {
  static constexpr InterpolateKernel kernels[] = {make_pieces<float>, make_pieces<bf16>, make_pieces<f16>};
  kernels[static_cast<int>(s.dtype)](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
