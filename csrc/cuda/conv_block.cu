// The student's convolutions on tensor cores. A block of eight warps keeps one phase (of four to up-sample) and one set of
// output channels and walks over tiles of pixels. A tile comes to shared memory with its halo, some input channels at a time,
// by asynchronous copies one to three chunks ahead; all taps read a chunk, each at an offset of its own, so that an input byte
// is fetched once per tile. A warp sums 16 to 64 pixels by 16 to 64 channels, or a part of K where tiles are few; weights stay in
// shared memory where they fit. A warp's results go through shared memory into whole vectors of channels.
// The image has too few channels for that: its nine taps' results, side by side, are one product of every input pixel, kept in
// shared memory as planes in which each output pixel adds up nine neighbours.
// No Torch and no standard library here: NVRTC compiles this file as it is.

#include "cuda/conv_block.h"

#include "cuda/kernel.h"
#include "cuda/products.cuh"

namespace advkd {

// A block's place: its phase, 2 down + across, its first 16 output channels, and the first of its tiles.
struct ConvRole {
  int phase, column, walker;
};

ADVKD_INLINE ConvRole conv_role(const ConvBlockParameters& p, int block_columns) {
  const int sets = p.channel_blocks * p.phases, block = blockIdx.x, walker = block / sets, set = block - walker * sets;
  return {set % p.phases, set / p.phases * block_columns, walker};
}

// A tile's first image and pixel.
struct ConvPlace {
  int image, row, column;
};

ADVKD_INLINE ConvPlace conv_place(const ConvBlockParameters& p, int tile) {
  const int line = tile / p.tile_columns, group = line / p.tile_rows;
  const int row = line - group * p.tile_rows, column = tile - line * p.tile_columns;
  return {group * p.tile_images, row << p.log_height, column << p.log_width};
}

// Bytes from a pixel of a chunk to the next: an odd number of vectors, so that eight neighbours lie in different banks.
ADVKD_INLINE int pixel_pitch(const ConvBlockParameters& p) { return 32 * p.chunk + 16; }

// Starts copying one chunk of a tile with its halo. A warp takes whole rows, a lane one vector of 16 bytes of every `turn`-th
// pixel; where a pixel has six vectors, two lanes have none.
ADVKD_INLINE void copy_pixels(const ConvBlockParameters& p, const ConvRole& role, int tile, int chunk, unsigned char* to) {
  const ConvPlace place = conv_place(p, tile);
  const int lane = threadIdx.x % 32, vectors = 2 * p.chunk, pitch = pixel_pitch(p), bytes = 32 * p.steps;
  const int turn = 32 / vectors, first = lane / vectors, vector = (lane - first * vectors) * 16;
  const int begin = first < turn ? first : p.halo_width;
  #pragma unroll 1
  for (int line = threadIdx.x / 32; line < p.tile_images * p.halo_height; line += kConvWarps) {
    const int number = line / p.halo_height, image = place.image + number;
    const int row = place.row + role.phase / 2 - 1 + line - number * p.halo_height;
    const bool some = image < p.images && static_cast<u32>(row) < static_cast<u32>(p.height);
    const unsigned char* from = static_cast<const unsigned char*>(p.x) + 32 * p.chunk * chunk;
    if (some) from += (static_cast<i64>(image) * p.height + row) * p.width * bytes;
    #pragma unroll 1
    for (int x = begin; x < p.halo_width; x += turn) {
      const int column = place.column + role.phase % 2 - 1 + x;
      const bool inside = some && static_cast<u32>(column) < static_cast<u32>(p.width);
      unsigned char* const target = to + (line * p.halo_width + x) * pitch + vector;
      copy_async(target, from + (inside ? static_cast<i64>(column) * bytes + vector : 0), inside);
    }
  }
}

// Starts copying the weights of so many steps, all taps: zeros for channels beyond the layer's.
ADVKD_INLINE void copy_weights(
    const ConvBlockParameters& p, const ConvRole& role, int block_columns, int first_step, int steps, unsigned char* to) {
  const int taps = p.side * p.side, lane = threadIdx.x % 32;
  const auto* from = static_cast<const uint4*>(p.weights) + lane;
  #pragma unroll 1
  for (int run = threadIdx.x / 32; run < steps * taps * block_columns; run += kConvWarps) {
    const int tap = run / block_columns, column = role.column + run - tap * block_columns;
    const i64 line = (static_cast<i64>(role.phase) * p.steps + first_step) * taps + tap;
    const bool inside = column < p.columns;
    copy_async(to + run * 512 + lane * 16, from + (inside ? (line * p.columns + column) * 32 : 0), inside);
  }
}

// The chunks that a block brings, in the order in which it needs them.
struct ConvFetch {
  int tile, chunk;
};

ADVKD_INLINE void fetch_chunk(
    const ConvBlockParameters& p, const ConvRole& role, int block_columns, ConvFetch& next, unsigned char* to) {
  if (next.tile < p.tiles) {
    copy_pixels(p, role, next.tile, next.chunk, to);
    const int pixels = p.tile_images * p.halo_height * p.halo_width * pixel_pitch(p);
    if (!p.resident) copy_weights(p, role, block_columns, next.chunk * p.chunk, p.chunk, to + pixels);
  }
  copy_commit();
  if (++next.chunk == p.chunks) {
    next.chunk = 0;
    next.tile += p.walkers;
  }
}

// Waits for the oldest chunk, which then everybody may read; the one before nobody reads any more.
ADVKD_INLINE void wait_chunk(int stages) {
  if (stages == 2) {
    copy_wait<0>();
  } else if (stages == 3) {
    copy_wait<1>();
  } else {
    copy_wait<2>();
  }
  __syncthreads();
}

template <int kColumns>
ADVKD_INLINE void load_weights(uint4 (&to)[kColumns], const unsigned char* from) {
  #pragma unroll
  for (int column = 0; column < kColumns; ++column) to[column] = *reinterpret_cast<const uint4*>(from + column * 512);
}

// Adds a chunk. `rows`: this lane's addresses in it. `weights`: of the warp's first channels, this lane's; `next` bytes on
// those of the next tap. Warps with the smallest sums take every p.parts-th tap from `part` on, the others all.
template <int kSide, typename Product, int kRows, int kColumns>
ADVKD_INLINE void add(
    const ConvBlockParameters& p,
    WarpSums<Product, kRows, kColumns>& sums,
    const unsigned char* const (&rows)[kRows],
    const unsigned char* weights,
    int next,
    int) {
  // Two blocks of these sums just fit in the registers, and more warps wait for each other's loads.
  constexpr int kUnroll = kRows * kColumns == 8 ? 1 : kSide;
  const int pitch = pixel_pitch(p), line = p.halo_width * pitch;
  #pragma unroll 1
  for (int step = 0; step < p.chunk; ++step) {
    #pragma unroll 1
    for (int i = 0; i < kSide; ++i) {
      #pragma unroll kUnroll
      for (int j = 0; j < kSide; ++j) {
        uint4 words[kColumns];
        load_weights(words, weights);
        sums.step(rows, step * 32 + i * line + j * pitch, words);
        weights += next;
      }
    }
  }
}

template <int kSide, typename Product>
ADVKD_INLINE void add(
    const ConvBlockParameters& p,
    WarpSums<Product, 1, 1>& sums,
    const unsigned char* const (&rows)[1],
    const unsigned char* weights,
    int next,
    int part) {
  constexpr int kTaps = kSide * kSide;
  const int pitch = pixel_pitch(p), line = p.halo_width * pitch;
  #pragma unroll 4
  for (int turn = part; turn < p.chunk * kTaps; turn += p.parts) {
    const int step = turn / kTaps, tap = turn % kTaps;
    uint4 words[1];
    load_weights(words, weights + turn * next);
    sums.step(rows, step * 32 + tap / kSide * line + tap % kSide * pitch, words);
  }
}

// A warp's part of its block's tile.
struct ConvWarp {
  int pixel, channel, part;
};

ADVKD_INLINE ConvWarp conv_warp(const ConvBlockParameters& p) {
  const int warp = threadIdx.x / 32, rest = warp / p.pixel_warps, part = rest / p.channel_warps;
  return {warp - rest * p.pixel_warps, rest - part * p.channel_warps, part};
}

// Adds up the parts' sums, in order, for the first part's warp. `store`: the first warp's bytes of shared memory.
template <typename Product>
ADVKD_INLINE void join_parts(
    const ConvBlockParameters& p, const ConvWarp& warp, WarpSums<Product, 1, 1>& sums, unsigned char* store, int store_bytes) {
  const int warps = p.pixel_warps * p.channel_warps, own = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* to = reinterpret_cast<float*>(store + own * store_bytes) + lane;
  #pragma unroll
  for (int i = 0; i < 8; ++i) to[32 * i] = sums.sums[0][0][i / 4][i % 4];
  __syncthreads();
  if (warp.part != 0) return;
  for (int part = 1; part < p.parts; ++part) {
    const float* from = reinterpret_cast<const float*>(store + (part * warps + own) * store_bytes) + lane;
    #pragma unroll
    for (int i = 0; i < 8; ++i) sums.sums[0][0][i / 4][i % 4] += from[32 * i];
  }
}

// Two neighbouring channels, rounded to storage.
ADVKD_INLINE void store_two(bf16, unsigned char* to, float low, float high) {
  *reinterpret_cast<u32*>(to) = pack_bf16(low, high);
}
ADVKD_INLINE void store_two(f16, unsigned char* to, float low, float high) {
  *reinterpret_cast<u32*>(to) = pack_f16(low, high);
}
ADVKD_INLINE void store_two(f32, unsigned char* to, float low, float high) {
  *reinterpret_cast<uint2*>(to) = {__float_as_uint(low), __float_as_uint(high)};
}

// Bias, activation, one rounding; then 16 pixels at a time through this warp's shared memory to whole vectors. Launchers give
// the slope 1 for no activation; only the smallest sums know tanh.
template <typename Product, int kRows, int kColumns>
ADVKD_INLINE void store_sums(
    const ConvBlockParameters& p,
    const ConvRole& role,
    const ConvPlace& place,
    const ConvWarp& warp,
    const WarpSums<Product, kRows, kColumns>& sums,
    unsigned char* store) {
  using Storage = typename Product::Storage;
  constexpr int kElement = sizeof(typename Storage::Bits), kVectors = kColumns * kElement;
  constexpr int kPitch = conv_store_pitch(kColumns, kElement);
  const int lane = threadIdx.x % 32, column = role.column + warp.channel * kColumns;
  const int activation = kRows * kColumns == 1 ? p.activation : kLeakyRelu, scale = p.phases == 4 ? 2 : 1;
  float bias[kColumns][2][2];
  #pragma unroll
  for (int i = 0; i < kColumns * 4; ++i) {
    const int c = i / 4, channel = (column + c) * 16 + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
    bias[c][i / 2 % 2][i % 2] = column + c < p.columns ? __ldg(p.bias + channel) : 0.0f;
  }
  #pragma unroll
  for (int row = 0; row < kRows; ++row) {
    sync_warp();
    #pragma unroll
    for (int i = 0; i < kColumns * 4; ++i) {
      const int c = i / 4, half = i / 2 % 2, lower = i % 2;
      const float* sum = &sums.sums[row][c][half][lower * 2];
      const float low = activate(sum[0], bias[c][half][0], activation, p.slope);
      const float high = activate(sum[1], bias[c][half][1], activation, p.slope);
      const int channel = c * 16 + half * 8 + lane % 4 * 2;
      store_two(Storage(), store + (lower * 8 + lane / 4) * kPitch + channel * kElement, low, high);
    }
    sync_warp();
    #pragma unroll 1
    for (int i = lane; i < 16 * kVectors; i += 32) {
      const int pixel = (warp.pixel * kRows + row) * 16 + i / kVectors, vector = i % kVectors, line = pixel >> p.log_width;
      const int x = place.column + (pixel & ((1 << p.log_width) - 1)), y = place.row + (line & ((1 << p.log_height) - 1));
      const int image = place.image + (line >> p.log_height), first = column * kElement + vector;
      if (image >= p.images || y >= p.height || x >= p.width || first >= p.columns * kElement) continue;
      const i64 out_line = (static_cast<i64>(image) * p.height + y) * scale + role.phase / 2;
      const i64 out_pixel = (out_line * p.width + x) * scale + role.phase % 2;
      auto* to = static_cast<uint4*>(p.out) + out_pixel * (p.channels * kElement / 16) + first;
      *to = *reinterpret_cast<const uint4*>(store + i / kVectors * kPitch + vector * 16);
    }
  }
}

// Where the pixel of a tile lies in a chunk with its halo.
ADVKD_INLINE int halo_pixel(const ConvBlockParameters& p, int pixel) {
  const int line = pixel >> p.log_width, image = line >> p.log_height;
  const int x = pixel & ((1 << p.log_width) - 1), y = line & ((1 << p.log_height) - 1);
  return (image * p.halo_height + y) * p.halo_width + x;
}

template <typename Product, int kRows, int kColumns>
ADVKD_INLINE void conv_layer(const ConvBlockParameters& p) {
  constexpr int kStore = conv_store_bytes(kColumns, sizeof(typename Product::Storage::Bits));
  const int block_columns = kColumns * p.channel_warps, taps = p.side * p.side, lane = threadIdx.x % 32;
  const ConvRole role = conv_role(p, block_columns);
  const ConvWarp warp = conv_warp(p);
  // Results of every warp, weights that stay, chunks.
  unsigned char* const store = shared_memory();
  unsigned char* const stages = store + p.stages_place;
  unsigned char* const stay = store + kConvWarps * kStore;
  if (p.resident) copy_weights(p, role, block_columns, 0, p.steps, stay);
  ConvFetch next = {role.walker, 0};
  for (int stage = 0; stage < p.stages - 1; ++stage)
    fetch_chunk(p, role, block_columns, next, stages + stage * p.stage_bytes);

  int places[kRows], slot = 0;
  #pragma unroll
  for (int row = 0; row < kRows; ++row)
    places[row] = halo_pixel(p, (warp.pixel * kRows + row) * 16 + lane % 16) * pixel_pitch(p) + lane / 16 * 16;
  const int pixels = p.tile_images * p.halo_height * p.halo_width * pixel_pitch(p);
  const int own_weights = warp.channel * kColumns * 512 + lane * 16;
  for (int tile = role.walker; tile < p.tiles; tile += p.walkers) {
    WarpSums<Product, kRows, kColumns> sums;
    sums.clear();
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      wait_chunk(p.stages);
      fetch_chunk(p, role, block_columns, next, stages + (slot ? slot - 1 : p.stages - 1) * p.stage_bytes);
      const unsigned char* stage = stages + slot * p.stage_bytes;
      const unsigned char* rows[kRows];
      #pragma unroll
      for (int row = 0; row < kRows; ++row) rows[row] = stage + places[row];
      const unsigned char* weights = p.resident ? stay + chunk * p.chunk * taps * block_columns * 512 : stage + pixels;
      if (p.side == 3) {
        add<3>(p, sums, rows, weights + own_weights, block_columns * 512, warp.part);
      } else {
        add<2>(p, sums, rows, weights + own_weights, block_columns * 512, warp.part);
      }
      if (++slot == p.stages) slot = 0;
    }
    if constexpr (kRows * kColumns == 1) {
      if (p.parts > 1) join_parts<Product>(p, warp, sums, store, kStore);
      if (warp.part != 0) continue;
    }
    store_sums<Product, kRows, kColumns>(p, role, conv_place(p, tile), warp, sums, store + threadIdx.x / 32 * kStore);
  }
}

