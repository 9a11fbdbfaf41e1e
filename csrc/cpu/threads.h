// How the registered kernels are spread over threads: torch's while the machine is ours, companions while others use it too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>

#include "cpu/companions.h"
#include "cpu/neighbours.h"

namespace advkd {

inline i64 threads() {
  return torch::stable::get_num_threads();
}

// body(begin, end) over parts of [0, count), of `grain` items at least where there are so many.
inline void spread(i64 count, i64 grain, const std::function<void(i64, i64)>& body) {
  const std::vector<int> processors = crowded_processors(threads());
  if (processors.empty()) return torch::stable::parallel_for(0, count, grain, body);
  constexpr i64 kTasksPerThread = 4;
  const i64 tasks = std::clamp<i64>(count / grain, count > 0, kTasksPerThread * threads());
  run_with_companions(tasks, threads(), processors, [&](i64 task) { body(count * task / tasks, count * (task + 1) / tasks); });
}

}  // namespace advkd
