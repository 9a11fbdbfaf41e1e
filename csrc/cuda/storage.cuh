// How kernels on NVIDIA GPUs keep elements in memory: float32, bfloat16 or float16 storage of float32 values, and groups of
// elements, read and written as one vector where alignment allows it. No Torch and no standard library.
#pragma once

#include "common/philox.h"

// One instruction from sm_80 on rounds two values, with the same result as one by one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define ADVKD_ENCODES_PAIRS
#endif

namespace advkd {

struct f32 {
  using Bits = float;
  ADVKD_INLINE float decode(float x) { return x; }
  ADVKD_INLINE float encode(float x) { return x; }
};

struct bf16 {
  using Bits = unsigned short;
  ADVKD_INLINE float decode(unsigned short bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
  ADVKD_INLINE unsigned short encode(float x) {
    const u32 bits = __float_as_uint(x);
    const u32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return static_cast<unsigned short>(x == x ? rounded : 0x7FFFu);
  }
#ifdef ADVKD_ENCODES_PAIRS
  ADVKD_INLINE u32 encode_pair(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
  }
#endif
};

struct f16 {
  using Bits = unsigned short;
  ADVKD_INLINE float decode(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
  ADVKD_INLINE unsigned short encode(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
  }
#ifdef ADVKD_ENCODES_PAIRS
  ADVKD_INLINE u32 encode_pair(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
  }
#endif
};

template <typename Bits, int kGroup>
struct alignas(sizeof(Bits) * kGroup < 16 ? sizeof(Bits) * kGroup : 16) Vector {
  Bits bits[kGroup];
};

template <typename T, int kGroup>
using Group = Vector<typename T::Bits, kGroup>;

// Up to a group of elements, neighbours in memory: `left` of them from `place` on, all as one vector where `vector` says so.
struct Span {
  i64 place;
  int left;
  bool vector;
};

ADVKD_INLINE Span span(i64 place, i64 left, int group, bool vectors) {
  return {place, static_cast<int>(left < group ? left : group), vectors && left >= group};
}

template <typename T, int kGroup>
ADVKD_INLINE Group<T, kGroup> load_bits(const void* tensor, const Span& at) {
  const auto* from = static_cast<const typename T::Bits*>(tensor) + at.place;
  Group<T, kGroup> group = {};
  if (at.vector) {
    group = *reinterpret_cast<const Group<T, kGroup>*>(from);
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < at.left) group.bits[i] = from[i];
  }
  return group;
}

template <typename T, int kGroup>
ADVKD_INLINE void store_bits(void* tensor, const Span& at, const Group<T, kGroup>& group) {
  static_assert(kGroup == 1 || sizeof(group) % 16 == 0, "a group is one element or whole vectors of 16 bytes");
  auto* to = static_cast<typename T::Bits*>(tensor) + at.place;
  if (kGroup > 1 && at.vector) {
    constexpr int kVectors = kGroup > 1 ? sizeof(group) / 16 : 1;
    union {
      Group<T, kGroup> group;
      uint4 vectors[kVectors];
    } whole = {group};
    // An assignment would do, but the compiler finds the elements below in it and stores them one by one.
    for (int i = 0; i < kVectors; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, whole.vectors[i]);
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < at.left) to[i] = group.bits[i];
  }
}

template <typename T, int kGroup>
ADVKD_INLINE void decode(const Group<T, kGroup>& group, float (&to)[kGroup]) {
  for (int i = 0; i < kGroup; ++i) to[i] = T::decode(group.bits[i]);
}

template <typename T, int kGroup>
ADVKD_INLINE Group<T, kGroup> encode(const float (&values)[kGroup]) {
  union {
    u32 pairs[(kGroup + 1) / 2];
    Group<T, kGroup> group;
  } whole;
#ifdef ADVKD_ENCODES_PAIRS
  constexpr bool kPairs = sizeof(typename T::Bits) == 2 && kGroup % 2 == 0;
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
    for (int i = 0; i < kGroup; i += 2) whole.pairs[i / 2] = T::encode_pair(values[i], values[i + 1]);
  } else {
    for (int i = 0; i < kGroup; ++i) whole.group.bits[i] = T::encode(values[i]);
  }
  return whole.group;
}

template <typename T, int kGroup>
ADVKD_INLINE void load(const void* tensor, const Span& at, float (&to)[kGroup]) {
  decode<T>(load_bits<T, kGroup>(tensor, at), to);
}

template <typename T, int kGroup>
ADVKD_INLINE void store(void* tensor, const Span& at, const float (&values)[kGroup]) {
  store_bits<T>(tensor, at, encode<T>(values));
}

}  // namespace advkd

// Entry points by dtype. A compilation of some of a source's variants defines ADVKD_VARIANTS.
#define ADVKD_DTYPES(EACH) EACH(f32) EACH(bf16) EACH(f16)
