// Registration of the points between real and generated samples.

#include "cpu/interpolate.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

const void* checked_pointer(const std::optional<Tensor>& t, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(!t || is_contiguous(*t, dtype), what);
  return pointer(t);
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
  m.def(
      "interpolate(Tensor real, Tensor fake, Tensor? a, Tensor? indices, int seed, int step, Tensor? steps, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&advkd::interpolate));
}
