// The student's first layers, 4x4 to 32x32 pixels, in one launch. A cluster of 1, 2, 4 or 8 blocks computes `images` images,
// whose activations every block has in its own shared memory: a buffer for the even layers' inputs and one for the odd layers'.
// A layer's sums are tiles of 16 or 32 pixels of one phase (an up-sampling layer has four) x 16 or 32 output channels. A block
// has its share of the lines of tiles and of the columns of channels; a tile is one warp's, or 2, 4 or 8 warps share its sum.
// Weights go from the L2 cache straight to registers, four units (a step of 32 bytes of input channels of one tap) ahead, the
// first before the layer's input is there. Sums meet in shared memory, are added in the order of their parts, and what comes
// out is written in vectors of 16 bytes to the blocks that read it. One barrier of the cluster before each layer, in every
// block: whoever has passed the last one knows that nobody writes to another block any more. Pixels in shared memory are their
// channels and 16 bytes apart; taps outside an image read zeros that stand for it.
//
// The cost of a layer in cycles of a multiprocessor: products at 1024 multiply-adds (mma.sync in 16 bits; each of its quarters
// has whole tiles) or weights from the L2 cache at 48 bytes, whichever takes longer, then the input from other blocks at 16
// bytes, and 900 for a barrier, the sums' way through shared memory and what latency is left. These rates are assumed, at 1.7
// GHz. Predicted for pyramid-256 at batch 1 in bfloat16 on one cluster of 8 of an H200, not measured:
//   layers up to      products  weights  received  other  microseconds
//   8x8, six              7.6k    12.0k      3.3k   5.4k    12 (one block: 38, four: 17)
//   16x16, ten           28.6k    28.7k      8.9k   9.0k    30 (one block: 126, four: 45)
//   to 32x32, eleven     36.8k    30.0k     13.0k   9.9k    38; the layers on 32x32 pixels do not fit
// NVRTC compiles this file as it is.

#include "cuda/student_stem.h"

#include "cuda/kernel.h"
#include "cuda/products.cuh"

#include "cuda/cluster.cuh"

// The network is a function that a product's entry points call, whatever their clusters: the same code inlined in each takes
// three times as long to compile. Arguments that they take by value have an address then.
#ifdef __CUDACC__
#define ADVKD_CALLED static __device__ __noinline__
#define ADVKD_IN_PLACE const __grid_constant__
#else
#define ADVKD_CALLED static
#define ADVKD_IN_PLACE const
#endif

namespace advkd {

// This block's number in its cluster of 1 << `cluster_shift`, and the cluster's images.
struct StemBlock {
  int block, cluster_shift, images;
  i64 first_image;
};

// A layer as a block computes it: lines of tiles, phase by phase, times pairs of columns.
struct StemShare {
  int groups;       // of 16 input pixels, all images together
  int phase_lines;  // lines of one phase
  int line, lines, column, columns;
  int tiles;
};

struct StemTile {
  int phase, group, column, columns;  // no columns: no tile
};

// The input as a block has it, in bytes from the front of shared memory.
struct StemInput {
  int pixels, pitch, count, shift;
};

// The first of `n` things that belong to a part, of 1 << `shift`.
ADVKD_INLINE int stem_part(int n, int part, int shift) { return n * part >> shift; }

template <int kRows>
ADVKD_INLINE StemShare stem_share(const StemLayer& layer, const StemBlock& block) {
  StemShare share;
  share.groups = (block.images << 2 * layer.shift) / 16;
  share.phase_lines = (share.groups + kRows - 1) / kRows;
  const int lines = share.phase_lines * (layer.upsample ? 4 : 1), columns = layer.c_out / 16;
  const int line_part = block.block & ((1 << layer.line_shift) - 1), column_part = block.block >> layer.line_shift;
  const int column_shift = block.cluster_shift - layer.line_shift;
  share.line = stem_part(lines, line_part, layer.line_shift);
  share.lines = stem_part(lines, line_part + 1, layer.line_shift) - share.line;
  share.column = stem_part(columns, column_part, column_shift);
  share.columns = stem_part(columns, column_part + 1, column_shift) - share.column;
  share.tiles = share.lines * ((share.columns + 1) / 2);
  return share;
}

// Neighbouring tiles have their columns in common, and read the same weights.
template <int kRows>
ADVKD_INLINE StemTile stem_tile(const StemShare& share, int number) {
  if (number >= share.tiles) return {0, 0, 0, 0};
  const int pair = number / share.lines, line = share.line + number - pair * share.lines, phase = line / share.phase_lines;
  return {phase, (line - phase * share.phase_lines) * kRows, share.column + 2 * pair, min(2, share.columns - 2 * pair)};
}

// A part of a tile's units, which run over the steps of the first tap, then over those of the next.
struct StemUnits {
  int begin, end, steps, taps;
  int tap, step;  // of the first
};

ADVKD_INLINE StemUnits stem_units(const StemLayer& layer, int element, int part) {
  const int taps = layer.upsample ? 4 : 9, steps = layer.c_in * element / 32, units = taps * steps;
  const int begin = stem_part(units, part, layer.part_shift), end = stem_part(units, part + 1, layer.part_shift);
  const int tap = begin / steps;
  return {begin, end, steps, taps, tap, begin - tap * steps};
}

// Fragments on their way to a warp's registers: those of `kAhead` units and of two columns.
template <int kAhead>
struct StemWeights {
  uint4 ring[kAhead][2];
  const uint4* next;
  int left, step, steps, step_stride, tap_stride;
  bool pair;

