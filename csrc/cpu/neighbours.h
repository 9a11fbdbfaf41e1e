// Other processes on the processors that this one may use. Torch-free; Linux only, elsewhere there are none.
#pragma once

#include <vector>

#include "cpu/conv_block.h"

namespace advkd {

// Processors that a process of `threads` threads keeps to while others use the machine; empty while it has the machine to
// itself. With more threads ready than processors every barrier waits for one that does not run; on as many processors as the
// others leave, one that waits makes room for the other. ADVKD_SHARE=0 and 1 in the environment stand for never and always.
//
// Looked at anew at most four times a second, when asked.
std::vector<int> crowded_processors(i64 threads);

}  // namespace advkd
