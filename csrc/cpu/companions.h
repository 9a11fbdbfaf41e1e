// Threads of our own, for a machine that others use too: they sleep where they wait, and take tasks instead of being assigned
// theirs. Torch-free.
#pragma once

#include <functional>
#include <vector>

#include "cpu/conv_block.h"

namespace advkd {

// Calls body(0) to body(tasks - 1), each once, on the calling thread and on up to threads - 1 companions, which keep to
// `processors`; all on the calling thread while another one is here. After an exception, which is the caller's, the tasks that
// have not begun do not begin.
void run_with_companions(i64 tasks, i64 threads, const std::vector<int>& processors, const std::function<void(i64)>& body);

}  // namespace advkd
