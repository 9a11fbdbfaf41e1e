// What the launchers of the CUDA kernels share: torch's stable ABI, and starting a kernel on torch's stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "common/philox.h"

namespace advkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr i64 kMostBlocks = (i64{1} << 31) - 1;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  // Its successor's name came with torch 2.13.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return stream;
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " launch: ", cudaGetErrorString(error));
}

// A dtype's place in ADVKD_DTYPES.
int dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::BFloat16: return 1;
    case ScalarType::Half: return 2;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " takes float32, bfloat16 and float16");
}

const void* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

void* writable(const std::optional<Tensor>& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}

int device_attribute(const Tensor& t, cudaDeviceAttr attribute) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, t.get_device());
  STD_TORCH_CHECK(error == cudaSuccess, "cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return value;
}

// Lets a kernel have `bytes` of dynamic shared memory on the current device, that of `t`. Above 48 KB it must be asked for: once
// and for as much as there is, so that no launch finds a limit that another one has lowered.
template <typename Kernel>
void allow_shared_memory(const char* name, Kernel kernel, int bytes, const Tensor& t) {
  if (bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (allowed.count({function, t.get_device()})) return;
  const int most = device_attribute(t, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
  allowed.insert({function, t.get_device()});
}

bool aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return false;
  return true;
}

// Channels last, as torch defines it: what has one element in a direction has no stride there.
bool channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  i64 expected = 1;
  for (const int side : {1, 3, 2, 0}) {
    if (t.size(side) != 1 && t.stride(side) != expected) return false;
    expected *= t.size(side);
  }
  return true;
}

}  // namespace
}  // namespace advkd