  // A unit's fragments, once they are asked for in order of the units.
  ADVKD_MEMBER void load(uint4 (&to)[2]) {
    if (left <= 0) return;
    to[0] = __ldg(next);
    if (pair) to[1] = __ldg(next + 32);
    --left;
    next += step_stride;
    if (++step < steps) return;
    step = 0;
    next += tap_stride;
  }

  ADVKD_MEMBER void start(const StemLayer& layer, const StemTile& tile, const StemUnits& units) {
    const int columns = layer.c_out / 16, unit_stride = columns * 32;
    steps = units.steps;
    step = units.step;
    left = tile.columns ? units.end - units.begin : 0;
    pair = tile.columns == 2;
    step_stride = units.taps * unit_stride;
    tap_stride = unit_stride - steps * step_stride;
    const int unit = (tile.phase * steps + step) * units.taps + units.tap;
    next = static_cast<const uint4*>(layer.weights) + (unit * columns + tile.column) * 32 + threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < kAhead; ++i) load(ring[i]);
  }
};

// Where a lane's pixels lie, walking over a part's units.
template <int kRows>
struct StemTaps {
  int pixels[kRows];  // in bytes of shared memory, under the middle tap
  unsigned inside[kRows];  // a bit per tap
  int at, step, steps, column, width, tap_stride, row_stride;
  unsigned tap;  // its bit

  ADVKD_MEMBER void start(const StemInput& in, const StemTile& tile, const StemUnits& units) {
    const int lane = threadIdx.x % 32, side = 1 << in.shift;
    width = units.taps == 9 ? 3 : 2;
    // The first tap's place in the square of nine.
    const int top = width == 3 ? 0 : tile.phase / 2, left = width == 3 ? 0 : tile.phase % 2, row = units.tap / width;
    steps = units.steps;
    step = units.step;
    column = units.tap - row * width;
    tap = 1u << units.tap;
    at = ((top + row - 1) * side + left + column - 1) * in.pitch + step * 32;
    tap_stride = in.pitch - steps * 32;
    row_stride = (side - width) * in.pitch;
    #pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int pixel = (tile.group + i) * 16 + lane % 16, y = pixel >> in.shift & (side - 1), x = pixel & (side - 1);
      const unsigned down = ((y > 0) | 2 | (y + 1 < side) << 2) >> top, across = ((x > 0) | 2 | (x + 1 < side) << 2) >> left;
      const unsigned taps = width == 3 ? across & 7u : across & 3u;
      inside[i] = (down & 1u ? taps : 0u) | (down & 2u ? taps << width : 0u) | (width == 3 && down & 4u ? taps << 6 : 0u);
      if (pixel >= in.count) inside[i] = 0;
      pixels[i] = in.pixels + pixel * in.pitch + lane / 16 * 16;
    }
  }

  // Addresses of the unit's first 16 or last 16 bytes, by lane.
  ADVKD_MEMBER void point(const unsigned char* (&rows)[kRows]) const {
    #pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int zeros = threadIdx.x % 32 / 16 * 16;
      rows[i] = shared_memory() + (inside[i] & tap ? pixels[i] + at : zeros);
    }
  }

  ADVKD_MEMBER void next() {
    at += 32;
    if (++step < steps) return;
    step = 0;
    tap <<= 1;
    at += tap_stride;
    if (++column < width) return;
    column = 0;
    at += row_stride;
  }
};

