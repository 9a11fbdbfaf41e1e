// One vector type per instruction set, for kernels that are compiled once for each. Everything that a portable vector can say is
// said with GCC's and Clang's vector extensions (SSE2 and NEON come from the same source); intrinsics only where an instruction
// has no such form: fused multiply-add and bfloat16 products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace advkd::ADVKD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Registers for accumulators, beside those for weights and one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef float VUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t VU __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t VH __attribute__((vector_size(2 * kLanes)));
typedef std::uint16_t VHUnaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// bfloat16 and IEEE half precision as they lie in memory.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline V splat(float x) {
  return x - V{};
}

inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline V select(VI mask, V yes, V no) {
  return mask ? yes : no;
}

inline V maximum(V a, V b) {
  return a > b ? a : b;
}

inline V minimum(V a, V b) {
  return a < b ? a : b;
}

inline V load(const float* p) {
  return *reinterpret_cast<const VUnaligned*>(p);
}

inline void store(float* p, V x) {
  *reinterpret_cast<VUnaligned*>(p) = x;
}

// The one instruction where GCC makes several of the conversion.
inline VU words_of(VH halves) {
#if defined(__AVX512F__)
  return (VU)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)halves);
#elif defined(__AVX2__)
  return (VU)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, VU);
#endif
}

inline VH low_halves(VU words) {
#if defined(__AVX512F__)
  return (VH)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)words);
#else
  return __builtin_convertvector(words, VH);
#endif
}

inline V load(const bf16* p) {
  return (V)(words_of(*reinterpret_cast<const VHUnaligned*>(p)) << 16);
}

// Half precision's exponent is moved by a product with 2^112, which subnormal numbers survive.
inline V load(const f16* p) {
  const VH half = *reinterpret_cast<const VHUnaligned*>(p);
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, (__m256i)half);
#else
  const VU bits = words_of(half);
  const VU magnitude = (bits & 0x7FFFu) << 13;
  const VU finite = (VU)((V)magnitude * 0x1p112f);
  return (V)((magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite) | (bits & 0x8000u) << 16);
#endif
}

inline V narrow(V x, const float*) {
  return x;
}

// Round to nearest, ties to even; a NaN stays one.
inline VU bf16_words(V x) {
  const VU bits = (VU)x;
  const VU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const VU quiet = (bits >> 16) | 0x40u;
  return x == x ? rounded : quiet;
}

inline VH narrow(V x, const bf16*) {
#if defined(__AVX512BF16__)
  return (VH)_mm512_cvtneps_pbh(x);
#else
  return low_halves(bf16_words(x));
#endif
}

// The halves of a word of memory go to two vectors, or come from them: this needs no shuffles.
inline void load_even_odd(const bf16* p, V& even, V& odd) {
  VU words;
  std::memcpy(&words, p, sizeof words);
  even = (V)(words << 16);
  odd = (V)(words & 0xFFFF0000u);
}

inline VU narrow_even_odd(V even, V odd) {
  return bf16_words(even) | bf16_words(odd) << 16;
}

inline VH narrow(V x, const f16*) {
#if defined(__AVX512F__)
  return (VH)_mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT);
#else
  const VU bits = (VU)x & 0x7FFFFFFFu;
  const VU normal = (bits - 0x38000000u + 0x0FFFu + ((bits >> 13) & 1u)) >> 13;
  // The sum with 1/2 rounds to a multiple of 2^-24, the smallest subnormal number.
  const VU small = (VU)((V)bits + 0.5f) - 0x3F000000u;
  VU half = bits < 0x38800000u ? small : normal;
  half = bits >= 0x47800000u ? VU{} + 0x7C00u : half;
  half = bits > 0x7F800000u ? ((bits >> 13) & 0x3FFu) | 0x7E00u : half;
  return __builtin_convertvector(half | ((VU)x >> 16 & 0x8000u), VH);
#endif
}

inline void store(bf16* p, V x) {
  *reinterpret_cast<VHUnaligned*>(p) = narrow(x, p);
}

// Stores that leave the caches to what will be read again; the address must be aligned to the vector.
inline void store_past_caches(float* p, V x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, x);
#else
  store(p, x);
#endif
}

inline void store_past_caches(void* p, VH x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#else
  std::memcpy(p, &x, sizeof x);
#endif
}

inline void store_past_caches(void* p, VU x) {
  store_past_caches(static_cast<float*>(p), (V)x);
}

// Stores past the caches come before what follows.
inline void order_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline bool is_vector_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(V) == 0;
}

inline float to_float(float x) {
  return x;
}

