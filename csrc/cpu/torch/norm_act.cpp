// Registration of a training step's batch norm, LeakyReLU and up-sampling. Launchers allocate partial sums, too.

#include <algorithm>

#include "cpu/norm_act.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

// The layout that a pass runs over; `upsample` says whether it knows rows.
NormAct pass_over(const Tensor& x, bool upsample) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be (N, C, H, W) and hold something");
  const bool contiguous = x.is_contiguous();
  STD_TORCH_CHECK(contiguous || is_channels_last(x), "x must be contiguous or channels_last");
  const i64 samples = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  NormAct n{};
  n.x = x.const_data_ptr();
  n.dtype = dtype_of(x, "norm_act takes");
  n.upsample = upsample;
  n.groups = contiguous ? channels : 1;
  n.planes = contiguous ? samples : 1;
  n.channels = contiguous ? 1 : channels;
  n.height = contiguous ? height : samples * height;
  n.width = width;
  if (!upsample) {
    n.width *= n.height;
    n.height = 1;
  }
  return n;
}

const float* rows_of_channels(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      is_contiguous(t, ScalarType::Float) && t.dim() == 2 && t.size(0) == 2 && t.size(1) == x.size(1), name,
      " must be contiguous float32 (2, C)");
  return static_cast<const float*>(t.const_data_ptr());
}

void set_weights(NormAct& n, const Tensor& x, const Tensor& weights, const Tensor& statistics, double eps, double slope) {
  n.gamma = rows_of_channels(weights, x, "weights");
  n.beta = n.gamma + x.size(1);
  n.mean = rows_of_channels(statistics, x, "statistics");
  n.variance = n.mean + x.size(1);
  n.eps = eps;
  n.slope = static_cast<float>(slope);
}

// A tensor of x's dtype and layout, `scale` times as high and wide.
void require_like(const Tensor& t, const Tensor& x, i64 scale, const char* name) {
  const bool same_layout = x.is_contiguous() ? t.is_contiguous() : is_channels_last(t);
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == scale * x.size(2) &&
          t.size(3) == scale * x.size(3) && t.scalar_type() == x.scalar_type() && same_layout,
      name, " must have x's dtype and layout and its shape, up-sampled or not");
}

template <typename Kernel>
void run_pieces(const NormAct& n, Kernel kernel) {
  constexpr i64 kElementsPerTask = 1 << 15;
  const i64 grain = std::max<i64>(1, kElementsPerTask / NormTiling(n).elements);
  spread(norm_act_pieces(n), grain, [&](i64 begin, i64 end) { kernel(n, begin, end); });
}

template <typename Kernel, typename Finish>
void launch_sums(NormAct& n, const Tensor& x, Tensor& results, const char* name, Kernel kernel, Finish finish) {
  n.results = const_cast<float*>(rows_of_channels(results, x, name));
  std::vector<double> partials(norm_act_partials(n));
  n.partials = partials.data();
  run_pieces(n, kernel);
  finish(n);
}

// The convolution before is oneDNN's: its epilogue cannot leave the moments here.
void norm_act_moments(const Tensor& x, Tensor statistics) {
  NormAct n = pass_over(x, false);
  launch_sums(n, x, statistics, "statistics", ADVKD_DISPATCH(norm_act_moments), ADVKD_DISPATCH(norm_act_finish_moments));
}

void norm_act(
    const Tensor& x,
    const Tensor& weights,
    const Tensor& statistics,
    double eps,
    double slope,
    bool upsample,
    Tensor out) {
  NormAct n = pass_over(x, upsample);
  set_weights(n, x, weights, statistics, eps, slope);
  require_like(out, x, upsample ? 2 : 1, "out");
  n.out = out.mutable_data_ptr();
  n.stream = passes_caches(out);
  run_pieces(n, ADVKD_DISPATCH(norm_act));
}

void norm_act_sums(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& statistics,
    double eps,
    double slope,
    bool upsample,
    std::optional<Tensor> kept,
    Tensor sums) {
  NormAct n = pass_over(x, upsample);
  set_weights(n, x, weights, statistics, eps, slope);
  require_like(gradient, x, upsample ? 2 : 1, "gradient");
  n.gradient = gradient.const_data_ptr();
  if (kept) {
    require_like(*kept, x, 1, "kept");
    n.out = kept->mutable_data_ptr();
    n.stream = passes_caches(*kept);
  }
  launch_sums(n, x, sums, "sums", ADVKD_DISPATCH(norm_act_sums), ADVKD_DISPATCH(norm_act_finish_sums));
}

void norm_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& statistics,
    const Tensor& means,
    double eps,
    double slope,
    bool upsample,
    bool masked,
    Tensor dx) {
  NormAct n = pass_over(x, upsample && !masked);
  set_weights(n, x, weights, statistics, eps, slope);
  require_like(gradient, x, n.upsample ? 2 : 1, "gradient");
  require_like(dx, x, 1, "dx");
  n.mean_d = rows_of_channels(means, x, "means");
  n.mean_dx = n.mean_d + x.size(1);
  n.masked = masked;
  n.gradient = gradient.const_data_ptr();
  n.out = dx.mutable_data_ptr();
  // In place the lines are in the caches already.
  n.stream = n.out != n.gradient && passes_caches(dx);
  run_pieces(n, ADVKD_DISPATCH(norm_act_backward));
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("norm_act_moments(Tensor x, Tensor(a!) statistics) -> ()");
  m.def(
      "norm_act(Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, Tensor(a!) out) -> ()");
  m.def(
      "norm_act_sums(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, "
      "Tensor(a!)? kept, Tensor(b!) sums) -> ()");
  m.def(
      "norm_act_backward(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, Tensor means, float eps, float slope, "
      "bool upsample, bool masked, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("norm_act_moments", TORCH_BOX(&advkd::norm_act_moments));
  m.impl("norm_act", TORCH_BOX(&advkd::norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&advkd::norm_act_sums));
  m.impl("norm_act_backward", TORCH_BOX(&advkd::norm_act_backward));
}
