// Parameters of student_stem on NVIDIA GPUs: what the launchers fill and the kernel reads. No Torch, no standard library.
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

#ifndef __CUDACC_RTC__

// How many of the leading layers fit, and the bytes of shared memory that they need.
struct StemPlan {
  int layers;
  int bytes;
};

inline i64 stem_cover(i64 n, i64 part) {
  return (n + part - 1) / part;
}

inline i64 stem_most(i64 a, i64 b) {
  return a > b ? a : b;
}

// As many parts of a sum as one image leaves warps without work. Only the layer counts: the bits of an image depend neither on
// the images beside it nor on the cluster.
inline int stem_part_shift(const StemLayer& layer) {
  const int tiles = (layer.upsample ? 4 : 1) * (layer.side > 4 ? layer.side * layer.side / 32 : 1);
  int shift = 0;
  while (tiles << (shift + 1) <= kStemWarps) ++shift;
  return shift;
}

// Sets of blocks of a cluster of 1 << `cluster_shift`: the cheapest in cycles, as student_stem.cu assumes them. A quarter of a
// multiprocessor takes 16 for a unit (a step of one tap) of 16 pixels of a column, `products` times; the L2 cache gives a
// column's 512 bytes of weights in 11; other blocks send a block's pixels, 16 bytes in one. Eighths are counted.
inline int stem_line_shift(const StemLayer& layer, int element, int products, int cluster_shift, int images) {
  const i64 phases = layer.upsample ? 4 : 1, columns = layer.c_out / 16, parts = 1 << layer.part_shift;
  const i64 units = (layer.upsample ? 4 : 9) * layer.c_in * element / 32;
  const i64 all = static_cast<i64>(images) * layer.side * layer.side;
  const i64 lines = phases * stem_cover(all / 16, layer.rows);
  int best = 0;
  i64 least = -1;
  for (int shift = 0; shift <= cluster_shift; ++shift) {
    const i64 column = stem_cover(columns, 1 << (cluster_shift - shift)), line = stem_cover(lines, 1 << shift);
    const i64 multiply = stem_cover(line * column * parts, 4) * (kStemWarps / parts) * 16 * layer.rows * products;
    const i64 read = 8 * 11 * column * stem_cover(phases, 1 << shift);
    const i64 near = line * layer.rows * 16 + 2 * layer.side + 2;
    const i64 receive = layer.upsample || shift == 0 || near > all ? all : near;
    const i64 cost = stem_most(multiply, read) * units + receive * layer.c_in * element / 2;
    if (least < 0 || cost < least) {
      least = cost;
      best = shift;
    }
  }
  return best;
}

inline void stem_split(StemLayer& layer, int element, int products, int cluster_shift, int images) {
  layer.shift = 0;
  while (1 << layer.shift < layer.side) ++layer.shift;
  layer.part_shift = stem_part_shift(layer);
  layer.rows = images * layer.side * layer.side > 16 ? 2 : 1;
  layer.line_shift = stem_line_shift(layer, element, products, cluster_shift, images);
}

// `element`: bytes of a stored number; `products`: tensor-core instructions per product; `limit`: bytes of shared memory; a
// cluster has 1 << `cluster_shift` blocks.
inline StemPlan stem_plan(StemParameters& p, int element, int products, int cluster_shift, int limit) {
  StemPlan plan = {0, 0};
  i64 biases = 0, sums = 0, buffers[2] = {0, 0};
  for (int i = 0; i < p.count; ++i) {
    StemLayer& layer = p.layers[i];
    stem_split(layer, element, products, cluster_shift, p.images);
    layer.bias_place = static_cast<int>(biases / 4);
    const i64 pixels = static_cast<i64>(p.images) * layer.side * layer.side, pixel = layer.c_in * element;
    biases += 4 * layer.c_out;
    sums = stem_most(sums, kStemWarps * 16 * layer.rows * kStemPitch * 4);
    buffers[i % 2] = stem_most(buffers[i % 2], pixels * (pixel + 16));
    const i64 bytes = kStemZeros + biases + sums + buffers[0] + buffers[1];
    if (bytes > limit) break;
    p.bias = kStemZeros;
    p.sums = static_cast<int>(kStemZeros + biases);
    p.buffers[0] = p.sums + static_cast<int>(sums);
    p.buffers[1] = p.buffers[0] + static_cast<int>(buffers[0]);
    plan = {i + 1, static_cast<int>(bytes)};
  }
  return plan;
}

#endif

}  // namespace advkd
