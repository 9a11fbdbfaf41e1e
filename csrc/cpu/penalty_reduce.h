// The gradient penalty and its derivative by the gradient on the CPU; one instance per instruction set, chosen at run time.
#pragma once

#include <cmath>

#include "cpu/pieces.h"

namespace advkd {

enum class PenaltyMode : int { two_sided, one_sided, r1 };

// Samples in the order of memory.
struct PenaltyReduce {
  const void* g;
  void* out;  // may be g
  float* penalties;
  double* sums;    // of squares, one per piece
  float* factors;  // of v = factor g, one per sample
  double target, weight;
  PenaltyMode mode;
  Pieces pieces;
  Dtype dtype;
};

// Elements of a piece, whose squares are one partial sum: a part of a sample, whatever the number of threads.
constexpr i64 kPenaltyPiece = 1 << 15;

// A sample's penalty and factor from its pieces' sums of squares.
inline void finish_sample(const PenaltyReduce& s, i64 sample) {
  const i64 pieces = s.pieces.per_sample();
  double sum = 0;
  for (i64 i = 0; i < pieces; ++i) sum += s.sums[sample * pieces + i];
  const double share = s.weight / static_cast<double>(s.pieces.samples);
  if (s.mode == PenaltyMode::r1) {
    s.penalties[sample] = static_cast<float>(share / 2 * sum);
    s.factors[sample] = static_cast<float>(share);
    return;
  }
  const double norm = std::sqrt(sum);
  double excess = norm - s.target;
  if (s.mode == PenaltyMode::one_sided && excess < 0) excess = 0;
  s.penalties[sample] = static_cast<float>(share * excess * excess);
  s.factors[sample] = norm == 0 ? 0.0f : static_cast<float>(2 * share * excess / norm);
}

// For pieces begin .. end - 1 of all samples' pieces: their sums of squares, and their v once the factors are there.
using PenaltyKernel = void (*)(const PenaltyReduce&, i64 begin, i64 end);

namespace isa_baseline {
void penalty_sums(const PenaltyReduce&, i64, i64);
void penalty_scale(const PenaltyReduce&, i64, i64);
}  // namespace isa_baseline
namespace isa_avx2 {
void penalty_sums(const PenaltyReduce&, i64, i64);
void penalty_scale(const PenaltyReduce&, i64, i64);
}  // namespace isa_avx2
namespace isa_avx512 {
void penalty_sums(const PenaltyReduce&, i64, i64);
void penalty_scale(const PenaltyReduce&, i64, i64);
}  // namespace isa_avx512

}  // namespace advkd
