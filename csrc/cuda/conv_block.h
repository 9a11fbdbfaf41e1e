// Parameters of the student's convolutions on NVIDIA GPUs: what the host fills and the kernels read. No Torch, no
// standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kConvWarps = 8;
constexpr int kConvThreads = 32 * kConvWarps;

// A block's tile is 2^log_height x 2^log_width pixels of each of tile_images images of x, all of which a warp sums over in
// chunks of the input channels. Both kernels of conv_block.cu take this.
struct ConvBlockParameters {
  const void *x, *weights;
  const float* bias;
  void* out;
  int images, height, width;  // of x
  int steps;                  // of K: 32 bytes of a pixel's input channels each
  int columns;                // 16 output channels each; of the image, results of its nine taps
  int channels;               // those of a pixel of `out`; of the image, its planes
  int side, phases;           // side x side taps (1: the image's are in the columns); phases 4 to up-sample
  int activation;
  float slope;
  // Filled by conv_layer_plan and conv_image_plan.
  int shape;                              // of a warp's sums: kConvShapes
  int pixel_warps, channel_warps, parts;  // how a block's warps share out pixels, output channels and K
  int chunk, chunks, stages;              // steps of a chunk; chunks of all channels; chunks in shared memory at a time
  int resident;                           // whether the block's weights stay in shared memory, or come with each chunk
  int log_height, log_width, tile_images, halo_height, halo_width;
  int tile_rows, tile_columns, tiles;  // of an image and of all
  int channel_blocks, walkers;         // blocks for all channels of a tile's phase; those that share out the tiles
  int stages_place, stage_bytes, shared_bytes;
};

// Sums of a warp: rows x 16 pixels by columns x 16 channels, and how many blocks a multiprocessor's registers hold.
struct ConvShape {
  int rows, columns, blocks;
};

// Bytes that a warp needs to turn 16 pixels' results into whole vectors; for the parts of K, float32 sums.
#ifdef __CUDACC__
#define ADVKD_BOTH static __host__ __device__ __forceinline__
#else
#define ADVKD_BOTH static inline
#endif
ADVKD_BOTH constexpr int conv_store_pitch(int columns, int element) { return 16 * columns * element + 8 * element; }
ADVKD_BOTH constexpr int conv_store_bytes(int columns, int element) {
  return 16 * conv_store_pitch(columns, columns == 1 ? 4 : element);
}
#undef ADVKD_BOTH

// The image's tile is 8 x 32 pixels, with its halo 10 x 34: 22 groups of 16, of which a warp has three. What the taps make of
// them are planes of so many float32 numbers; 4 more than a multiple of 16, so that a warp writes to 32 different banks.
constexpr int kImageRows = 3;
constexpr int kImagePlane = 340;

}  // namespace advkd
