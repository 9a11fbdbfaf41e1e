// Launchers of the student's convolutions: they check layouts, plan the tiles for the device, and start the kernels.

#include <array>
#include <map>

#include "cuda/conv_block.cu"
#include "cuda/register.h"

namespace advkd::conv {
namespace {

using Kernel = void (*)(ConvBlockParameters);

constexpr int kUnit = 16;  // channels come in multiples of it
constexpr int kProducts = 4;

struct Kernels {
  Kernel layers[kConvShapeCount], images[3];
};
#define ADVKD_CONV_POINTERS(P)                                                                            \
  {{advkd_conv_layer_4x4_##P, advkd_conv_layer_4x3_##P, advkd_conv_layer_4x2_##P, advkd_conv_layer_4x1_##P, \
    advkd_conv_layer_2x2_##P, advkd_conv_layer_1x1_##P},                                                  \
   {advkd_conv_image_1_##P, advkd_conv_image_2_##P, advkd_conv_image_3_##P}},
const Kernels kKernels[kProducts] = {ADVKD_PRODUCTS(ADVKD_CONV_POINTERS)};
#undef ADVKD_CONV_POINTERS

// The storage of products in the order of ADVKD_PRODUCTS.
constexpr ScalarType kStorage[kProducts] = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Float};

// `whole`: read or written in vectors of 16 bytes.
void check_tensor(
    const char* name,
    const Tensor& t,
    std::initializer_list<i64> shape,
    ScalarType dtype,
    const Tensor& x,
    bool whole = true) {
  bool fits = t.scalar_type() == dtype && t.dim() == static_cast<i64>(shape.size());
  int side = 0;
  for (const i64 size : shape) fits = fits && t.size(side++) == size;
  STD_TORCH_CHECK(fits, name, " has the wrong dtype or shape");
  STD_TORCH_CHECK(t.is_contiguous() && t.get_device() == x.get_device(), name, " must be contiguous and on x's device");
  STD_TORCH_CHECK(!whole || aligned({t.const_data_ptr()}), name, " must begin at a multiple of 16 bytes");
}

ConvDevice plan_device(const Tensor& x, int element, bool split) {
  return {
      element,
      split,
      device_attribute(x, cudaDevAttrMultiProcessorCount),
      device_attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// conv_layer_plan, which takes some microseconds, once for every layer and batch that a thread meets.
bool plan_layer(ConvBlockParameters& p, const ConvDevice& d) {
  thread_local std::map<std::array<int, 12>, ConvBlockParameters> plans;
  const std::array<int, 12> key{p.images, p.height, p.width, p.steps, p.columns, p.channels, p.phases, p.activation, d.element,
                                d.split, d.multiprocessors, d.shared_limit};
  const auto known = plans.find(key);
  if (known == plans.end()) {
    if (!conv_layer_plan(p, d)) return false;
    if (plans.size() == 1024) plans.clear();
    plans.emplace(key, p);
    return true;
  }
  ConvBlockParameters plan = known->second;
  plan.x = p.x;
  plan.weights = p.weights;
  plan.bias = p.bias;
  plan.out = p.out;
  plan.slope = p.slope;
  p = plan;
  return true;
}

// Sizes and pointers after the checks that both kernels share.
ConvBlockParameters parameters(
    const Tensor& x, const Tensor& weights, const Tensor& bias, Tensor& out, i64 activation, double slope, i64 product) {
  STD_TORCH_CHECK(0 <= product && product < kProducts, "product must be 0 to 3");
  STD_TORCH_CHECK(0 <= activation && activation <= 2, "activation must be 0, 1 or 2");
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (N, H, W, C)");
  const i64 n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  STD_TORCH_CHECK(h > 0 && w > 0 && c > 0 && c % kUnit == 0, "x must have channels in units of 16");
  const bool small = n < kMostConvTiles && h < kMostConvTiles && w < kMostConvTiles && c < kMostConvTiles;
  STD_TORCH_CHECK(small, "x must have sides below 2^30");
  check_tensor("x", x, {n, h, w, c}, kStorage[product], x);
  STD_TORCH_CHECK(bias.dim() == 1, "bias must have one dimension");
  check_tensor("bias", bias, {bias.size(0)}, ScalarType::Float, x, false);
  ConvBlockParameters p{};
  p.x = x.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.images = static_cast<int>(n);
  p.height = static_cast<int>(h);
  p.width = static_cast<int>(w);
  p.steps = static_cast<int>(c * (product < 2 ? 2 : 4) / 32);
  p.activation = static_cast<int>(activation);
  // LeakyReLU with the slope 1 is no activation.
  p.slope = activation ? static_cast<float>(slope) : 1.0f;
  return p;
}

void start(const char* name, Kernel kernel, i64 blocks, const ConvBlockParameters& p, const Tensor& x) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  allow_shared_memory(name, kernel, p.shared_bytes, x);
  const auto stream = static_cast<cudaStream_t>(current_stream(x));
  kernel<<<static_cast<unsigned>(blocks), kConvThreads, p.shared_bytes, stream>>>(p);
  check_launch(name);
}

void conv_layer(
    const Tensor& x,
    const Tensor& weights,
    const Tensor& bias,
    Tensor out,
    bool upsample,
    int64_t activation,
    double slope,
    int64_t product) {
  ConvBlockParameters p = parameters(x, weights, bias, out, activation, slope, product);
  const int element = product < 2 ? 2 : 4, scale = upsample ? 2 : 1;
  const i64 c_out = bias.size(0);
  STD_TORCH_CHECK(c_out > 0 && c_out % kUnit == 0 && c_out < kMostConvTiles, "bias must have channels in units of 16");
  p.columns = static_cast<int>(c_out / kUnit);
  p.side = upsample ? 2 : 3;
  p.phases = upsample ? 4 : 1;
  check_tensor("weights", weights, {p.phases, p.steps, p.side * p.side, p.columns, 32, 16 / element}, kStorage[product], x);
  STD_TORCH_CHECK(out.dim() == 4, "out must have shape (N, H', W', P)");
  const i64 channels = out.size(3);
  const bool enough = channels >= c_out && channels % kUnit == 0 && channels < kMostConvTiles;
  STD_TORCH_CHECK(enough, "out must have channels in units of 16, at least bias's");
  check_tensor("out", out, {p.images, scale * x.size(1), scale * x.size(2), channels}, kStorage[product], x);
  if (x.numel() == 0) return;
  p.channels = static_cast<int>(channels);
  const bool planned = plan_layer(p, plan_device(x, element, product == 3));
  STD_TORCH_CHECK(planned, "conv_layer: no tile of such a layer fits the device");
  start("conv_layer", kKernels[product].layers[p.shape], i64{p.walkers} * p.channel_blocks * p.phases, p, x);
}

void conv_image(
    const Tensor& x,
    const Tensor& weights,
    const Tensor& bias,
    Tensor out,
    int64_t activation,
    double slope,
    int64_t product) {
  ConvBlockParameters p = parameters(x, weights, bias, out, activation, slope, product);
  const int element = product < 2 ? 2 : 4;
  const i64 c_out = bias.size(0);
  STD_TORCH_CHECK(1 <= c_out && c_out <= 4, "bias must have 1 to 4 channels");
  p.channels = static_cast<int>(c_out);
  p.columns = static_cast<int>((9 * c_out + kUnit - 1) / kUnit);
  // A tap is a part of the columns.
  p.side = p.phases = 1;
  check_tensor("weights", weights, {1, p.steps, 1, p.columns, 32, 16 / element}, kStorage[product], x);
  check_tensor("out", out, {p.images, c_out, p.height, p.width}, kStorage[product], x, false);
  if (x.numel() == 0) return;
  const bool planned = conv_image_plan(p, plan_device(x, element, false));
  STD_TORCH_CHECK(planned, "conv_image: no tile of such an image fits the device");
  start("conv_image", kKernels[product].images[p.columns - 1], p.walkers, p, x);
}

}  // namespace
}  // namespace advkd::conv

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cuda, m) {
  m.def(
      "conv_layer(Tensor x, Tensor weights, Tensor bias, Tensor(a!) out, bool upsample, int activation, float slope, "
      "int product) -> ()");
  m.def(
      "conv_image(Tensor x, Tensor weights, Tensor bias, Tensor(a!) out, int activation, float slope, int product) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("conv_layer", TORCH_BOX(&advkd::conv::conv_layer));
  m.impl("conv_image", TORCH_BOX(&advkd::conv::conv_image));
}
