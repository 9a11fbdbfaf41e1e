// Starts the CUDA kernels on torch's current stream, as the host functions plan them: library advkd_cuda.

#include "cuda/kernel.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <set>
#include <string_view>

#include "cuda/host/boxed.h"

namespace advkd {

const Kernel* Kernel::last = nullptr;

namespace {

using host::Device;
using host::Launch;
using host::Plan;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call that looks for errors would report this one
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

const void* kernel_of(std::string_view name) {
  static const std::map<std::string_view, const void*> kernels = [] {
    std::map<std::string_view, const void*> all;
    for (const Kernel* kernel = Kernel::last; kernel; kernel = kernel->before) all.emplace(kernel->name, kernel->function);
    return all;
  }();
  const auto found = kernels.find(name);
  STD_TORCH_CHECK(found != kernels.end(), "there is no kernel ", std::string(name));
  return found->second;
}

int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Device limits(int device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const Device limits{
      attribute(device, cudaDevAttrMultiProcessorCount),
      attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(device, cudaDevAttrComputeCapabilityMajor)};
  return known[device] = limits;
}

// Lets a kernel have its dynamic shared memory on a device, the current one. Above 48 KB it must be asked for: once and for as much
// as there is, so that no launch finds a limit that another one has lowered.
void allow_shared_memory(const void* kernel, const Launch& launch, int device) {
  if (launch.shared <= 48 * 1024) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  const int most = limits(device).shared_limit;
  check(launch.kernel.c_str(), cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert({kernel, device});
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  // Its successor's name came with torch 2.13.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// `first`: the op's first argument, on whose device the kernels run.
void start(Plan plan, const Tensor& first) {
  if (plan.launches.empty()) return;
  const int device = first.get_device_index();
  const DeviceGuard guard(device);
  std::optional<Tensor> scratch;
  if (plan.scratch > 0) {
    scratch = torch::stable::new_empty(first, std::vector<int64_t>{plan.scratch}, torch::headeronly::ScalarType::Float);
    const void* const address = scratch->mutable_data_ptr();
    std::memcpy(plan.parameters.data() + plan.scratch_offset, &address, sizeof address);
  }
  void* arguments[] = {plan.parameters.data()};
  const cudaStream_t stream = current_stream(device);
  for (const Launch& launch : plan.launches) {
    const void* const kernel = kernel_of(launch.kernel);
    allow_shared_memory(kernel, launch, device);
    const dim3 blocks(static_cast<unsigned>(launch.blocks)), threads(static_cast<unsigned>(launch.threads));
    check(launch.kernel.c_str(), cudaLaunchKernel(kernel, blocks, threads, arguments, launch.shared, stream));
  }
}

template <typename Function>
void run(const char* name, Function function, StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  host::require_counts<Function>(name, arguments, outputs, 0, 0);
  const auto held = host::Signature<Function>::take(stack);
  const Tensor& first = std::get<0>(held);
  STD_TORCH_CHECK(first.get_device_index() >= 0, name, ": the first argument must be on a CUDA device");
  start(host::plan_op(name, function, limits(first.get_device_index()), held), first);
}

// Whether this object holds code for the device of `x`: 0, or CUDA's error.
int64_t missing_code(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of("advkd_philox_words"));
  cudaGetLastError();
  return error;
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cuda, m) {
  m.def("missing_code(Tensor x) -> int");
#define ADVKD_DEFINE(NAME, ARGUMENTS) m.def(#NAME "(" ARGUMENTS ") -> ()");
  ADVKD_CUDA_OPS(ADVKD_DEFINE)
#undef ADVKD_DEFINE
#define ADVKD_DEFINE(NAME, SIGNATURE) m.def(#NAME SIGNATURE);
  ADVKD_CUDA_QUERIES(ADVKD_DEFINE)
#undef ADVKD_DEFINE
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("missing_code", TORCH_BOX(&advkd::missing_code));
#define ADVKD_IMPLEMENT(NAME, ARGUMENTS)                                        \
  m.impl(#NAME, [](StableIValue* stack, uint64_t arguments, uint64_t outputs) { \
    advkd::run(#NAME, advkd::host::NAME, stack, arguments, outputs);            \
  });
  ADVKD_CUDA_OPS(ADVKD_IMPLEMENT)
#undef ADVKD_IMPLEMENT
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CompositeExplicitAutograd, m) {
#define ADVKD_IMPLEMENT(NAME, SIGNATURE) m.impl(#NAME, TORCH_BOX(&advkd::host::NAME));
  ADVKD_CUDA_QUERIES(ADVKD_IMPLEMENT)
#undef ADVKD_IMPLEMENT
}
