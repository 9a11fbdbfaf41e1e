// Registration of the gradient penalty.

#include "cpu/penalty_reduce.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

// A sample's second pass follows its first where samples fit the caches and busy all threads; else all pieces are summed first.
void reduce(const PenaltyReduce& s, i64 sample_bytes) {
  const PenaltyKernel sums = ADVKD_DISPATCH(penalty_sums), scale = ADVKD_DISPATCH(penalty_scale);
  constexpr i64 kCached = 1 << 21;
  if (sample_bytes > kCached || s.pieces.samples < 4 * threads()) {
    launch(sums, s);
    for (i64 sample = 0; sample < s.pieces.samples; ++sample) finish_sample(s, sample);
    launch(scale, s);
    return;
  }
  const i64 pieces = s.pieces.per_sample(), grain = (s.pieces.grain() + pieces - 1) / pieces;
  spread(s.pieces.samples, grain, [&](i64 begin, i64 end) {
    for (i64 sample = begin; sample < end; ++sample) {
      sums(s, sample * pieces, (sample + 1) * pieces);
      finish_sample(s, sample);
      scale(s, sample * pieces, (sample + 1) * pieces);
    }
  });
}

void penalty_reduce(const Tensor& g, double target, double weight, int64_t mode, Tensor out, Tensor penalties) {
  if (g.numel() == 0) return;
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode must be 0, 1 or 2");
  PenaltyReduce s{};
  s.pieces = pieces_of(g, kPenaltyPiece);
  check_like(out, g);
  STD_TORCH_CHECK(
      is_contiguous(penalties, ScalarType::Float) && penalties.numel() == s.pieces.samples,
      "penalties must be contiguous float32 (N,)");
  std::vector<double> sums(s.pieces.total());
  std::vector<float> factors(s.pieces.samples);
  s.g = g.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.penalties = static_cast<float*>(penalties.mutable_data_ptr());
  s.sums = sums.data();
  s.factors = factors.data();
  s.target = target;
  s.weight = weight;
  s.mode = static_cast<PenaltyMode>(mode);
  s.dtype = dtype_of(g);
  reduce(s, s.pieces.count * element_bytes(s.dtype));
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("penalty_reduce(Tensor g, float target, float weight, int mode, Tensor(a!) out, Tensor(b!) penalties) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("penalty_reduce", TORCH_BOX(&advkd::penalty_reduce));
}