inline float to_float(bf16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void from_float(float x, float& out) {
  out = x;
}

inline void from_float(float x, bf16& out) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

// A product consumes `step` channels of one pixel and `step` weights per lane at once: one for float, a pair for bf16.
template <typename P>
struct Product;

template <>
struct Product<float> {
  static constexpr int step = 1;
  using Weight = V;
  using Pixel = V;
  static Weight weight(const float* p) { return load(p); }
  static Pixel pixel(const float* p) { return splat(*p); }
  static V add(V sum, Weight w, Pixel x) { return fma(w, x, sum); }
};

template <>
struct Product<bf16> {
  static constexpr int step = 2;
  static VU pair(const bf16* p) {
    std::uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits - VU{};
  }
#if defined(__AVX512BF16__)
  using Weight = __m512bh;
  using Pixel = __m512bh;
  static Weight weight(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Pixel pixel(const bf16* p) { return (__m512bh)pair(p); }
  static V add(V sum, Weight w, Pixel x) { return _mm512_dpbf16_ps(sum, w, x); }
#else
  struct Weight {
    V even, odd;
  };
  using Pixel = Weight;
  static Weight split(VU bits) { return {(V)(bits << 16), (V)(bits & 0xFFFF0000u)}; }
  static Weight weight(const bf16* p) {
    VU bits;
    std::memcpy(&bits, p, sizeof bits);
    return split(bits);
  }
  static Pixel pixel(const bf16* p) { return split(pair(p)); }
  static V add(V sum, Weight w, Pixel x) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }
#endif
};

template <std::size_t... I>
inline V sum_of_pairs(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
}

// a0 + a1, a2 + a3, ..., b0 + b1, ...
inline V sum_of_pairs(V a, V b) {
  return sum_of_pairs(a, b, std::make_index_sequence<kLanes>{});
}

template <int kDistance, std::size_t... I>
inline V interleave_sum(V a, V b, std::index_sequence<I...>) {
  // Lane i of the sum holds a's partial sum where (i / kDistance) is even, b's where it is odd.
  const V low = __builtin_shufflevector(a, b, ((I / kDistance) % 2 ? kLanes + I - kDistance : I)...);
  const V high = __builtin_shufflevector(a, b, ((I / kDistance) % 2 ? kLanes + I : I + kDistance)...);
  return low + high;
}

typedef float V4 __attribute__((vector_size(16)));

template <int kFirst, typename X, std::size_t... I>
inline auto half(X x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, (kFirst + I)...);
}

// The upper half of the lanes is added to the lower one until four are left.
template <typename X>
inline V4 fold_to_four(X x) {
  constexpr int kHalf = sizeof(X) / sizeof(float) / 2;
  if constexpr (kHalf < 4) {
    return x;
  } else {
    constexpr auto lanes = std::make_index_sequence<kHalf>{};
    return fold_to_four(half<0>(x, lanes) + half<kHalf>(x, lanes));
  }
}

// The sums over lanes of four vectors.
inline void sum_lanes(const V (&x)[4], float* out) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  const V ab = interleave_sum<1>(x[0], x[1], lanes), cd = interleave_sum<1>(x[2], x[3], lanes);
  const V4 sums = fold_to_four(interleave_sum<2>(ab, cd, lanes));
  std::memcpy(out, &sums, sizeof sums);
}

// tanh, to an absolute error below 2^-22: below 0.625 an odd polynomial (a Chebyshev fit of (tanh x - x) / x^3 in x^2, itself off by
// 1e-8), above it 1 - 2 / (exp(2 |x|) + 1).
inline V tanh(V x) {
  const V magnitude = maximum(x, -x);
  const V w = x * x;
  V p = splat(-6.104359403e-3f);
  p = fma(p, w, splat(2.100312337e-2f));
  p = fma(p, w, splat(-5.385234579e-2f));
  p = fma(p, w, splat(1.333278120e-1f));
  p = fma(p, w, splat(-3.333332837e-1f));
  const V small = fma(p * w, x, x);
  // exp(t) = 2^k exp(r), r = t - k ln 2 in two parts, |r| <= ln 2 / 2; beyond t = 20 the result is 1 to rounding.
  const V t = minimum(magnitude + magnitude, splat(20.0f));
  const V k = __builtin_convertvector(__builtin_convertvector(fma(t, splat(1.44269504f), splat(0.5f)), VI), V);
  const V r = fma(k, splat(2.12194440e-4f), fma(k, splat(-0.693359375f), t));
  V e = splat(1.0f / 5040);
  e = fma(e, r, splat(1.0f / 720));
  e = fma(e, r, splat(1.0f / 120));
  e = fma(e, r, splat(1.0f / 24));
  e = fma(e, r, splat(1.0f / 6));
  e = fma(e, r, splat(0.5f));
  e = fma(e, r, splat(1.0f));
  e = fma(e, r, splat(1.0f));
  const V scale = (V)((__builtin_convertvector(k, VI) + 127) << 23);
  const V large = splat(1.0f) - splat(2.0f) / fma(e, scale, splat(1.0f));
  const V result = magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
  return x == x ? result : x;
}

}  // namespace advkd::ADVKD_ISA
