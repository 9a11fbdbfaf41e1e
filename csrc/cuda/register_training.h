// Launchers of the training ops: they check layouts, allocate what reductions need, and start the kernels.
#pragma once

#include "cuda/conv_bias_act_mask.cu"
#include "cuda/interpolate.cu"
#include "cuda/mask_mul.cu"
#include "cuda/norm_act.cu"
#include "cuda/penalty_reduce.cu"
#include "cuda/register.h"

namespace advkd::training {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename Parameters>
using Kernel = void (*)(Parameters);

template <typename Parameters>
void start(const char* name, Kernel<Parameters> kernel, i64 blocks, const Parameters& p, const Tensor& x) {
  STD_TORCH_CHECK(blocks <= kMostBlocks, name, ": x is too large for one launch");
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(current_stream(x))>>>(p);
  check_launch(name);
}

// Whether x has channels last; contiguous comes first where it is both.
bool last_of(const char* name, const Tensor& x) {
  const bool dense = x.is_contiguous();
  STD_TORCH_CHECK(dense || channels_last(x), name, ": x must be contiguous or channels_last");
  return !dense;
}

void check_like(const char* name, const Tensor& t, const Tensor& x, bool last, i64 elements) {
  const bool fits = t.scalar_type() == x.scalar_type() && t.numel() == elements && t.get_device() == x.get_device();
  STD_TORCH_CHECK(fits && (last ? channels_last(t) : t.is_contiguous()), name, ": a tensor is not like x");
}

void check_plain(const char* name, const Tensor& t, ScalarType dtype, i64 elements) {
  const bool fits = t.scalar_type() == dtype && t.numel() == elements && t.is_contiguous();
  STD_TORCH_CHECK(fits, name, ": a tensor has the wrong dtype, size or layout");
}

i64 bytes_of(i64 length) {
  return (length + 7) / 8;
}

i64 element_blocks(i64 samples, i64 length) {
  return (samples * bytes_of(length) + kThreads - 1) / kThreads;
}

bool whole_vectors(int dtype, i64 length, std::initializer_list<const void*> addresses) {
  return aligned(addresses) && length * (dtype == 0 ? 4 : 2) % 16 == 0;
}

#define ADVKD_POINTER(T) advkd_mask_mul_##T,
const Kernel<MaskMulParameters> kMaskMul[] = {ADVKD_DTYPES(ADVKD_POINTER)};
#undef ADVKD_POINTER

void mask_mul(const Tensor& x, const Tensor& mask, double slope, Tensor out) {
  constexpr const char* kName = "mask_mul";
  if (x.numel() == 0) return;
  const int dtype = dtype_of(kName, x);
  MaskMulParameters p{};
  p.samples = x.size(0);
  p.length = x.numel() / p.samples;
  check_like(kName, out, x, last_of(kName, x), x.numel());
  check_plain(kName, mask, ScalarType::Byte, p.samples * bytes_of(p.length));
  p.x = x.const_data_ptr();
  p.mask = static_cast<const unsigned char*>(mask.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.slope = static_cast<float>(slope);
  p.vectors = whole_vectors(dtype, p.length, {p.x, p.out});
  DeviceGuard guard(x.get_device());
  start(kName, kMaskMul[dtype], element_blocks(p.samples, p.length), p, x);
}

#define ADVKD_POINTER(T) advkd_conv_bias_act_mask_##T,
const Kernel<ConvBiasActMaskParameters> kConvBiasActMask[] = {ADVKD_DTYPES(ADVKD_POINTER)};
#undef ADVKD_POINTER

void conv_bias_act_mask(const Tensor& x, std::optional<Tensor> bias, double slope, Tensor out, Tensor mask) {
  constexpr const char* kName = "conv_bias_act_mask";
  if (x.numel() == 0) return;
  const int dtype = dtype_of(kName, x);
  const bool last = last_of(kName, x);
  ConvBiasActMaskParameters p{};
  p.samples = x.size(0);
  p.length = x.numel() / p.samples;
  p.channels = x.dim() > 1 ? x.size(1) : 1;
  p.inner = last ? 1 : p.length / p.channels;
  check_like(kName, out, x, last, x.numel());
  check_plain(kName, mask, ScalarType::Byte, p.samples * bytes_of(p.length));
  if (bias) check_plain(kName, *bias, x.scalar_type(), p.channels);
  p.p = x.const_data_ptr();
  p.bias = pointer(bias);
  p.out = out.mutable_data_ptr();
  p.mask = static_cast<unsigned char*>(mask.mutable_data_ptr());
  p.slope = static_cast<float>(slope);
  p.vectors = whole_vectors(dtype, p.length, {p.p, p.out});
  p.bias_vectors = p.inner == 1 && p.channels % 8 == 0 && aligned({p.bias});
  DeviceGuard guard(x.get_device());
  start(kName, kConvBiasActMask[dtype], element_blocks(p.samples, p.length), p, x);
}

#define ADVKD_POINTER(T) advkd_interpolate_##T,
const Kernel<InterpolateParameters> kInterpolate[] = {ADVKD_DTYPES(ADVKD_POINTER)};
#undef ADVKD_POINTER

void interpolate(
    const Tensor& real,
    const Tensor& fake,
    std::optional<Tensor> a,
    std::optional<Tensor> indices,
    int64_t seed,
    int64_t step,
    std::optional<Tensor> steps,
    Tensor out) {
  constexpr const char* kName = "interpolate";
  if (real.numel() == 0) return;
  const int dtype = dtype_of(kName, real);
  const bool last = last_of(kName, real);
  InterpolateParameters p{};
  p.samples = real.size(0);
  p.length = real.numel() / p.samples;
  p.merge = out.size(0) != p.samples;
  check_like(kName, fake, real, last, real.numel());
  check_like(kName, out, real, last, (p.merge ? 3 : 1) * real.numel());
  STD_TORCH_CHECK(a || indices, "interpolate: one of a and indices is needed");
  if (a) check_plain(kName, *a, ScalarType::Float, p.samples);
  if (indices) check_plain(kName, *indices, ScalarType::Long, p.samples);
  if (steps) check_plain(kName, *steps, ScalarType::Long, steps->numel() == 1 ? 1 : p.samples);
  p.real = real.const_data_ptr();
  p.fake = fake.const_data_ptr();
  p.a = static_cast<const float*>(pointer(a));
  p.indices = static_cast<const i64*>(pointer(indices));
  p.steps = static_cast<const i64*>(pointer(steps));
  p.out = out.mutable_data_ptr();
  const PhiloxParameters key = philox_parameters(seed, PhiloxStream::interpolation, steps ? 0 : step, 0);
  p.key0 = key.key0;
  p.key1 = key.key1;
  p.stream_step = key.stream_step;
  p.step_stride = steps && steps->numel() > 1;
  p.vectors = whole_vectors(dtype, p.length, {p.real, p.fake, p.out});
  DeviceGuard guard(real.get_device());
  start(kName, kInterpolate[dtype], element_blocks(p.samples, p.length), p, real);
}

#define ADVKD_POINTER(T) {advkd_penalty_sums_##T, advkd_penalty_apply_##T},
const Kernel<PenaltyParameters> kPenalty[][2] = {ADVKD_DTYPES(ADVKD_POINTER)};
#undef ADVKD_POINTER

void penalty_reduce(const Tensor& g, double target, double weight, int64_t mode, Tensor out, Tensor penalties) {
  constexpr const char* kName = "penalty_reduce";
  if (g.numel() == 0) return;
  const int dtype = dtype_of(kName, g);
  PenaltyParameters p{};
  p.samples = g.size(0);
  p.length = g.numel() / p.samples;
  check_like(kName, out, g, last_of(kName, g), g.numel());
  check_plain(kName, penalties, ScalarType::Float, p.samples);
  DeviceGuard guard(g.get_device());
  p.parts = penalty_parts(p.length);
  Tensor partials = torch::stable::new_empty(g, std::vector<int64_t>{p.samples * p.parts}, ScalarType::Float);
  p.g = g.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.penalties = static_cast<float*>(penalties.mutable_data_ptr());
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.target = static_cast<float>(target);
  p.share = static_cast<float>(weight / static_cast<double>(p.samples));
  p.mode = static_cast<int>(mode);
  p.vectors = whole_vectors(dtype, p.length, {p.g, p.out});
  for (const auto kernel : kPenalty[dtype]) start(kName, kernel, p.samples * p.parts, p, g);
}

// The entry points of a kind of norm_act's kernels: [dtype][channels last].
struct NormKernels {
  Kernel<NormParameters> entries[3][2];
};
#define ADVKD_NORM_POINTERS(KIND)                                                    \
  NormKernels{{{advkd_norm_##KIND##_planes_f32, advkd_norm_##KIND##_last_f32},       \
               {advkd_norm_##KIND##_planes_bf16, advkd_norm_##KIND##_last_bf16},     \
               {advkd_norm_##KIND##_planes_f16, advkd_norm_##KIND##_last_f16}}}
const NormKernels kMoments = ADVKD_NORM_POINTERS(moments);
const NormKernels kAct = ADVKD_NORM_POINTERS(act);
const NormKernels kSums = ADVKD_NORM_POINTERS(sums);
const NormKernels kBackward = ADVKD_NORM_POINTERS(backward);

// What a piece of norm_act works on.
struct NormTensors {
  const Tensor& x;
  const Tensor* weights = nullptr;
  const Tensor* statistics = nullptr;
  const Tensor* gradient = nullptr;
  const Tensor* means = nullptr;
  const Tensor* out = nullptr;
};

const void* checked(const char* name, const Tensor* t, const Tensor& x) {
  if (t == nullptr) return nullptr;
  check_plain(name, *t, ScalarType::Float, 2 * x.size(1));
  return t->const_data_ptr();
}

// Sizes, and who takes what. `wide`: the sides of `gradient` and of `out` in x's.
NormParameters norm_parameters(
    const char* name, const NormTensors& t, bool upsample, int gradient_side, int out_side, bool reduces) {
  const Tensor& x = t.x;
  STD_TORCH_CHECK(x.dim() == 4, name, ": x must have shape (N, C, H, W)");
  const bool last = last_of(name, x);
  NormParameters p{};
  p.x = x.const_data_ptr();
  p.weights = static_cast<const float*>(checked(name, t.weights, x));
  p.statistics = static_cast<const float*>(checked(name, t.statistics, x));
  p.means = static_cast<const float*>(checked(name, t.means, x));
  if (t.gradient) check_like(name, *t.gradient, x, last, x.numel() * gradient_side * gradient_side);
  if (t.out) check_like(name, *t.out, x, last, x.numel() * out_side * out_side);
  p.gradient = t.gradient ? t.gradient->const_data_ptr() : nullptr;
  p.out = t.out ? t.out->mutable_data_ptr() : nullptr;
  const i64 n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  p.width = last || upsample ? w : h * w;
  const int wide = dtype_of(name, x) == 0 ? 4 : 8;
  const bool vectors = aligned({p.x, p.gradient, p.out, p.weights, p.statistics, p.means});
  p.group = vectors && (last ? channels : p.width) % wide == 0 ? wide : 1;
  const i64 samples = last ? n * h : n, height = upsample && !last ? h : 1, columns = last ? w : p.width / p.group;
  const bool fits = samples <= kMostNormSide && height <= kMostNormSide && columns <= kMostNormSide;
  STD_TORCH_CHECK(fits && channels <= kMostNormSide, name, ": x must have at most 2^29 rows, columns and channels");
  p.samples = static_cast<int>(samples);
  p.height = static_cast<int>(height);
  p.columns = static_cast<int>(columns);
  p.channels = static_cast<int>(channels);
  p.upsample = upsample;
  norm_plan(p, last, reduces);
  return p;
}

void start_norm(const char* name, const NormKernels& kernels, const NormParameters& p, const Tensor& x) {
  const auto kernel = kernels.entries[dtype_of(name, x)][!x.is_contiguous()];
  start(name, kernel, static_cast<i64>(p.tiles) * p.parts, p, x);
}

// A kernel that reduces, and the one that joins its blocks' results in `results`.
void reduce_norm(
    const char* name,
    const NormKernels& kernels,
    Kernel<NormParameters> finish,
    NormParameters p,
    const Tensor& x,
    const Tensor& results) {
  check_plain(name, results, ScalarType::Float, 2 * x.size(1));
  Tensor partials = torch::stable::new_empty(x, std::vector<int64_t>{p.parts, 3, p.channels}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.results = static_cast<float*>(results.mutable_data_ptr());
  start_norm(name, kernels, p, x);
  start(name, finish, p.channels, p, x);
}

void norm_act_moments(const Tensor& x, Tensor statistics) {
  constexpr const char* kName = "norm_act_moments";
  if (x.numel() == 0) return;
  DeviceGuard guard(x.get_device());
  const NormParameters p = norm_parameters(kName, {x}, false, 1, 1, true);
  reduce_norm(kName, kMoments, advkd_norm_finish_moments, p, x, statistics);
}

void norm_act(
    const Tensor& x,
    const Tensor& weights,
    const Tensor& statistics,
    double eps,
    double slope,
    bool upsample,
    Tensor out) {
  constexpr const char* kName = "norm_act";
  if (x.numel() == 0) return;
  DeviceGuard guard(x.get_device());
  const NormTensors tensors{x, &weights, &statistics, nullptr, nullptr, &out};
  NormParameters p = norm_parameters(kName, tensors, upsample, 1, upsample ? 2 : 1, false);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  start_norm(kName, kAct, p, x);
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
  constexpr const char* kName = "norm_act_sums";
  if (x.numel() == 0) return;
  DeviceGuard guard(x.get_device());
  const NormTensors tensors{x, &weights, &statistics, &gradient, nullptr, kept ? &*kept : nullptr};
  NormParameters p = norm_parameters(kName, tensors, upsample, upsample ? 2 : 1, 1, true);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  reduce_norm(kName, kSums, advkd_norm_finish_sums, p, x, sums);
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
  constexpr const char* kName = "norm_act_backward";
  if (x.numel() == 0) return;
  DeviceGuard guard(x.get_device());
  const bool four = upsample && !masked;
  const NormTensors tensors{x, &weights, &statistics, &gradient, &means, &dx};
  NormParameters p = norm_parameters(kName, tensors, four, four ? 2 : 1, 1, false);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  p.masked = masked;
  start_norm(kName, kBackward, p, x);
}

}  // namespace
}  // namespace advkd::training
