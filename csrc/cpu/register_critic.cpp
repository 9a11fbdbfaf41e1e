// Registration of the kernels of a critic's update with torch, through its stable ABI. Launchers check layout and launch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "cpu/conv_bias_act_mask.h"
#include "cpu/dispatch.h"
#include "cpu/interpolate.h"
#include "cpu/mask_mul.h"
#include "cpu/penalty_reduce.h"
#include "cpu/threads.h"

namespace advkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  i64 stride = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) > 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

// The samples of a dense tensor, in the order of memory.
Pieces pieces_of(const Tensor& t, i64 piece) {
  STD_TORCH_CHECK(t.is_contiguous() || is_channels_last(t), "tensors must be contiguous or channels_last");
  return {t.size(0), t.numel() / t.size(0), piece};
}

void check_like(const Tensor& t, const Tensor& other, i64 times = 1) {
  STD_TORCH_CHECK(
      t.scalar_type() == other.scalar_type() && t.dim() == other.dim() && t.numel() == times * other.numel() &&
          (other.is_contiguous() ? t.is_contiguous() : is_channels_last(t)),
      "tensors must have one shape, dtype and layout");
}

// Samples that fill their masks' bytes follow each other in the mask as they do in memory: they are one.
Pieces joined(Pieces p) {
  return p.count % 8 ? p : Pieces{1, p.samples * p.count, p.piece};
}

void check_mask(const Tensor& mask, const Pieces& p) {
  const bool fits = mask.dim() == 2 && mask.size(0) == p.samples && mask.size(1) == (p.count + 7) / 8;
  const bool bytes = mask.scalar_type() == ScalarType::Byte && mask.is_contiguous();
  STD_TORCH_CHECK(fits && bytes, "mask must be contiguous uint8 (N, bytes)");
}

template <typename Kernel, typename Job>
void launch(Kernel kernel, const Job& job) {
  spread(job.pieces.total(), job.pieces.grain(), [&](i64 begin, i64 end) { kernel(job, begin, end); });
}

void conv_bias_act_mask(const Tensor& p, std::optional<Tensor> bias, double slope, Tensor out, Tensor mask) {
  if (p.numel() == 0) return;
  BiasActMask s{};
  s.pieces = pieces_of(p, kPiece);
  check_like(out, p);
  check_mask(mask, s.pieces);
  if (bias) {
    STD_TORCH_CHECK(p.dim() > 1, "p must be (N, C, ...)");
    s.channels = p.size(1);
    const bool fits = bias->dim() == 1 && bias->size(0) == s.channels && bias->scalar_type() == p.scalar_type();
    STD_TORCH_CHECK(fits && bias->is_contiguous(), "bias must be contiguous (C,) of p's dtype");
    s.plane = p.is_contiguous() ? s.pieces.count / s.channels : 1;
    s.pieces.piece = bias_piece(s.channels, s.plane);
    s.bias = bias->const_data_ptr();
  }
  s.pieces = joined(s.pieces);
  s.p = p.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.mask = static_cast<std::uint8_t*>(mask.mutable_data_ptr());
  s.slope = static_cast<float>(slope);
  s.dtype = dtype_of(p);
  launch(ADVKD_DISPATCH(conv_bias_act_mask), s);
}

void mask_mul(const Tensor& x, const Tensor& mask, double slope, Tensor out) {
  if (x.numel() == 0) return;
  MaskMul s{};
  s.pieces = pieces_of(x, kPiece);
  check_like(out, x);
  check_mask(mask, s.pieces);
  s.pieces = joined(s.pieces);
  s.x = x.const_data_ptr();
  s.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  s.out = out.mutable_data_ptr();
  s.slope = static_cast<float>(slope);
  s.dtype = dtype_of(x);
  launch(ADVKD_DISPATCH(mask_mul), s);
}

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
      penalties.scalar_type() == ScalarType::Float && penalties.is_contiguous() && penalties.numel() == s.pieces.samples,
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
  reduce(s, s.pieces.count * (s.dtype == Dtype::float32 ? 4 : 2));
}

const void* checked_pointer(const std::optional<Tensor>& t, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(!t || (t->scalar_type() == dtype && t->is_contiguous()), what);
  return t ? t->const_data_ptr() : nullptr;
}

void interpolate(
    const Tensor& real,
    const Tensor& fake,
    std::optional<Tensor> a,
    std::optional<Tensor> indices,
    int64_t seed,
    int64_t step,
    std::optional<Tensor> steps,
    Tensor out) {
  if (real.numel() == 0) return;
  Interpolate s{};
  s.pieces = pieces_of(real, kPiece);
  s.merge = out.size(0) != s.pieces.samples;
  check_like(fake, real);
  check_like(out, real, s.merge ? 3 : 1);
  const auto per_sample = [&](const std::optional<Tensor>& t) { return t && t->numel() == s.pieces.samples; };
  STD_TORCH_CHECK(per_sample(a) || per_sample(indices), "one weight or index per sample");
  STD_TORCH_CHECK(!steps || steps->numel() == 1 || per_sample(steps), "one step, or one per sample");
  s.real = real.const_data_ptr();
  s.fake = fake.const_data_ptr();
  s.a = static_cast<const float*>(checked_pointer(a, ScalarType::Float, "a must be contiguous float32"));
  s.indices = static_cast<const std::int64_t*>(checked_pointer(indices, ScalarType::Long, "indices must be contiguous int64"));
  s.steps = static_cast<const std::int64_t*>(checked_pointer(steps, ScalarType::Long, "steps must be contiguous int64"));
  s.step_count = steps ? steps->numel() : 0;
  s.philox = philox_parameters(seed, PhiloxStream::interpolation, steps ? 0 : step, 0);
  s.out = out.mutable_data_ptr();
  s.dtype = dtype_of(real);
  launch(ADVKD_DISPATCH(interpolate), s);
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("conv_bias_act_mask(Tensor p, Tensor? bias, float slope, Tensor(a!) out, Tensor(b!) mask) -> ()");
  m.def("mask_mul(Tensor x, Tensor mask, float slope, Tensor(a!) out) -> ()");
  m.def("penalty_reduce(Tensor g, float target, float weight, int mode, Tensor(a!) out, Tensor(b!) penalties) -> ()");
  m.def(
      "interpolate(Tensor real, Tensor fake, Tensor? a, Tensor? indices, int seed, int step, Tensor? steps, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("conv_bias_act_mask", TORCH_BOX(&advkd::conv_bias_act_mask));
  m.impl("mask_mul", TORCH_BOX(&advkd::mask_mul));
  m.impl("penalty_reduce", TORCH_BOX(&advkd::penalty_reduce));
  m.impl("interpolate", TORCH_BOX(&advkd::interpolate));
}
