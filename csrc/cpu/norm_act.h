// Batch norm, LeakyReLU and nearest up-sampling of a training step on the CPU; one instance per instruction set, chosen at run
// time.
#pragma once

#include <algorithm>
#include <numeric>

#include "cpu/pieces.h"

namespace advkd {

// A pass as pointers and sizes. x is `planes * groups` planes of `height` rows of `width` pixels of `channels` neighbouring
// elements. NCHW: the groups are the channels and a pixel is one element. NHWC: one group of one plane, whose pixels hold all
// channels. Without up-sampling a plane is one row.
struct NormAct {
  const void* x;
  const void* gradient;  // of the result; of the value before LeakyReLU where `masked`
  void* out;             // the result; what the sums keep, or null; dx
  const float *gamma, *beta, *mean, *variance;
  const float *mean_d, *mean_dx;  // the sums by their count, for dx
  double* partials;               // norm_act_partials(n) of them
  float* results;                 // mean and variance, or dbeta and dgamma, of all channels
  i64 groups, planes, height, width, channels;
  double eps;
  float slope;
  bool upsample, masked;
  bool stream;  // stores pass the caches by
  Dtype dtype;
};

// How x is cut: runs of whole rows, or of a part of one, that fit the first-level cache; pieces of work of many runs of one group.
// Sums are made piece by piece, so that they do not depend on the number of threads.
struct NormTiling {
  explicit NormTiling(const NormAct& n) {
    constexpr i64 kPieceElements = 1 << 15, kPieces = 256, kFewChannels = 128, kPeriod = 64, kVector = 16;
    // With up-sampling there are buffers of two and four times that beside it.
    const i64 run_elements = n.upsample ? 1024 : 2048;
    i64 repeat = n.channels < kFewChannels ? kVector / std::gcd(n.channels, kVector) : 1;
    while (repeat * n.channels < kPeriod) repeat *= 2;
    period = repeat * n.channels;
    rows = std::clamp<i64>(run_elements / (n.width * n.channels), 1, n.height);
    pixels = rows > 1 ? n.width : std::min(n.width, std::max<i64>(run_elements / period, 1) * repeat);
    row_runs = (n.width + pixels - 1) / pixels;
    plane_runs = (n.height + rows - 1) / rows * row_runs;
    runs = n.planes * plane_runs;
    // Few pieces, as each leaves sums of all channels.
    const i64 run = rows * pixels * n.channels;
    piece_runs = std::min(runs, std::max((kPieceElements + run - 1) / run, (runs + kPieces - 1) / kPieces));
    pieces = (runs + piece_runs - 1) / piece_runs;
    elements = piece_runs * run;
  }

  // Elements of some pixels (a power of two), whole vectors where that takes few: their channels' weights are kept side by side.
  i64 period;
  i64 rows, pixels;  // of a run, at most
  i64 row_runs;      // runs in a row
  i64 plane_runs;    // in a plane
  i64 runs, pieces;  // in a group
  i64 piece_runs;    // runs in a piece, at most
  i64 elements;      // of a piece, at most
};

inline i64 norm_act_pieces(const NormAct& n) {
  return n.groups * NormTiling(n).pieces;
}

// Two numbers per piece and channel.
inline i64 norm_act_partials(const NormAct& n) {
  return 2 * n.channels * norm_act_pieces(n);
}

// The first four make pieces begin .. end - 1; the others bring together what the pieces' moments and sums left.
#define ADVKD_NORM_ACT(isa)                         \
  namespace isa {                                   \
  void norm_act_moments(const NormAct&, i64, i64);  \
  void norm_act(const NormAct&, i64, i64);          \
  void norm_act_sums(const NormAct&, i64, i64);     \
  void norm_act_backward(const NormAct&, i64, i64); \
  void norm_act_finish_moments(const NormAct&);     \
  void norm_act_finish_sums(const NormAct&);        \
  }
ADVKD_NORM_ACT(isa_baseline)
ADVKD_NORM_ACT(isa_avx2)
ADVKD_NORM_ACT(isa_avx512)
#undef ADVKD_NORM_ACT

}  // namespace advkd
