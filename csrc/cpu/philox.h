// Philox words and normals on the CPU; one instance of each kernel per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace advkd {

// Blocks of four elements that one call of a kernel fills; the registration layer spreads tiles over threads.
constexpr i64 kPhiloxTile = 64;

// Fill tile number `tile` of the sample with this index; `out` is the sample's first element.
using PhiloxWordsKernel = void (*)(std::uint64_t index, i64 tile, const PhiloxParameters&, std::int64_t* out);
using PhiloxNormalKernel = void (*)(std::uint64_t index, i64 tile, const PhiloxParameters&, float* out);

#define ADVKD_DECLARE(isa)                                                               \
  namespace isa {                                                                        \
  void philox_words(std::uint64_t, i64, const PhiloxParameters&, std::int64_t*);         \
  void philox_normal(std::uint64_t, i64, const PhiloxParameters&, float*);               \
  }
ADVKD_DECLARE(isa_baseline)
ADVKD_DECLARE(isa_avx2)
ADVKD_DECLARE(isa_avx512)
#undef ADVKD_DECLARE

}  // namespace advkd
