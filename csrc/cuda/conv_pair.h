// Parameters of two convolutions in one kernel on NVIDIA GPUs: what the launchers fill and the kernel reads. No Torch, no
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

#ifndef __CUDACC_RTC__
inline i64 pair_cover(i64 n, i64 part) {
  return (n + part - 1) / part;
}

// For pair_quotient(n, divisor), exact while n * divisor < 2^20 and n / divisor < 2^12.
inline u32 pair_divisor(int divisor) {
  return (1u << 20) / static_cast<u32>(divisor) + 1;
}

inline void pair_try(ConvPairParameters& p, int height, int width, int element) {
  const PairTile tile = pair_tile(height, width, p.upsample != 0);
  const int mid = tile.mid_height * tile.mid_width, units = p.c_mid / 16;
  const int input = tile.input_height * tile.input_width * pair_pitch(p.c_in, element);
  const int output = p.image ? mid * pair_image_pitch(p.c_out) * 4 : height * width * pair_pitch(p.c_out, element);
  p.tile_height = height;
  p.tile_width = width;
  p.down = static_cast<int>(pair_cover(static_cast<i64>(p.height) << p.upsample, height));
  p.across = static_cast<int>(pair_cover(static_cast<i64>(p.width) << p.upsample, width));
  p.blocks = p.samples * p.down * p.across;
  // The pixels of a whole tile are enough for eight warps; of a part of it two share the channels, as do two turns of more than
  // 48, for which there are no registers.
  p.columns = height * width < 256 || units > 3 ? static_cast<int>(pair_cover(units, 2)) : units;
  p.mid_place = input > output ? input : output;
  p.shared = p.mid_place + mid * pair_pitch(p.c_mid, element);
  p.by_input_chunks = pair_divisor(p.c_in * element / 16);
  p.by_input_width = pair_divisor(tile.input_width);
  p.by_grid_width = pair_divisor(tile.grid_width);
  p.by_sets = pair_divisor(static_cast<int>(pair_cover(tile.grid_height * tile.grid_width, 16 * kPairRows1)));
  p.by_out_chunks = pair_divisor(p.image ? 1 : p.c_out * element / 16);
}

// The largest tile that fits in shared memory, but a smaller one where there would be fewer blocks than multiprocessors, or
// where as many blocks cover the images. Whether one fits.
inline bool pair_plan(ConvPairParameters& p, int element, int multiprocessors, int shared_limit) {
  constexpr int kTiles[][2] = {{16, 16}, {8, 16}, {8, 8}};
  bool found = false;
  for (const auto& tile : kTiles) {
    ConvPairParameters next = p;
    pair_try(next, tile[0], tile[1], element);
    if (next.shared > shared_limit) continue;
    if (!found || p.blocks < multiprocessors || next.blocks == p.blocks) p = next;
    found = true;
  }
  return found;
}
#endif

}  // namespace advkd
