// Parts that elementwise kernels share: the dtypes that they store, and samples cut into pieces of work.
#pragma once

#include <algorithm>

#include "common/philox.h"

namespace advkd {

enum class Dtype { float32, bfloat16, float16 };

inline i64 element_bytes(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

// `samples` samples of `count` neighbouring elements, each cut into pieces that begin at a byte of a one-bit mask.
struct Pieces {
  i64 samples, count, piece;

  i64 per_sample() const { return (count + piece - 1) / piece; }
  i64 total() const { return samples * per_sample(); }
  // Pieces of a task: about 32k elements.
  i64 grain() const { return std::max<i64>(1, (i64{1} << 15) / std::min(piece, count)); }
};

// Elements of a piece where nothing asks for another number: what fits the first-level cache.
constexpr i64 kPiece = 2048;

}  // namespace advkd