// The nine taps' results of every pixel of a tile and its halo, as planes; neighbouring lanes write to different banks.
template <typename Product, int kColumns>
ADVKD_INLINE void store_planes(
    const ConvBlockParameters& p, const WarpSums<Product, kImageRows, kColumns>& sums, float* planes) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  #pragma unroll
  for (int row = 0; row < kImageRows; ++row)
    #pragma unroll
    for (int i = 0; i < kColumns * 8; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int pixel = (warp + row * kConvWarps) * 16 + i / 2 % 2 * 8 + lane / 4;
      if (pixel < kImagePlane && column < 9 * p.channels)
        planes[column * kImagePlane + pixel] = sums.sums[row][i / 8][i / 4 % 2][i % 4];
    }
}

// One pixel of the image for every thread: nine neighbours' results, bias, activation.
template <typename Storage>
ADVKD_INLINE void store_image(const ConvBlockParameters& p, const ConvPlace& place, const float* planes) {
  const int down = threadIdx.x / 32, across = threadIdx.x % 32, y = place.row + down, x = place.column + across;
  if (y >= p.height || x >= p.width) return;
  for (int channel = 0; channel < p.channels; ++channel) {
    float sum = 0.0f;
    #pragma unroll
    for (int tap = 0; tap < 9; ++tap)
      sum += planes[(tap * p.channels + channel) * kImagePlane + (down + tap / 3) * p.halo_width + across + tap % 3];
    const i64 to = ((static_cast<i64>(place.image) * p.channels + channel) * p.height + y) * p.width + x;
    const float value = activate(sum, __ldg(p.bias + channel), p.activation, p.slope);
    static_cast<typename Storage::Bits*>(p.out)[to] = Storage::encode(value);
  }
}

