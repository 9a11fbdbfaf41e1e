// Reductions inside a block of 256 threads, in an order that depends on the shapes alone: no atomics, equal bits on every call.
// No Torch and no standard library.
#pragma once

#include "common/philox.h"
#include "cuda/block.h"

namespace advkd {

// Sums, one by one.
struct Add {
  template <int kValues>
  ADVKD_INLINE void merge(float (&into)[kValues], const float (&from)[kValues]) {
    for (int i = 0; i < kValues; ++i) into[i] += from[i];
  }
};

// A count, then pairs of a mean and the sum of squares around it (Chan, Golub & LeVeque 1983): nothing is lost where a mean is
// far from zero.
struct Combine {
  template <int kValues>
  ADVKD_INLINE void merge(float (&into)[kValues], const float (&from)[kValues]) {
    static_assert(kValues % 2 == 1, "a count is followed by pairs");
    const float both = into[0] + from[0];
    if (from[0] == 0.0f) return;
    const float share = __fdiv_rn(from[0], both), weight = into[0] * share;
    into[0] = both;
    for (int i = 1; i < kValues; i += 2) {
      const float delta = from[i] - into[i];
      into[i] += delta * share;
      into[i + 1] += from[i + 1] + delta * delta * weight;
    }
  }
};

// Merges the values of the threads lane, lane + lanes, ... of each of `lanes` lanes; the first row of threads gets the result.
// Every thread of the block must come here.
template <typename Merge, int kValues>
ADVKD_INLINE void block_reduce(float (&values)[kValues], int lanes, int rows) {
  __shared__ float shared[kValues][kThreads];
  const int thread = threadIdx.x, row = thread / lanes;
  for (int i = 0; i < kValues; ++i) shared[i][thread] = values[i];
  for (int count = rows; count > 1;) {
    const int half = (count + 1) / 2;
    __syncthreads();
    if (row + half < count) {
      float other[kValues];
      for (int i = 0; i < kValues; ++i) other[i] = shared[i][thread + half * lanes];
      Merge::merge(values, other);
      for (int i = 0; i < kValues; ++i) shared[i][thread] = values[i];
    }
    count = half;
  }
}

}  // namespace advkd
