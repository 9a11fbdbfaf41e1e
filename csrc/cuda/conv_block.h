// Parameters of the student's convolutions on NVIDIA GPUs: what the launchers fill and the kernels read, and the plan of their
// tiles. No Torch, no standard library.
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

#ifndef __CUDACC_RTC__
constexpr ConvShape kConvShapes[] = {{4, 4, 1}, {4, 3, 1}, {4, 2, 2}, {4, 1, 2}, {2, 2, 2}, {1, 1, 2}};
constexpr int kConvShapeCount = 6;
constexpr i64 kMostConvTiles = i64{1} << 30;

// What a plan depends on beside the sizes: bytes of an element, whether a product is three, and the device.
struct ConvDevice {
  int element, split;
  int multiprocessors, shared_limit;  // bytes of shared memory that a block may have
};

inline i64 conv_cover(i64 n, i64 part) {
  return (n + part - 1) / part;
}

inline i64 conv_clamp(i64 n, i64 most) {
  return n < 1 ? 1 : n < most ? n : most;
}

inline int conv_log(i64 n) {
  int log = 0;
  while (i64{1} << log < n) ++log;
  return log;
}

inline int conv_min(int a, int b) {
  return a < b ? a : b;
}

// The tile of so many pixels that fits x best. Whether it is not mostly empty.
inline bool conv_tile(ConvBlockParameters& p, int log_pixels) {
  p.log_width = conv_min(conv_log(p.width), log_pixels >= 9 ? 5 : 4);
  p.log_width = conv_min(p.log_width, log_pixels);
  p.log_height = conv_min(conv_log(p.height), log_pixels - p.log_width);
  p.tile_images = 1 << (log_pixels - p.log_width - p.log_height);
  p.halo_height = (1 << p.log_height) + p.side - 1;
  p.halo_width = (1 << p.log_width) + p.side - 1;
  p.tile_rows = static_cast<int>(conv_cover(p.height, i64{1} << p.log_height));
  p.tile_columns = static_cast<int>(conv_cover(p.width, i64{1} << p.log_width));
  return p.tile_images == 1 || p.tile_images <= 1 << conv_log(p.images);
}

inline i64 conv_tiles(const ConvBlockParameters& p) {
  return conv_cover(p.images, p.tile_images) * p.tile_rows * p.tile_columns;
}

// Chunks, stages and their place: as many blocks on a multiprocessor as its registers hold, a stage to spare, large chunks;
// what cannot be had is given up from the last to the first. `weights`: bytes of one step's in the block; `before`: bytes of
// shared memory for other things. The number of blocks on a multiprocessor, or 0.
inline int conv_fit(ConvBlockParameters& p, const ConvDevice& device, int most_blocks, int resident, int weights, int before) {
  const i64 halo = static_cast<i64>(p.tile_images) * p.halo_height * p.halo_width;
  const i64 stay = resident ? i64{p.steps} * weights : 0, place = before + stay;
  for (int blocks = most_blocks; blocks >= 1; --blocks) {
    const i64 room = (device.shared_limit + 1024) / blocks - 1024 - place;
    for (int least = 3; least >= 2; --least)
      for (int chunk = 4; chunk >= 1; --chunk) {
        const i64 stage = halo * (32 * chunk + 16) + (resident ? 0 : i64{chunk} * weights);
        if (p.steps % chunk != 0 || room < least * stage) continue;
        p.chunk = chunk;
        p.chunks = p.steps / chunk;
        p.stages = static_cast<int>(conv_clamp(room / stage, 4));
        p.resident = resident;
        p.stages_place = static_cast<int>(place);
        p.stage_bytes = static_cast<int>(stage);
        p.shared_bytes = p.stages_place + p.stages * p.stage_bytes;
        return blocks;
      }
  }
  return 0;
}

// Shares out the tiles among as many blocks as run at a time. `per_tile`: blocks that one tile takes. Turns of a block.
inline i64 conv_share(ConvBlockParameters& p, const ConvDevice& device, int blocks, int per_tile) {
  const i64 tiles = conv_tiles(p), most = conv_clamp(i64{blocks} * device.multiprocessors / per_tile, tiles);
  const i64 turns = conv_cover(tiles, most);
  p.tiles = static_cast<int>(conv_clamp(tiles, kMostConvTiles));
  p.walkers = static_cast<int>(conv_cover(tiles, turns));
  return turns;
}