template <typename Product, int kColumns>
ADVKD_INLINE void conv_image(const ConvBlockParameters& p) {
  const ConvRole role = {0, 0, static_cast<int>(blockIdx.x)};
  const int lane = threadIdx.x % 32, pixels = kImagePlane * pixel_pitch(p);
  float* const planes = reinterpret_cast<float*>(shared_memory());
  unsigned char* const stages = shared_memory() + p.stages_place;
  ConvFetch next = {role.walker, 0};
  for (int stage = 0; stage < p.stages - 1; ++stage)
    fetch_chunk(p, role, kColumns, next, stages + stage * p.stage_bytes);

  int places[kImageRows], slot = 0;
  #pragma unroll
  for (int row = 0; row < kImageRows; ++row) {
    // The last groups are not whole: their results are not stored.
    const int pixel = (threadIdx.x / 32 + row * kConvWarps) * 16 + lane % 16;
    places[row] = min(pixel, kImagePlane - 1) * pixel_pitch(p) + lane / 16 * 16;
  }
  for (int tile = role.walker; tile < p.tiles; tile += p.walkers) {
    WarpSums<Product, kImageRows, kColumns> sums;
    sums.clear();
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      wait_chunk(p.stages);
      fetch_chunk(p, role, kColumns, next, stages + (slot ? slot - 1 : p.stages - 1) * p.stage_bytes);
      const unsigned char* stage = stages + slot * p.stage_bytes;
      const unsigned char* rows[kImageRows];
      #pragma unroll
      for (int row = 0; row < kImageRows; ++row) rows[row] = stage + places[row];
      #pragma unroll 1
      for (int step = 0; step < p.chunk; ++step) {
        uint4 words[kColumns];
        load_weights(words, stage + pixels + step * kColumns * 512 + lane * 16);
        sums.step(rows, step * 32, words);
      }
      if (++slot == p.stages) slot = 0;
    }
    store_planes<Product, kColumns>(p, sums, planes);
    __syncthreads();
    store_image<typename Product::Storage>(p, conv_place(p, tile), planes);
  }
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_PRODUCTS
#endif
#define ADVKD_CONV_LAYER(P, ROWS, COLUMNS, BLOCKS)                             \
  extern "C" __global__ void __launch_bounds__(kConvThreads, BLOCKS)           \
      advkd_conv_layer_##ROWS##x##COLUMNS##_##P(const ConvBlockParameters p) { \
    conv_layer<product_##P, ROWS, COLUMNS>(p);                                 \
  }                                                                            \
  ADVKD_KERNEL(advkd_conv_layer_##ROWS##x##COLUMNS##_##P)
#define ADVKD_CONV_IMAGE(P, COLUMNS)                                  \
  extern "C" __global__ void __launch_bounds__(kConvThreads, 2)       \
      advkd_conv_image_##COLUMNS##_##P(const ConvBlockParameters p) { \
    conv_image<product_##P, COLUMNS>(p);                              \
  }                                                                   \
  ADVKD_KERNEL(advkd_conv_image_##COLUMNS##_##P)
// Shapes as in kConvShapes of the host's plan; products of three parts need more registers.
#define ADVKD_CONV_BLOCK(P)                                                                                    \
  ADVKD_CONV_LAYER(P, 4, 4, 1)                                                                                 \
  ADVKD_CONV_LAYER(P, 4, 3, 1)                                                                                 \
  ADVKD_CONV_LAYER(P, 4, 2, product_##P::kParts == 1 ? 2 : 1)                                                  \
  ADVKD_CONV_LAYER(P, 4, 1, 2)                                                                                \
  ADVKD_CONV_LAYER(P, 2, 2, 2)                                                                                 \
  ADVKD_CONV_LAYER(P, 1, 1, 2)                                                                                 \
  ADVKD_CONV_IMAGE(P, 1)                                                                                       \
  ADVKD_CONV_IMAGE(P, 2)                                                                                       \
  ADVKD_CONV_IMAGE(P, 3)
ADVKD_VARIANTS(ADVKD_CONV_BLOCK)

}  // namespace advkd
