// Registration of the CUDA kernels with torch, through its stable ABI. Launchers check layout, allocate, launch.

#include "cuda/register.h"

#include <algorithm>

#include "cuda/philox.cu"
#include "cuda/register_training.h"
#include "cuda/sampler_step.cu"

namespace advkd {
namespace {

template <typename Element>
using PhiloxKernel = void (*)(const i64*, i64, PhiloxParameters, Element*);

template <typename Element>
void launch(const Tensor& indices, PhiloxParameters p, PhiloxKernel<Element> kernel, Tensor& out) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous(), "indices must be contiguous int64");
  STD_TORCH_CHECK(p.count <= i64{1} << 34, "a sample has at most 2^34 elements");
  const i64 samples = indices.numel(), items = samples * ((p.count + 3) / 4);
  if (items == 0) return;
  torch::stable::accelerator::DeviceGuard guard(indices.get_device());
  constexpr int kThreads = 256;
  const auto grid = static_cast<unsigned>(std::min<i64>((items + kThreads - 1) / kThreads, 1 << 20));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(current_stream(indices))>>>(
      static_cast<const i64*>(indices.const_data_ptr()), samples, p, static_cast<Element*>(out.mutable_data_ptr()));
  check_launch("philox");
}

// Whether this object holds code for the device of `x`: 0, or CUDA's error.
int64_t missing_code(const Tensor& x) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, advkd_philox_words);
  cudaGetLastError();
  return error;
}

Tensor philox_words(const Tensor& indices, int64_t seed, int64_t count, int64_t stream, int64_t step) {
  const std::vector<int64_t> shape{indices.numel(), count};
  Tensor out = torch::stable::new_empty(indices, shape, ScalarType::Long);
  launch<i64>(indices, philox_parameters(seed, stream, step, count), advkd_philox_words, out);
  return out;
}

Tensor philox_normal(
    const Tensor& indices,
    int64_t seed,
    torch::headeronly::IntHeaderOnlyArrayRef shape,
    int64_t stream,
    int64_t step) {
  std::vector<int64_t> full{indices.numel()};
  i64 count = 1;
  for (const int64_t side : shape) {
    full.push_back(side);
    count *= side;
  }
  Tensor out = torch::stable::new_empty(indices, full, ScalarType::Float);
  launch<float>(indices, philox_parameters(seed, stream, step, count), advkd_philox_normal, out);
  return out;
}

