// The CUDA kernels' host functions as torch ops, for tensors of any device: they plan, whoever calls starts the kernels.

#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cuda/host/boxed.h"

namespace advkd::host {
namespace {

using torch::stable::detail::from;

Tensor bytes_of(const std::vector<unsigned char>& bytes) {
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(bytes.size())};
  Tensor tensor = torch::stable::empty(shape, torch::headeronly::ScalarType::Byte);
  std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

Device device_of(StableIValue value) {
  const auto limits = take<std::vector<std::int64_t>>(value);
  require(limits.size() == 3, "device must be multiprocessors, bytes of shared memory and compute capability");
  return {static_cast<int>(limits[0]), static_cast<int>(limits[1]), static_cast<int>(limits[2])};
}

// Parameters' bytes; names of the source, its variant and the kernels; scratch, its offset, and of each launch blocks, threads and
// bytes of shared memory.
void put_results(StableIValue* stack, const Plan& plan) {
  std::vector<std::string> names{plan.source, plan.variant};
  std::vector<std::int64_t> numbers{plan.scratch, plan.scratch_offset};
  for (const Launch& launch : plan.launches) {
    names.push_back(launch.kernel);
    numbers.insert(numbers.end(), {launch.blocks, launch.threads, launch.shared});
  }
  stack[0] = from(bytes_of(plan.parameters));
  stack[1] = from(names);
  stack[2] = from(numbers);
}

template <typename Function>
void plan_boxed(const char* name, Function function, StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  using Called = Signature<Function>;
  require_counts<Function>(name, arguments, outputs, 1, 3);
  const auto held = Called::take(stack);
  put_results(stack, plan_op(name, function, device_of(stack[Called::kCount]), held));
}

}  // namespace
}  // namespace advkd::host

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
#define ADVKD_DEFINE(NAME, ARGUMENTS) \
  m.def("cuda_" #NAME "(" ARGUMENTS ", int[] device) -> (Tensor parameters, str[] names, int[] numbers)");
  ADVKD_CUDA_OPS(ADVKD_DEFINE)
#undef ADVKD_DEFINE
#define ADVKD_DEFINE(NAME, SIGNATURE) m.def("cuda_" #NAME SIGNATURE);
  ADVKD_CUDA_QUERIES(ADVKD_DEFINE)
#undef ADVKD_DEFINE
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CompositeExplicitAutograd, m) {
#define ADVKD_IMPLEMENT(NAME, ARGUMENTS)                                                \
  m.impl("cuda_" #NAME, [](StableIValue* stack, uint64_t arguments, uint64_t outputs) { \
    advkd::host::plan_boxed(#NAME, advkd::host::NAME, stack, arguments, outputs);       \
  });
  ADVKD_CUDA_OPS(ADVKD_IMPLEMENT)
#undef ADVKD_IMPLEMENT
#define ADVKD_IMPLEMENT(NAME, SIGNATURE) m.impl("cuda_" #NAME, TORCH_BOX(&advkd::host::NAME));
  ADVKD_CUDA_QUERIES(ADVKD_IMPLEMENT)
#undef ADVKD_IMPLEMENT
}
