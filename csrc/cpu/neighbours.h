// Other processes on the processors that this one may use. Torch-free; Linux alone, elsewhere there are none.
//
// With more threads ready than processors every barrier waits for one that does not run. On as many processors as the others
// leave, a thread that waits makes room for the next. ADVKD_SHARE=0 and 1 in the environment stand for never and always; in a
// forked child it is always.
#pragma once

#include <vector>

#include "cpu/conv_block.h"

namespace advkd {

// True if others, who take `load` processors' worth of time of so many, leave less than three quarters of one to each thread.
bool is_crowded(i64 threads, i64 processors, double load);

// As many processors as the others leave, and at least the share beside as many busy threads as there are processors.
i64 fair_share(i64 threads, i64 processors, double load);

// Processors that the calling thread and its companions keep to while others use the machine, its own one first; empty where
// they are not crowded. The load is read at most four times a second.
std::vector<int> crowded_processors(i64 threads);

// The same for all threads of a process that may use `allowed` and keeps to `kept` so far, which stay where they can.
std::vector<int> crowded_processors(i64 threads, const std::vector<int>& allowed, const std::vector<int>& kept);

}  // namespace advkd