// The entry points of a pair of dtypes: [pool][draw].
using StepKernel = void (*)(StepParameters);
struct StepKernels {
  StepKernel entries[2][2];
};
#define ADVKD_STEP_POINTERS(X, M)                                                  \
  StepKernels{{{advkd_step_flat_tensor_##X##_##M, advkd_step_flat_draw_##X##_##M}, \
               {advkd_step_pool_tensor_##X##_##M, advkd_step_pool_draw_##X##_##M}}},
const StepKernels kStepKernels[] = {ADVKD_STEP_DTYPES(ADVKD_STEP_POINTERS)};

bool aligned(const StepParameters& p) {
  return aligned({p.x, p.m, p.table, p.previous_x0, p.noise, p.out, p.x0});
}

// Sizes, and who takes what. Memory order serves every layout, but drawn normals and pooled pixels belong to channels.
void set_sizes(StepParameters& p, const Tensor& x, i64 pool, int group) {
  const bool dense = x.is_contiguous();
  const bool last = !dense && channels_last(x);
  STD_TORCH_CHECK(dense || last, "x must be contiguous or channels_last");
  constexpr i64 kMost = (i64{1} << 31) - 1;
  const i64 channels = last && (pool || p.indices) ? x.size(1) : 1, width = pool ? x.size(3) : 0;
  STD_TORCH_CHECK(channels <= kMost && width <= kMost, "x must have at most 2^31 - 1 channels and columns");
  p.samples = x.size(0);
  p.channels = static_cast<int>(channels);
  p.length = x.numel() / (p.samples * channels);
  p.width = static_cast<int>(width);
  p.pool = static_cast<int>(pool);
  p.vectors = aligned(p) && channels == 1 && (pool ? width : p.length) % group == 0;
  step_plan(p, group);
  STD_TORCH_CHECK(p.tiles <= step_most_tiles(p), "x is too large for one launch");
}

void sampler_step(
    const Tensor& x,
    const Tensor& m,
    const Tensor& table,
    std::optional<Tensor> previous_x0,
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
  const int dtype = dtype_of("sampler_step", x), model_dtype = dtype_of("sampler_step", m);
  const bool rows = table.is_contiguous() && table.scalar_type() == ScalarType::Float && table.size(1) == 8;
  STD_TORCH_CHECK(rows && (table.size(0) == 1 || table.size(0) == x.size(0)), "table must be float32 (1 or samples, 8)");
  STD_TORCH_CHECK(!indices || (indices->is_contiguous() && indices->numel() == x.size(0)), "one index per sample");
  STD_TORCH_CHECK(!indices || x.numel() / x.size(0) <= i64{1} << 34, "a sample has at most 2^34 elements");
  const bool fits = !steps || (steps->is_contiguous() && (steps->numel() == 1 || steps->numel() == x.size(0)));
  STD_TORCH_CHECK(fits, "steps must be contiguous, one or one per sample");
  const PhiloxParameters key = philox_parameters(seed, PhiloxStream::step, steps ? 0 : step, 0);
  StepParameters p{};
  p.x = x.const_data_ptr();
  p.m = m.const_data_ptr();
  p.table = static_cast<const float*>(table.const_data_ptr());
  p.previous_x0 = pointer(previous_x0);
  p.noise = pointer(noise);
  p.indices = static_cast<const i64*>(pointer(indices));
  p.steps = static_cast<const i64*>(pointer(steps));
  p.out = out.mutable_data_ptr();
  p.x0 = writable(x0);
  p.pooled = writable(pooled);
  p.flags = static_cast<int*>(writable(flags));
  p.key0 = key.key0;
  p.key1 = key.key1;
  p.stream_step = key.stream_step;
  p.row_stride = table.size(0) > 1 ? 8 : 0;
  p.step_stride = steps && steps->numel() > 1;
  set_sizes(p, x, pool, pool || dtype == 0 ? 4 : 8);
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const StepKernel kernel = kStepKernels[3 * dtype + model_dtype].entries[pool != 0][indices.has_value()];
  kernel<<<static_cast<unsigned>(p.tiles), kStepThreads, 0, static_cast<cudaStream_t>(current_stream(x))>>>(p);
  check_launch("sampler_step");
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cuda, m) {
  m.def("missing_code(Tensor x) -> int");
  m.def("philox_words(Tensor indices, int seed, int count, int stream, int step) -> Tensor");
  m.def("philox_normal(Tensor indices, int seed, int[] shape, int stream, int step) -> Tensor");
  m.def("conv_bias_act_mask(Tensor p, Tensor? bias, float slope, Tensor(a!) out, Tensor(b!) mask) -> ()");
  m.def("mask_mul(Tensor x, Tensor mask, float slope, Tensor(a!) out) -> ()");
  m.def("penalty_reduce(Tensor g, float target, float weight, int mode, Tensor(a!) out, Tensor(b!) penalties) -> ()");
  m.def(
      "interpolate(Tensor real, Tensor fake, Tensor? a, Tensor? indices, int seed, int step, Tensor? steps, Tensor(a!) out) "
      "-> ()");
  m.def("norm_act_moments(Tensor x, Tensor(a!) statistics) -> ()");
  m.def(
      "norm_act(Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, Tensor(a!) out) -> ()");
  m.def(
      "norm_act_sums(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, "
      "Tensor(a!)? kept, Tensor(b!) sums) -> ()");
  m.def(
      "norm_act_backward(Tensor gradient, Tensor x, Tensor weights, Tensor statistics, Tensor means, float eps, float slope, "
      "bool upsample, bool masked, Tensor(a!) dx) -> ()");
  m.def(
      "sampler_step(Tensor x, Tensor m, Tensor table, Tensor? previous_x0, Tensor? noise, Tensor? indices, int seed, int step, "
      "Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? pooled, Tensor(d!)? flags) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("missing_code", TORCH_BOX(&advkd::missing_code));
  m.impl("philox_words", TORCH_BOX(&advkd::philox_words));
  m.impl("philox_normal", TORCH_BOX(&advkd::philox_normal));
  m.impl("sampler_step", TORCH_BOX(&advkd::sampler_step));
  m.impl("conv_bias_act_mask", TORCH_BOX(&advkd::training::conv_bias_act_mask));
  m.impl("mask_mul", TORCH_BOX(&advkd::training::mask_mul));
  m.impl("penalty_reduce", TORCH_BOX(&advkd::training::penalty_reduce));
  m.impl("interpolate", TORCH_BOX(&advkd::training::interpolate));
  m.impl("norm_act_moments", TORCH_BOX(&advkd::training::norm_act_moments));
  m.impl("norm_act", TORCH_BOX(&advkd::training::norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&advkd::training::norm_act_sums));
  m.impl("norm_act_backward", TORCH_BOX(&advkd::training::norm_act_backward));
}
