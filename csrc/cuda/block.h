// The size of a block, which launchers and kernels of the training ops share.
#pragma once

namespace advkd {

constexpr int kThreads = 256;

}  // namespace advkd
