// Registration of what Python asks about the processors: the instruction set in use, and which processors others leave.

#include "cpu/torch/common.h"

namespace advkd {
namespace {

std::vector<int64_t> crowded(int64_t threads, std::vector<int64_t> allowed, std::vector<int64_t> kept) {
  const std::vector<int> processors = crowded_processors(threads, {allowed.begin(), allowed.end()}, {kept.begin(), kept.end()});
  return {processors.begin(), processors.end()};
}

std::string isa() {
  return kIsaNames[static_cast<int>(current_isa())];
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cpu, m) {
  m.def("crowded(int threads, int[] allowed, int[] kept) -> int[]");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("crowded", TORCH_BOX(&advkd::crowded));
  m.impl("isa", TORCH_BOX(&advkd::isa));
}