// A warp's part of a tile's sums, left in shared memory.
template <typename Product, int kRows, int kColumns, int kAhead>
ADVKD_INLINE void stem_multiply(StemWeights<kAhead>& weights, StemTaps<kRows>& taps, const StemUnits& units, float* to) {
  WarpSums<Product, kRows, kColumns> warp;
  warp.clear();
  for (int unit = units.begin; unit < units.end; unit += kAhead) {
    #pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (unit + i < units.end) {
        const unsigned char* rows[kRows];
        taps.point(rows);
        uint4 fragments[kColumns];
        #pragma unroll
        for (int column = 0; column < kColumns; ++column) fragments[column] = weights.ring[i][column];
        warp.step(rows, 0, fragments);
        weights.load(weights.ring[i]);
        taps.next();
      }
    }
  }
  const int lane = threadIdx.x % 32;
  using Pair = Vector<float, 2>;
  #pragma unroll
  for (int row = 0; row < kRows; ++row)
    #pragma unroll
    for (int column = 0; column < kColumns; ++column)
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&sums)[4] = warp.sums[row][column][half];
        float* at = to + (row * 16 + lane / 4) * kStemPitch + column * 16 + half * 8 + lane % 4 * 2;
        *reinterpret_cast<Pair*>(at) = {{sums[0], sums[1]}};
        *reinterpret_cast<Pair*>(at + 8 * kStemPitch) = {{sums[2], sums[3]}};
      }
}

// Neighbouring channels' sums: their parts added up in order, `stride` apart.
template <int kParts, int kVector>
ADVKD_INLINE void stem_add(const float* from, int stride, float (&sums)[kVector]) {
  static_assert(kVector % 4 == 0, "sums are added in fours");
  using Quad = Vector<float, 4>;
  #pragma unroll
  for (int part = 0; part < kParts; ++part)
    #pragma unroll
    for (int quad = 0; quad < kVector; quad += 4) {
      const Quad more = *reinterpret_cast<const Quad*>(from + part * stride + quad);
      #pragma unroll
      for (int i = 0; i < 4; ++i) sums[quad + i] = part == 0 ? more.bits[i] : __fadd_rn(sums[quad + i], more.bits[i]);
    }
}

// 16 bytes of a pixel's output channels: sums, bias and LeakyReLU.
template <typename T>
ADVKD_INLINE uint4 stem_activate(const float* from, int parts, int stride, const float* bias, float slope) {
  constexpr int kVector = 16 / sizeof(typename T::Bits);
  float sums[kVector];
  // Written out, so that all loads are on their way at once.
  if (parts == 8) {
    stem_add<8>(from, stride, sums);
  } else if (parts == 4) {
    stem_add<4>(from, stride, sums);
  } else if (parts == 2) {
    stem_add<2>(from, stride, sums);
  } else {
    stem_add<1>(from, stride, sums);
  }
  union {
    Group<T, kVector> group;
    uint4 bits;
  } out;
  #pragma unroll
  for (int i = 0; i < kVector; ++i) out.group.bits[i] = T::encode(activate(sums[i], bias[i], kLeakyRelu, slope));
  return out.bits;
}

// A pixel's place among the output's, all images together.
ADVKD_INLINE int stem_place(const StemLayer& layer, int phase, int pixel) {
  if (!layer.upsample) return pixel;
  const int y = pixel >> layer.shift, x = pixel & ((1 << layer.shift) - 1);
  return ((2 * y + phase / 2) << (layer.shift + 1)) + 2 * x + phase % 2;
}

// Where a layer's output goes: to the input of the next layer in those blocks of the cluster that read it there, or, the last
// layer's, to device memory. A block reads its lines of 32 pixels (16 are one line, too) and `reach` around them.
struct StemOutput {
  unsigned char *shared, *device;
  int pitch, cluster_shift;
  int line_shift, lines, reach;
};

ADVKD_INLINE StemOutput stem_output(
    const StemParameters& p, const StemLayer& layer, int number, int element, const StemBlock& block) {
  StemOutput out = {};
  out.cluster_shift = block.cluster_shift;
  if (number + 1 == p.count) {
    const i64 pixels = block.first_image << 2 * (layer.shift + layer.upsample);
    out.pitch = p.out_pitch * element;
    out.device = static_cast<unsigned char*>(p.out) + pixels * out.pitch;
    return out;
  }
  const StemLayer& next = p.layers[number + 1];
  out.shared = shared_memory() + p.buffers[(number + 1) % 2];
  out.pitch = layer.c_out * element + 16;
  // The four phases of an up-sampling layer read all pixels between them.
  out.line_shift = next.upsample ? 0 : next.line_shift;
  out.lines = ((block.images << 2 * next.shift) + 31) / 32;
  out.reach = next.side + 1;
  return out;
}

