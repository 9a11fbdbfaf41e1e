// Parameters of penalty_reduce on NVIDIA GPUs: what the launchers fill and the kernels read. No Torch, no standard library.
#pragma once

#include "common/philox.h"
#include "cuda/block.h"

namespace advkd {

// Samples of `length` elements in the order of memory, each the work of `parts` blocks.
struct PenaltyParameters {
  const void* g;
  void* out;
  float *penalties, *partials;  // partials: samples x parts
  i64 samples, length;
  float target, share;  // share: weight / samples
  int mode;             // 0: two-sided, 1: one-sided, 2: r1
  int parts;
  int vectors;  // whether vectors of 16 bytes are aligned in every sample
};

#ifndef __CUDACC_RTC__
constexpr int kPenaltyTurns = 8;  // groups of eight elements per thread, more only where a block could not sum so many parts

// Blocks per sample: of its length alone, so that a sample's sum is the same in every batch.
inline int penalty_parts(i64 length) {
  constexpr i64 kWork = kThreads * 8 * kPenaltyTurns;
  const i64 parts = (length + kWork - 1) / kWork;
  return static_cast<int>(parts < kThreads ? parts : kThreads);
}
#endif

}  // namespace advkd