// Predicted cycles, by which plans are compared: a block's products (6 cycles on one of four tensor cores), its reads of shared
// memory (128 bytes a cycle) and of device memory and L2 (16 bytes a cycle), or a chain of dependent steps (40 cycles each).
inline i64 conv_cost(const ConvBlockParameters& p, const ConvDevice& device, const ConvShape& shape, int blocks, i64 turns) {
  const i64 taps = p.side * p.side, work = conv_cover(p.steps * taps, p.parts);
  const i64 grid = i64{p.walkers} * p.channel_blocks * p.phases;
  const i64 active = conv_clamp(conv_cover(grid, device.multiprocessors), blocks);
  const i64 rounds = turns * conv_cover(grid, active * device.multiprocessors);
  const i64 products = work * shape.rows * shape.columns * (device.split ? 72 : 24);
  const i64 reads = work * (shape.rows + shape.columns) * 32;
  const i64 halo = i64{p.tile_images} * p.halo_height * p.halo_width * p.steps * 32;
  const i64 weights = p.steps * taps * shape.columns * p.channel_warps * 512;
  const i64 made = i64{256} * shape.rows * p.pixel_warps * shape.columns * p.channel_warps * device.element;
  const i64 bytes = halo + made + (p.resident ? 0 : weights);
  i64 busiest = products > reads ? products : reads;
  busiest = active * (busiest > bytes / 16 ? busiest : bytes / 16);
  const i64 chain = work * 40;
  // What does not overlap: a part of the copies, the begin and the end of a tile, weights that come first.
  const i64 rest = active * bytes / 64 + 600, first = p.resident ? active * weights / 16 : 0;
  return rounds * ((busiest > chain ? busiest : chain) + rest) + first;
}

// Whether a warp's sums of `shape` by `channel_warps` warps suit the layer, whose best width of sums is `best`.
inline bool conv_suits(const ConvBlockParameters& p, const ConvShape& shape, int best, int channel_warps, int parts) {
  const bool small = shape.rows * shape.columns == 1;
  // tanh of many sums would be long code for a layer that has few channels.
  if (!small && (parts > 1 || p.activation == 2)) return false;
  if (shape.rows == 4 && shape.columns != best) return false;
  return (channel_warps == 1 || shape.columns * channel_warps / 2 < p.columns) && parts * channel_warps <= kConvWarps;
}

// Of 16 x 1 to 4 channels that with the least reads of shared memory.
inline int conv_best_columns(int columns) {
  int best = 4;
  for (int c = 3; c >= 1; --c)
    if (conv_cover(columns, c) * (c + 4) < conv_cover(columns, best) * (best + 4)) best = c;
  return best;
}

// One candidate's plan; its predicted cycles, or -1 where it does not fit.
inline i64 conv_layer_try(
    ConvBlockParameters& p, const ConvDevice& device, int shape_index, int channel_warps, int parts, int resident) {
  const ConvShape& shape = kConvShapes[shape_index];
  p.shape = shape_index;
  p.channel_warps = channel_warps;
  p.parts = parts;
  p.pixel_warps = kConvWarps / (channel_warps * parts);
  const int log_pixels = conv_log(16 * shape.rows * p.pixel_warps);
  if (!conv_tile(p, log_pixels) && log_pixels > 4) return -1;
  p.channel_blocks = static_cast<int>(conv_cover(p.columns, shape.columns * channel_warps));
  const int weights = p.side * p.side * shape.columns * channel_warps * 512;
  const int before = kConvWarps * conv_store_bytes(shape.columns, device.element);
  // Full float32 takes more registers for the parts of its operands.
  const int most = device.split && shape.rows * shape.columns >= 8 ? 1 : shape.blocks;
  const int blocks = conv_fit(p, device, most, resident, weights, before);
  if (blocks == 0) return -1;
  const i64 turns = conv_share(p, device, blocks, p.channel_blocks * p.phases);
  return conv_cost(p, device, shape, blocks, turns);
}

// The candidate with the least predicted cycles. Whether there is one.
inline bool conv_layer_plan(ConvBlockParameters& p, const ConvDevice& device) {
  i64 least = -1;
  ConvBlockParameters candidate = p;
  const int best = conv_best_columns(p.columns);
  for (int shape = 0; shape < kConvShapeCount; ++shape)
    for (int channel_warps = 1; channel_warps <= kConvWarps; channel_warps *= 2)
      for (int parts = 1; parts <= kConvWarps; parts *= 2)
        for (int resident = 1; resident >= 0; --resident) {
          if (!conv_suits(p, kConvShapes[shape], best, channel_warps, parts)) continue;
          const i64 cost = conv_layer_try(candidate, device, shape, channel_warps, parts, resident);
          if (cost < 0 || (least >= 0 && cost >= least)) continue;
          least = cost;
          p = candidate;
        }
  return least >= 0 && conv_tiles(p) < kMostConvTiles;
}

// Tiles of 8 x 32 pixels of the image. Whether one fits.
inline bool conv_image_plan(ConvBlockParameters& p, const ConvDevice& device) {
  p.log_height = 3;
  p.log_width = 5;
  p.tile_images = 1;
  p.halo_height = 10;
  p.halo_width = 34;
  p.tile_rows = static_cast<int>(conv_cover(p.height, 8));
  p.tile_columns = static_cast<int>(conv_cover(p.width, 32));
  p.shape = p.columns - 1;
  p.pixel_warps = kConvWarps;
  p.channel_warps = p.parts = p.channel_blocks = 1;
  // What the nine taps make of a tile with its halo: planes of float32, see conv_image.
  const int before = 9 * p.channels * kImagePlane * 4;
  const int blocks = conv_fit(p, device, 2, 0, p.columns * 512, before);
  if (blocks == 0) return false;
  conv_share(p, device, blocks, 1);
  return conv_tiles(p) < kMostConvTiles;
}
#endif

}  // namespace advkd
