// Registration of a sampler's step.

#include <algorithm>

#include "cpu/sampler_step.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

// The tensors' common layout: contiguous, or NHWC.
void set_layout(SamplerStep& s, const Tensor& x) {
  const int64_t dims = x.dim();
  const bool image = dims == 4, contiguous = x.is_contiguous();
  s.samples = x.size(0);
  const i64 size = s.samples ? x.numel() / s.samples : 0;
  s.channels = contiguous ? 1 : x.size(1);
  s.planes = image && contiguous ? x.size(1) : 1;
  s.height = image ? x.size(2) : 1;
  s.width = s.height ? size / (s.planes * s.height) : 0;
  STD_TORCH_CHECK(contiguous || is_channels_last(x), "x must be contiguous or channels_last");
}

void sampler_step(
    const Tensor& x,
    const Tensor& model_output,
    const Tensor& table,
    std::optional<Tensor> previous_x0,
    std::optional<Tensor> history,
    std::optional<Tensor> noise,
    std::optional<Tensor> indices,
    int64_t seed,
    int64_t step,
    std::optional<Tensor> steps,
    int64_t pool,
    Tensor out,
    std::optional<Tensor> x0,
    std::optional<Tensor> pooled,
    std::optional<Tensor> flags) {
  if (x.numel() == 0) return;
  SamplerStep s{};
  set_layout(s, x);
  check_layout(model_output, x);
  check_layout(out, x);
  for (const std::optional<Tensor>* t : {&previous_x0, &history, &noise, &x0})
    if (*t) check_layout(**t, x);
  const int64_t columns = table.size(1);
  const bool fits = is_contiguous(table, ScalarType::Float) && (columns == 8 || columns == 12);
  STD_TORCH_CHECK(fits, "table must be float32 (rows, 8) or (rows, 12)");
  STD_TORCH_CHECK(!history || columns == 12, "history needs a table of 12 columns");
  STD_TORCH_CHECK(!indices || (indices->is_contiguous() && indices->numel() == s.samples), "one index per sample");
  STD_TORCH_CHECK(!indices || x.numel() / s.samples <= i64{1} << 34, "a sample has at most 2^34 elements");
  STD_TORCH_CHECK(!steps || steps->is_contiguous(), "steps must be contiguous");
  s.x = x.const_data_ptr();
  s.model_output = model_output.const_data_ptr();
  s.previous_x0 = pointer(previous_x0);
  s.history = pointer(history);
  s.noise = pointer(noise);
  s.out = out.mutable_data_ptr();
  s.x0 = const_cast<void*>(pointer(x0));
  s.pooled = const_cast<void*>(pointer(pooled));
  s.flags = static_cast<std::int32_t*>(const_cast<void*>(pointer(flags)));
  s.rows = table.const_data_ptr();
  s.row_count = table.size(0);
  s.indices = static_cast<const std::int64_t*>(pointer(indices));
  s.steps = static_cast<const std::int64_t*>(pointer(steps));
  s.step_count = steps ? steps->numel() : 0;
  s.philox = philox_parameters(seed, PhiloxStream::step, steps ? 0 : step, 0);
  s.pool = pool;
  const Dtype dtype = dtype_of(x, "sampler_step takes"), model_dtype = dtype_of(model_output, "sampler_step takes");
  s.kernel = step_kernel(dtype, model_dtype, columns == 12);
  // In place the lines are in the caches already.
  const bool fresh = s.out != s.x && s.out != s.model_output && s.out != s.previous_x0 && s.out != s.history;
  const bool replaced = s.x0 && (s.x0 == s.previous_x0 || s.x0 == s.history || s.x0 == s.noise);
  // Two outputs of half precision fill a line by several turns, for which the processor's write buffers do not hold it.
  s.stream = fresh && !replaced && !(s.x0 && dtype != Dtype::float32) && passes_caches(x);
  constexpr i64 kElementsPerTask = 1 << 15;
  const i64 pieces = s.samples * step_pieces_per_sample(s), grain = std::max<i64>(1, kElementsPerTask / step_piece(s));
  const SamplerStepKernel kernel = ADVKD_DISPATCH(sampler_step);
  spread(pieces, grain, [&](i64 begin, i64 end) { kernel(s, begin, end); });
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def(
      "sampler_step(Tensor x, Tensor model_output, Tensor table, Tensor? previous_x0, Tensor? history, Tensor? noise, "
      "Tensor? indices, int seed, int step, Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, "
      "Tensor(c!)? pooled, Tensor(d!)? flags) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&advkd::sampler_step));
}
