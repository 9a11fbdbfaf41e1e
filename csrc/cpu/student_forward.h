// The whole student on the CPU: layer after layer on padded channel-last activations, from a flat latent to planar images.
// Torch-free; how loops are spread over threads is the caller's.
//
// Images go through the low-resolution layers together, so that those do not leave cores idle, and through the layers from
// 64 x 64 on one by one, so that memory does not grow with the batch.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cpu/conv_block.h"

namespace advkd {

struct StudentLayer {
  ConvLayer conv;
  const void* packed;
  i64 detail;  // input channels, of those in `conv`, that come from the latent and not from the layer before
};

// Calls its second argument with every worker's number below the first, at the same time where it can.
using Parallel = std::function<void(i64 workers, const std::function<void(i64 worker)>&)>;

// Memory of one call at a time, kept for the next one.
class Workspace {
 public:
  explicit Workspace(i64 bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  char* data() const { return data_; }
  i64 bytes() const { return bytes_; }
  // To whole pages, large ones from the first on.
  static i64 rounded(i64 bytes);

 private:
  char* data_;
  i64 bytes_;
};

// An idle workspace of at least so many bytes, or a new one in place of the largest idle one.
std::unique_ptr<Workspace> acquire_workspace(i64 bytes);
void release_workspace(std::unique_ptr<Workspace>);
// Frees the idle ones; returns how many bytes that were.
i64 clear_workspaces();

i64 student_workspace_bytes(const ConvKernels&, const std::vector<StudentLayer>&, i64 images, i64 threads);

// z: (images, latent_numel) float32; out: planar images in the layers' storage type. The last layer is `dot`.
void run_student(
    const ConvKernels&, const std::vector<StudentLayer>&, const float* z, i64 images, void* out, i64 threads, const Parallel&,
    char* workspace);

// One layer of planar float32 input to planar output in the layer's storage type, in memory of its own.
void conv_block_forward(
    const ConvKernels&, const ConvLayer&, const void* packed, const float* x, i64 images, void* out, i64 threads, const Parallel&);

// Shortest of `repeats` runs of one layer on pseudo-random input, in seconds.
double conv_block_seconds(
    const ConvKernels&, const ConvLayer&, const void* packed, i64 images, i64 repeats, i64 threads, const Parallel&);

// Multiply-adds per second of one thread in registers, measured for so long: the rate that nothing can beat.
double product_rate(const ConvKernels&, Storage, double seconds);

}  // namespace advkd