// The part of 1 << `shift` to which one of `n` things belongs: the inverse of stem_part.
ADVKD_INLINE int stem_owner(int n, int thing, int shift) { return (((thing + 1) << shift) - 1) / n; }

ADVKD_INLINE void stem_store(const StemOutput& out, int pixel, int byte, const uint4& bits) {
  if (out.device) {
    __stwb(reinterpret_cast<uint4*>(out.device + static_cast<i64>(pixel) * out.pitch + byte), bits);
    return;
  }
  unsigned char* place = out.shared + pixel * out.pitch + byte;
  if (out.cluster_shift == 0) {
    *reinterpret_cast<uint4*>(place) = bits;
    return;
  }
  const int low = max(pixel - out.reach, 0) / 32, high = min((pixel + out.reach) / 32, out.lines - 1);
  const int first = stem_owner(out.lines, low, out.line_shift), last = stem_owner(out.lines, high, out.line_shift);
  for (int column = 0; column < 1 << (out.cluster_shift - out.line_shift); ++column)
    for (int line = first; line <= last; ++line) cluster_store(place, column << out.line_shift | line, bits);
}

// From the sums of a round of tiles, the first of them `first`, to the output.
template <typename Product, int kRows>
ADVKD_INLINE void stem_finish(
    const StemLayer& layer, const StemShare& share, int first, const float* sums, const float* biases, float slope,
    const StemOutput& out) {
  using T = typename Product::Storage;
  constexpr int kElement = sizeof(typename T::Bits), kVector = 16 / kElement, kVectors = 32 / kVector;
  constexpr int kItems = kRows * 16 * kVectors, kStride = kRows * 16 * kStemPitch;  // of a tile
  static_assert(32 % kVector == 0, "a tile's 32 channels are whole vectors");
  const int tiles = min(kStemWarps >> layer.part_shift, share.tiles - first), parts = 1 << layer.part_shift;
  #pragma unroll 1
  for (int item = threadIdx.x; item < tiles * kItems; item += kThreads) {
    const int slot = item / kItems, row = item % kItems / kVectors, channel = item % kVectors * kVector;
    const StemTile tile = stem_tile<kRows>(share, first + slot);
    const int pixel = tile.group * 16 + row, to = tile.column * 16 + channel;
    if (channel >= tile.columns * 16 || pixel >= share.groups * 16) continue;
    const float* from = sums + slot * parts * kStride + row * kStemPitch + channel;
    const uint4 bits = stem_activate<T>(from, parts, kStride, biases + to, slope);
    stem_store(out, stem_place(layer, tile.phase, pixel), to * kElement, bits);
  }
}

// Every thread arrives once a layer, when it has written that layer's output, and waits once.
ADVKD_INLINE void stem_arrive(int cluster_shift) {
  if (cluster_shift > 0) cluster_arrive();
}

ADVKD_INLINE void stem_wait(int cluster_shift) {
  if (cluster_shift > 0) {
    cluster_wait();
  } else {
    __syncthreads();
  }
}

template <typename Product, int kRows>
ADVKD_INLINE void stem_layer(const StemParameters& p, int number, const StemBlock& block) {
  constexpr int kElement = sizeof(typename Product::Storage::Bits), kAhead = 4;
  const StemLayer layer = p.layers[number];
  const StemShare share = stem_share<kRows>(layer, block);
  const int warp = threadIdx.x / 32, slots = kStemWarps >> layer.part_shift;
  const StemUnits units = stem_units(layer, kElement, warp & ((1 << layer.part_shift) - 1));
  unsigned char* shared = shared_memory();
  const StemInput in = {p.buffers[number % 2], layer.c_in * kElement + 16, share.groups * 16, layer.shift};
  const StemOutput out = stem_output(p, layer, number, kElement, block);
  auto* sums = reinterpret_cast<float*>(shared + p.sums);
  const auto* biases = reinterpret_cast<const float*>(shared + p.bias) + layer.bias_place;
  const float slope = p.slope;
  int first = 0;
  do {
    const StemTile tile = stem_tile<kRows>(share, first + (warp >> layer.part_shift));
    StemWeights<kAhead> weights;
    weights.start(layer, tile, units);
    StemTaps<kRows> taps;
    taps.start(in, tile, units);
    // The input is there; what the threads read of the last sums is read.
    if (first == 0) {
      stem_wait(block.cluster_shift);
    } else {
      __syncthreads();
    }
    float* own = sums + warp * kRows * 16 * kStemPitch;
    if (tile.columns == 2) stem_multiply<Product, kRows, 2>(weights, taps, units, own);
    if (tile.columns == 1) stem_multiply<Product, kRows, 1>(weights, taps, units, own);
    __syncthreads();
    stem_finish<Product, kRows>(layer, share, first, sums, biases, slope, out);
    first += slots;
  } while (first < share.tiles);
  if (out.device == nullptr) stem_arrive(block.cluster_shift);
}

