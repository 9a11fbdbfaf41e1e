// Registration of the CUDA kernels with torch, through its stable ABI. Launchers check layout, allocate, launch.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/philox.cu"

namespace advkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Element>
void launch(const Tensor& indices, PhiloxParameters p, void (*kernel)(const i64*, i64, PhiloxParameters, Element*), Tensor& out) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous(), "indices must be contiguous int64");
  STD_TORCH_CHECK(p.count <= i64{1} << 34, "a sample has at most 2^34 elements");
  const i64 samples = indices.numel(), items = samples * ((p.count + 3) / 4);
  if (items == 0) return;
  torch::stable::accelerator::DeviceGuard guard(indices.get_device());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(indices.get_device(), &stream));
  constexpr int kThreads = 256;
  const auto grid = static_cast<unsigned>(std::min<i64>((items + kThreads - 1) / kThreads, 1 << 20));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const i64*>(indices.const_data_ptr()), samples, p, static_cast<Element*>(out.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "philox launch: ", cudaGetErrorString(error));
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

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cuda, m) {
  m.def("philox_words(Tensor indices, int seed, int count, int stream, int step) -> Tensor");
  m.def("philox_normal(Tensor indices, int seed, int[] shape, int stream, int step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("philox_words", TORCH_BOX(&advkd::philox_words));
  m.impl("philox_normal", TORCH_BOX(&advkd::philox_normal));
}
