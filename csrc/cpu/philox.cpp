// Philox normals. A tile of 64 blocks is drawn lane by lane into structure-of-arrays buffers that fit the first-level cache, so
// that every loop below is a plain one over lanes and the compiler vectorises it for the instruction set of this object.
// Logarithm, sine and cosine are short Taylor series after an exact range reduction: libm is neither vectorised nor the same
// everywhere. Compiled without FMA contraction, every instruction set gives the same bits.

#include "cpu/philox.h"

#include <cstring>

namespace advkd::ADVKD_ISA {
namespace {

constexpr int kLanes = static_cast<int>(kPhiloxTile);

struct Words {
  alignas(64) u32 w[4][kLanes];
};

void draw(std::uint64_t index, i64 tile, const PhiloxParameters& p, Words& words) {
  const u32 first = static_cast<u32>(tile * kPhiloxTile);
  const u32 low = static_cast<u32>(index), high = static_cast<u32>(index >> 32);
  for (int i = 0; i < kLanes; ++i) {
    u32 c[4] = {first + static_cast<u32>(i), low, high, p.stream_step};
    philox_rounds(c, p.key0, p.key1);
    for (int j = 0; j < 4; ++j) words.w[j][i] = c[j];
  }
}

// ln(k 2^-24) for k in [1, 2^24]: k = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)).
inline float log_uniform(u32 k) {
  const float x = static_cast<float>(static_cast<std::int32_t>(k));
  u32 bits;
  std::memcpy(&bits, &x, 4);
  const u32 shifted = bits - 0x3F3504F3u;  // sqrt(1/2)
  const std::int32_t e = static_cast<std::int32_t>(shifted) >> 23;
  bits -= static_cast<u32>(e) << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float w = s * s;
  const float series = w * (2.0f / 3 + w * (2.0f / 5 + w * (2.0f / 7 + w * (2.0f / 9))));
  return static_cast<float>(e - 24) * 0.693147180559945f + (2.0f * s + s * series);
}

// Cosine and sine of an angle in [0, 2 pi]: quarter turns are taken off exactly (pi / 2 in two parts).
inline void cos_sin(float angle, float& cosine, float& sine) {
  const std::int32_t q = static_cast<std::int32_t>(angle * 0.636619772367581f + 0.5f);
  const float turns = static_cast<float>(q);
  const float r = (angle - turns * 1.5703125f) - turns * 4.83826794897e-4f;
  const float w = r * r;
  const float s = r + r * w * (-1.0f / 6 + w * (1.0f / 120 + w * (-1.0f / 5040 + w * (1.0f / 362880))));
  const float c = 1.0f + w * (-0.5f + w * (1.0f / 24 + w * (-1.0f / 720 + w * (1.0f / 40320 + w * (-1.0f / 3628800)))));
  const float a = q & 1 ? s : c;
  const float b = q & 1 ? c : s;
  cosine = (q + 1) & 2 ? -a : a;
  sine = q & 2 ? -b : b;
}

void box_muller(const u32* radius_words, const u32* angle_words, float* first, float* second) {
  alignas(64) float log_u[kLanes];
  for (int i = 0; i < kLanes; ++i) log_u[i] = -2.0f * log_uniform((radius_words[i] >> 8) + 1);
  for (int i = 0; i < kLanes; ++i) {
    const float radius = __builtin_sqrtf(log_u[i]);
    const float u2 = static_cast<float>(static_cast<std::int32_t>(angle_words[i] >> 8)) * 0x1p-24f;
    float cosine, sine;
    cos_sin(6.28318530717958647f * u2, cosine, sine);
    first[i] = radius * cosine;
    second[i] = radius * sine;
  }
}

// Elements of the sample that this tile holds.
inline i64 elements(i64 tile, const PhiloxParameters& p) {
  const i64 left = p.count - tile * kPhiloxTile * 4;
  return left < kPhiloxTile * 4 ? left : kPhiloxTile * 4;
}

template <typename In, typename Out>
void interleave(const In (&lanes)[4][kLanes], i64 count, Out* out) {
  if (count == kPhiloxTile * 4) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) out[4 * i + j] = lanes[j][i];
    return;
  }
  for (i64 i = 0; i < count; ++i) out[i] = lanes[i & 3][i >> 2];
}

}  // namespace

void philox_words(std::uint64_t index, i64 tile, const PhiloxParameters& p, std::int64_t* out) {
  Words words;
  draw(index, tile, p, words);
  interleave(words.w, elements(tile, p), out + tile * kPhiloxTile * 4);
}

void philox_normal(std::uint64_t index, i64 tile, const PhiloxParameters& p, float* out) {
  Words words;
  draw(index, tile, p, words);
  alignas(64) float normals[4][kLanes];
  box_muller(words.w[0], words.w[1], normals[0], normals[1]);
  box_muller(words.w[2], words.w[3], normals[2], normals[3]);
  interleave(normals, elements(tile, p), out + tile * kPhiloxTile * 4);
}

}  // namespace advkd::ADVKD_ISA
