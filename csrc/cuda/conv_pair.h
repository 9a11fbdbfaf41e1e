// Parameters of two convolutions in one kernel on NVIDIA GPUs: what the host fills and the kernel reads. No Torch, no
// standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kPairThreads = 256;
constexpr int kMostPairChannels = 64;

// y = activation(conv(leaky_relu(conv(up(x))))), as conv_pair.cu explains it.
struct ConvPairParameters {
  const void *x, *weights1, *weights2;
  const float *bias1, *bias2;
  void* out;
  i64 samples;
  int height, width;          // of x
  int c_in, c_mid, c_out;     // in whole units; with `image` c_out is the image's own
  int pitch;                  // channels of a pixel of `out`, without `image`
  int upsample, image, activation;
  float slope;
  // Filled by pair_plan: outputs of a block and how many such tiles an image has, a warp's channels in units of 16, bytes of
  // shared memory and those before the tile of the first convolution's results, and what pair_quotient takes for a divisor.
  int tile_height, tile_width, down, across;
  int columns, shared, mid_place;
  u32 by_input_chunks, by_input_width, by_grid_width, by_sets, by_out_chunks;
  i64 blocks;
};

// Sizes of a tile of tile_height x tile_width outputs, in pixels: the inputs that they depend on, the first convolution's
// results and, of these, what one phase computes (all of them where nothing is up-sampled).
struct PairTile {
  int input_height, input_width, mid_height, mid_width, grid_height, grid_width;
};

#ifdef __CUDACC__
#define ADVKD_BOTH static __host__ __device__ __forceinline__
#else
#define ADVKD_BOTH static inline
#endif

ADVKD_BOTH PairTile pair_tile(int height, int width, bool upsample) {
  const int mid_height = height + 2, mid_width = width + 2;
  if (upsample) return {height / 2 + 2, width / 2 + 2, mid_height, mid_width, mid_height / 2, mid_width / 2};
  return {height + 4, width + 4, mid_height, mid_width, mid_height, mid_width};
}

// Pixels in shared memory lie an odd number of 16 bytes apart, so that eight neighbours' vectors are in different banks.
ADVKD_BOTH int pair_pitch(int channels, int element) { return channels * element + 16; }

// Floats from one mid pixel's products with the image's weights to the next's: odd for the same reason.
ADVKD_BOTH int pair_image_pitch(int c_out) { return 9 * c_out | 1; }

#undef ADVKD_BOTH

constexpr int kPairRows1 = 3;  // groups of 16 pixels that a warp has at a time in the first convolution,
constexpr int kPairRows2 = 2;  // and in the second, but for strips

}  // namespace advkd
