// Launcher of two convolutions in one kernel: it checks shapes and layouts, plans, and starts the kernel.

#include "cuda/conv_pair.cu"
#include "cuda/register.h"

namespace advkd::pair {
namespace {

constexpr const char* kName = "conv_pair";
constexpr i64 kMostSide = i64{1} << 29;

void check_shape(const char* what, const Tensor& t, std::initializer_list<i64> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t side = 0;
  for (const i64 n : shape) fits = fits && t.size(side++) == n;
  STD_TORCH_CHECK(fits, kName, ": ", what, " has the wrong shape");
}

void check_storage(const char* what, const Tensor& t, ScalarType dtype, const Tensor& x, bool whole) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, kName, ": ", what, " has the wrong dtype for the product");
  const bool fits = t.is_contiguous() && t.get_device() == x.get_device();
  STD_TORCH_CHECK(fits, kName, ": ", what, " must be contiguous and on x's device");
  STD_TORCH_CHECK(!whole || aligned({t.const_data_ptr()}), kName, ": ", what, " must be aligned to 16 bytes");
}

void check_channels(i64 channels) {
  const bool fits = channels % 16 == 0 && 0 < channels && channels <= kMostPairChannels;
  STD_TORCH_CHECK(fits, kName, ": channels must be multiples of 16 up to 64");
}

#define ADVKD_POINTER(P) {advkd_conv_pair_columns1_##P, advkd_conv_pair_columns2_##P, advkd_conv_pair_columns3_##P},
void (*const kKernels[][3])(ConvPairParameters) = {ADVKD_PRODUCTS(ADVKD_POINTER)};
#undef ADVKD_POINTER
constexpr ScalarType kStorage[] = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Float};

void conv_pair(
    const Tensor& x,
    const Tensor& weights1,
    const Tensor& bias1,
    const Tensor& weights2,
    const Tensor& bias2,
    Tensor out,
    bool upsample,
    bool image,
    int64_t activation,
    double slope,
    int64_t product) {
  STD_TORCH_CHECK(0 <= product && product < 4, kName, ": product must be 0 to 3");
  STD_TORCH_CHECK(0 <= activation && activation <= 2, kName, ": activation must be 0, 1 or 2");
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4, kName, ": x and out must have four dimensions");
  const ScalarType dtype = kStorage[product];
  const int element = dtype == ScalarType::Float ? 4 : 2, step = 32 / element;
  const i64 n = x.size(0), height = x.size(1), width = x.size(2), c_in = x.size(3);
  const i64 c_mid = bias1.numel(), c_out = bias2.numel(), pitch = out.size(3), scale = upsample ? 2 : 1;
  STD_TORCH_CHECK(height <= kMostSide && width <= kMostSide, kName, ": x must have at most 2^29 rows and columns");
  check_channels(c_in);
  check_channels(c_mid);
  if (image) {
    STD_TORCH_CHECK(1 <= c_out && c_out <= 4, kName, ": an image must have 1 to 4 channels");
    check_shape("out", out, {n, c_out, scale * height, scale * width});
  } else {
    check_channels(c_out);
    STD_TORCH_CHECK(pitch >= c_out && pitch % 16 == 0, kName, ": out must have a multiple of 16 channels, its own or more");
    STD_TORCH_CHECK(pitch <= kMostSide, kName, ": out must have at most 2^29 channels");
    check_shape("out", out, {n, scale * height, scale * width, pitch});
  }
  const i64 taps1 = upsample ? 4 : 9, taps2 = image ? 1 : 9, columns = image ? pair_cover(9 * c_out, 16) : c_out / 16;
  check_shape("weights1", weights1, {upsample ? 4 : 1, c_in / step, taps1, c_mid / 16, 32, 16 / element});
  check_shape("weights2", weights2, {1, c_mid / step, taps2, columns, 32, 16 / element});
  check_storage("x", x, dtype, x, true);
  check_storage("weights1", weights1, dtype, x, true);
  check_storage("weights2", weights2, dtype, x, true);
  check_storage("out", out, dtype, x, !image);
  check_storage("bias1", bias1, ScalarType::Float, x, false);
  check_storage("bias2", bias2, ScalarType::Float, x, false);
  if (x.numel() == 0) return;
  ConvPairParameters p{};
  p.x = x.const_data_ptr();
  p.weights1 = weights1.const_data_ptr();
  p.weights2 = weights2.const_data_ptr();
  p.bias1 = static_cast<const float*>(bias1.const_data_ptr());
  p.bias2 = static_cast<const float*>(bias2.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.samples = n;
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.c_in = static_cast<int>(c_in);
  p.c_mid = static_cast<int>(c_mid);
  p.c_out = static_cast<int>(c_out);
  p.pitch = static_cast<int>(image ? 0 : pitch);
  p.upsample = upsample;
  p.image = image;
  p.activation = static_cast<int>(activation);
  p.slope = static_cast<float>(slope);
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const int limit = device_attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool fits = pair_plan(p, element, device_attribute(x, cudaDevAttrMultiProcessorCount), limit);
  STD_TORCH_CHECK(fits, kName, ": these channels do not fit in this GPU's shared memory");
  STD_TORCH_CHECK(p.blocks <= kMostBlocks, kName, ": x is too large for one launch");
  const auto kernel = kKernels[product][p.columns - 1];
  allow_shared_memory(kName, kernel, p.shared, x);
  const auto stream = static_cast<cudaStream_t>(current_stream(x));
  kernel<<<static_cast<unsigned>(p.blocks), kPairThreads, p.shared, stream>>>(p);
  check_launch(kName);
}

}  // namespace
}  // namespace advkd::pair

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cuda, m) {
  m.def(
      "conv_pair(Tensor x, Tensor weights1, Tensor bias1, Tensor weights2, Tensor bias2, Tensor(a!) out, bool upsample, "
      "bool image, int activation, float slope, int product) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("conv_pair", TORCH_BOX(&advkd::pair::conv_pair));
}
