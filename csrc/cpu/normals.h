// Philox words and standard normals in vector registers; included by kernels that are compiled once per instruction set.
//
// kLanes blocks are drawn at once. A counter word lives in the low half of a 64-bit lane, blocks of even number in one register
// and those of odd number in another: the widening product is then one instruction and nothing is shuffled between rounds (what
// is left in the upper halves is never read). Logarithm, sine and cosine are short Taylor series after an exact range reduction:
// libm is neither vectorised nor the same everywhere. Compiled without FMA contraction, every instruction set gives the same bits.
#pragma once

#include "common/philox.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

typedef u64 VL __attribute__((vector_size(4 * kLanes)));

// The 64-bit products of the lanes' low halves with k.
inline VL multiply(VL a, u32 k) {
  const VL b = u64{k} - VL{};
#if defined(__AVX512F__)
  return (VL)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);  // unmasked, GCC 12 warns of its own header
#elif defined(__AVX2__)
  return (VL)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VL)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (VL)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

inline V square_root(V x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xFFFF, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#elif defined(__aarch64__)
  return vsqrtq_f32(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

template <std::size_t... I>
inline VL even_numbers(std::index_sequence<I...>) {
  return VL{2 * I...};
}

// The four words of blocks first, first + 1, ..., first + kLanes - 1 of a sample.
inline void draw_words(u64 index, u32 first, const PhiloxParameters& p, VU (&words)[4]) {
  VL c[4][2];
  for (int half = 0; half < 2; ++half) {
    c[0][half] = even_numbers(std::make_index_sequence<kLanes / 2>{}) + (u64{first} + half);
    c[1][half] = static_cast<u32>(index) - VL{};
    c[2][half] = static_cast<u32>(index >> 32) - VL{};
    c[3][half] = p.stream_step - VL{};
  }
  u32 k0 = p.key0, k1 = p.key1;
  for (int round = 0; round < 10; ++round) {
    for (int half = 0; half < 2; ++half) {
      const VL p0 = multiply(c[0][half], 0xD2511F53u), p1 = multiply(c[2][half], 0xCD9E8D57u);
      c[0][half] = (p1 >> 32) ^ c[1][half] ^ (u64{k0} - VL{});
      c[1][half] = p1;
      c[2][half] = (p0 >> 32) ^ c[3][half] ^ (u64{k1} - VL{});
      c[3][half] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int j = 0; j < 4; ++j) words[j] = (VU)((c[j][0] & 0xFFFFFFFFu) | (c[j][1] << 32));
}

// ln(k 2^-24) for k in [1, 2^24]: k = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)).
inline V log_uniform(VU k) {
  const V x = __builtin_convertvector((VI)k, V);
  const VI e = (VI)((VU)x - 0x3F3504F3u) >> 23;  // sqrt(1/2)
  const V m = (V)((VI)x - (e << 23));
  const V s = (m - 1.0f) / (m + 1.0f);
  const V w = s * s;
  const V series = w * (2.0f / 3 + w * (2.0f / 5 + w * (2.0f / 7 + w * (2.0f / 9))));
  return __builtin_convertvector(e - 24, V) * 0.693147180559945f + (2.0f * s + s * series);
}

// Cosine and sine of an angle in [0, 2 pi]: quarter turns are taken off exactly (pi / 2 in two parts).
inline void cos_sin(V angle, V& cosine, V& sine) {
  const VI q = __builtin_convertvector(angle * 0.636619772367581f + 0.5f, VI);
  const V turns = __builtin_convertvector(q, V);
  const V r = (angle - turns * 1.5703125f) - turns * 4.83826794897e-4f;
  const V w = r * r;
  const V s = r + r * w * (-1.0f / 6 + w * (1.0f / 120 + w * (-1.0f / 5040 + w * (1.0f / 362880))));
  const V c = 1.0f + w * (-0.5f + w * (1.0f / 24 + w * (-1.0f / 720 + w * (1.0f / 40320 + w * (-1.0f / 3628800)))));
  const VI odd = (q & 1) != 0;
  const V a = select(odd, s, c), b = select(odd, c, s);
  cosine = select(((q + 1) & 2) != 0, -a, a);
  sine = select((q & 2) != 0, -b, b);
}

inline void box_muller(VU radius_word, VU angle_word, V& first, V& second) {
  const V radius = square_root(-2.0f * log_uniform((radius_word >> 8) + 1u));
  const V u2 = __builtin_convertvector((VI)(angle_word >> 8), V) * 0x1p-24f;
  V cosine, sine;
  cos_sin(6.28318530717958647f * u2, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

// a0 b0 a1 b1 ...: the lower halves of a and b, and the upper ones.
template <std::size_t... I>
inline void zip(V a, V b, V& low, V& high, std::index_sequence<I...>) {
  low = __builtin_shufflevector(a, b, (I % 2 ? kLanes + I / 2 : I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 ? kLanes + (kLanes + I) / 2 : (kLanes + I) / 2)...);
}

// Normals number 4 first, ..., 4 first + 4 kLanes - 1 of a sample, in order.
inline void draw_normals(u64 index, u32 first, const PhiloxParameters& p, float* out) {
  VU words[4];
  draw_words(index, first, p, words);
  V n[4], even[2], odd[2], low, high;
  box_muller(words[0], words[1], n[0], n[1]);
  box_muller(words[2], words[3], n[2], n[3]);
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  zip(n[0], n[2], even[0], even[1], lanes);
  zip(n[1], n[3], odd[0], odd[1], lanes);
  for (int half = 0; half < 2; ++half) {
    zip(even[half], odd[half], low, high, lanes);
    store(out + 2 * half * kLanes, low);
    store(out + (2 * half + 1) * kLanes, high);
  }
}

}  // namespace advkd::ADVKD_ISA
