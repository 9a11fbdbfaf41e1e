// Parameters of student_stem on NVIDIA GPUs: what the host fills and the kernel reads. No Torch, no standard library.
#pragma once

#include "common/philox.h"
#include "cuda/block.h"

namespace advkd {

constexpr int kStemLayers = 32;
constexpr int kStemWarps = kThreads / 32;
constexpr int kStemZeros = 32;  // bytes: a step of what is outside an image
constexpr int kStemPitch = 40;  // floats from pixel to pixel of two columns' sums: without bank conflicts

// A 3x3 convolution, of the up-sampled input where so marked, and LeakyReLU. A column is 16 output channels.
struct StemLayer {
  const void* weights;  // as fragments
  const float* bias;
  int c_in, c_out, side, upsample;  // side: the input's, a power of two
  // Filled by stem_plan. `shift`: log2 of the side. 1 << `part_shift` warps share a sum. `rows`: groups of 16 pixels of a warp.
  // A cluster's blocks are 1 << `line_shift` sets, each with its share of the pixels; in a set each has its share of the
  // columns. `bias_place`: floats before this layer's in shared memory.
  int shift, part_shift, rows, line_shift, bias_place;
};

// Shared memory, from the front: zeros that stand for what is outside an image, all biases, the warps' sums, and two buffers
// that hold the input of the even and of the odd layers.
struct StemParameters {
  const void* x;
  void* out;
  i64 samples;
  StemLayer layers[kStemLayers];
  int count, images;  // images: of a cluster
  int out_pitch;      // channels from pixel to pixel
  float slope;
  int bias, sums, buffers[2];  // filled by stem_plan: bytes from the front
};

}  // namespace advkd