// Zeros, biases and the first layer's input to shared memory, all on their way at once.
ADVKD_INLINE void stem_begin(const StemParameters& p, int element, const StemBlock& block) {
  unsigned char *shared = shared_memory(), *to = shared + p.buffers[0], *biases = shared + p.bias;
  const int vectors = p.layers[0].c_in * element / 16, items = block.images * 16 * vectors, count = p.count;
  const auto* x = static_cast<const unsigned char*>(p.x) + block.first_image * 256 * vectors;
  #pragma unroll 1
  for (int item = threadIdx.x; item < items; item += kThreads)
    copy_async(to + (item + item / vectors) * 16, x + static_cast<i64>(item) * 16, true);
  #pragma unroll 1
  for (int number = threadIdx.x / 32; number < count; number += kStemWarps) {
    const StemLayer& layer = p.layers[number];
    const float* from = layer.bias;
    unsigned char* own = biases + layer.bias_place * 4;
    #pragma unroll 1
    for (int i = threadIdx.x % 32 * 4, end = layer.c_out; i < end; i += 128) copy_async(own + i * 4, from + i, true);
  }
  copy_commit();
  #pragma unroll 1
  for (int i = threadIdx.x, end = p.bias / 16; i < end; i += kThreads) {
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  }
  copy_wait<0>();
}

template <typename Product>
ADVKD_CALLED void student_stem(const StemParameters& p, int cluster_shift) {
  const i64 first_image = static_cast<i64>(blockIdx.x >> cluster_shift) * p.images, left = p.samples - first_image;
  const int images = left < p.images ? static_cast<int>(left) : p.images;
  const StemBlock block = {static_cast<int>(blockIdx.x & ((1u << cluster_shift) - 1)), cluster_shift, images, first_image};
  stem_begin(p, sizeof(typename Product::Storage::Bits), block);
  stem_arrive(cluster_shift);
  for (int number = 0; number < p.count; ++number) {
    if (p.layers[number].rows == 1) {
      stem_layer<Product, 1>(p, number, block);
    } else {
      stem_layer<Product, 2>(p, number, block);
    }
  }
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_PRODUCTS
#endif
// Before sm_90 only clusters of one block have code; the host side refuses the others.
#define ADVKD_STUDENT_STEM(PRODUCT, BLOCKS, SHIFT, DIMENSIONS)                                  \
  extern "C" __global__ void DIMENSIONS __launch_bounds__(kThreads)                             \
      advkd_student_stem_cluster##BLOCKS##_##PRODUCT(ADVKD_IN_PLACE StemParameters p) {         \
    if constexpr (BLOCKS == 1 || ADVKD_HAS_CLUSTERS) student_stem<product_##PRODUCT>(p, SHIFT); \
  }                                                                                             \
  ADVKD_KERNEL(advkd_student_stem_cluster##BLOCKS##_##PRODUCT)
#define ADVKD_STUDENT_STEMS(PRODUCT)                                                                    \
  ADVKD_STUDENT_STEM(PRODUCT, 1, 0, ) ADVKD_STUDENT_STEM(PRODUCT, 2, 1, ADVKD_CLUSTER(2))               \
  ADVKD_STUDENT_STEM(PRODUCT, 4, 2, ADVKD_CLUSTER(4)) ADVKD_STUDENT_STEM(PRODUCT, 8, 3, ADVKD_CLUSTER(8))
ADVKD_VARIANTS(ADVKD_STUDENT_STEMS)

}  // namespace advkd
