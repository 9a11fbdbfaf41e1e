// Groups of four vectors and their mask bytes, for kernels that are compiled once per instruction set. The rest of a run
// goes through a group in a buffer.
#pragma once

#include <bit>
#include <type_traits>

#include "cpu/pieces.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

constexpr int kGroupVectors = 4, kGroup = kGroupVectors * kLanes;

// A group's bits, as they lie in memory.
using MaskBits = std::conditional_t<kGroup == 64, std::uint64_t, std::conditional_t<kGroup == 32, std::uint32_t, std::uint16_t>>;
static_assert(std::endian::native == std::endian::little, "bit i of byte j must be bit 8 j + i of the number");

template <typename T>
inline void put(T* p, V x) {
  const auto narrowed = narrow(x, p);
  std::memcpy(p, &narrowed, sizeof narrowed);
}

// One truth value per lane, and bit i of a number for lane i.
#if defined(__AVX512F__)
using Lanes = __mmask16;

inline Lanes is_positive(V x) {
  return _mm512_cmp_ps_mask(x, V{}, _CMP_GT_OQ);
}

inline std::uint32_t bits_of(Lanes lanes) {
  return lanes;
}

inline Lanes lanes_of(std::uint32_t bits) {
  return static_cast<Lanes>(bits);
}

inline V select(Lanes lanes, V yes, V no) {
  return _mm512_mask_blend_ps(lanes, no, yes);
}
#else
using Lanes = VI;

template <std::size_t... I>
inline VI places(std::index_sequence<I...>) {
  return VI{1 << I...};
}

inline Lanes is_positive(V x) {
  return x > 0.0f;
}

inline std::uint32_t bits_of(Lanes lanes) {
#if defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps((V)lanes));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps((V)lanes));
#else
  const VI set = lanes & places(std::make_index_sequence<kLanes>{});
  std::int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= set[i];
  return static_cast<std::uint32_t>(bits);
#endif
}

inline Lanes lanes_of(std::uint32_t bits) {
  return ((static_cast<std::int32_t>(bits) - VI{}) & places(std::make_index_sequence<kLanes>{})) != 0;
}
#endif

// Calls body(sample, first element, elements) for pieces begin .. end - 1 of all samples' pieces, in order.
template <typename Body>
inline void for_each_piece(const Pieces& p, i64 begin, i64 end, const Body& body) {
  const i64 per_sample = p.per_sample();
  for (i64 item = begin; item < end; ++item) {
    const i64 first = item % per_sample * p.piece;
    body(item / per_sample, first, p.count - first < p.piece ? p.count - first : p.piece);
  }
}

}  // namespace advkd::ADVKD_ISA
