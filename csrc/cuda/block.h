// The size of a block, which the host side and the kernels of the training ops share.
#pragma once

namespace advkd {

constexpr int kThreads = 256;

}  // namespace advkd
