// Philox words and normals: a tile of 64 blocks per call, kLanes blocks at a time (see normals.h).

#include "cpu/philox.h"

#include <cstring>

#include "cpu/normals.h"

namespace advkd::ADVKD_ISA {
namespace {

// Elements of the sample that this tile holds.
inline i64 elements(i64 tile, const PhiloxParameters& p) {
  const i64 left = p.count - tile * kPhiloxTile * 4;
  return left < kPhiloxTile * 4 ? left : kPhiloxTile * 4;
}

}  // namespace

void philox_words(std::uint64_t index, i64 tile, const PhiloxParameters& p, std::int64_t* out) {
  const i64 begin = tile * kPhiloxTile * 4, count = elements(tile, p);
  for (i64 i = 0; i < count; i += 4 * kLanes) {
    VU words[4];
    draw_words(index, static_cast<u32>((begin + i) / 4), p, words);
    for (int k = 0; k < 4 * kLanes && i + k < count; ++k) out[begin + i + k] = words[k & 3][k >> 2];
  }
}

void philox_normal(std::uint64_t index, i64 tile, const PhiloxParameters& p, float* out) {
  const i64 begin = tile * kPhiloxTile * 4, count = elements(tile, p);
  for (i64 i = 0; i < count; i += 4 * kLanes) {
    const u32 first = static_cast<u32>((begin + i) / 4);
    if (i + 4 * kLanes <= count) {
      draw_normals(index, first, p, out + begin + i);
      continue;
    }
    float last[4 * kLanes];
    draw_normals(index, first, p, last);
    std::memcpy(out + begin + i, last, (count - i) * sizeof(float));
  }
}

}  // namespace advkd::ADVKD_ISA
