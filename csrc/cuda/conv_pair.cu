// Two 3x3 convolutions of few channels in one kernel, the first with LeakyReLU and perhaps of the up-sampled input: what is
// between them stays in shared memory. A block of eight warps makes 16 x 16 outputs (8 x 16 or 8 x 8 where shared memory or
// blocks are short). It copies the inputs they depend on, 20 x 20 or, to be up-sampled, 10 x 10; makes the 18 x 18 pixels
// between, zero outside the image and rounded once to storage, as a kernel of its own would have left them; and of those the
// outputs, which leave through shared memory in whole vectors. Copies overlap with another block's arithmetic.
//
// Warps: the first convolution's 324 pixels are seven turns of 3 x 16 by all channels, 4 phases of 81 pixels eight. In 16 bits
// up to 32 channels, 18 x 16 of the pixels are taken as strips, rows below each other, of which a fragment serves three taps;
// the last turn has the two columns that remain. So are the outputs' 16 rows, 2 or 4 in a strip. More than 48 channels take
// two turns.
// Phases of up-sampling all read the same pixels of the tile with other weights: phase (a, b) makes the tile's rows of parity
// 1 - a and columns of parity 1 - b, as the tile begins one before an even row and column; tap (i, j) of its pixel (y, x) is
// the tile's input pixel (y + i, x + j), as it is without up-sampling.
// Weights are read as fragments, 512 bytes for each warp, from the first-level cache: all blocks of a multiprocessor read the
// same 36 KB (both convolutions of 32 channels in 16 bits; 81 KB of 48), which it keeps beside the tiles. From shared memory
// they would take as many cycles, and in addition a copy for each tile and the room of another block.
// The image's convolution is one product of the pixels between with 9 x c_out columns, and a sum over nine neighbours.
//
// It saves writing and reading what is between, 4 C bytes per pixel in 16 bits, half of all (for an image of 3 channels and
// after up-sampling about two thirds), and a launch; it computes (th + 2) (tw + 2) / (th tw) of the first convolution, 1.27,
// 1.41 or 1.56 times as much. Predicted, not measured, cycles of an H200's multiprocessor per 16 x 16 outputs, at 18.6 bytes
// and 2560 operations of mma.sync per cycle: of two kernels with C = 16, 32 and 48 memory takes 1760, 3520 and 5280 and tensor
// cores 920, 3690 and 8290; of this one 880, 1760 and 2640 and 1070, 4260 and 9590. Shared memory is busy for 1390 and 3670 of
// the first two. So it should win below about 24 channels there, and more where memory is slower beside the arithmetic.
// NVRTC compiles this file as it is.

#include "cuda/conv_pair.h"

#include "cuda/kernel.h"
#include "cuda/products.cuh"

namespace advkd {

ADVKD_INLINE int pair_quotient(int n, u32 divisor) { return static_cast<int>(static_cast<u32>(n) * divisor >> 20); }

// A block's tile: where its outputs begin, and the sides of the output.
struct PairPlace {
  i64 sample;
  int row, column, height, width;
};

ADVKD_INLINE PairPlace pair_place(const ConvPairParameters& p) {
  const int tiles = p.down * p.across, block = blockIdx.x, sample = block / tiles, tile = block - sample * tiles;
  const int down = tile / p.across, across = tile - down * p.across;
  return {sample, down * p.tile_height, across * p.tile_width, p.height << p.upsample, p.width << p.upsample};
}

ADVKD_INLINE bool pair_inside(int row, int column, int height, int width) {
  return static_cast<u32>(row) < static_cast<u32>(height) && static_cast<u32>(column) < static_cast<u32>(width);
}

// Brings the inputs of a tile to shared memory, zeros outside the image.
ADVKD_INLINE void pair_copy(
    const ConvPairParameters& p, const PairTile& tile, const PairPlace& place, int element, unsigned char* to) {
  const int first_row = p.upsample ? place.row / 2 - 1 : place.row - 2;
  const int first_column = p.upsample ? place.column / 2 - 1 : place.column - 2;
  const int chunks = p.c_in * element / 16, pitch = pair_pitch(p.c_in, element);
  for (int i = threadIdx.x; i < tile.input_height * tile.input_width * chunks; i += kPairThreads) {
    const int pixel = pair_quotient(i, p.by_input_chunks), chunk = i - pixel * chunks;
    const int down = pair_quotient(pixel, p.by_input_width), across = pixel - down * tile.input_width;
    const int row = first_row + down, column = first_column + across;
    const bool inside = pair_inside(row, column, p.height, p.width);
    const i64 from = inside ? ((place.sample * p.height + row) * p.width + column) * chunks + chunk : 0;
    copy_async(to + pixel * pitch + chunk * 16, static_cast<const uint4*>(p.x) + from, inside);
  }
  copy_commit();
  copy_wait<0>();
}

// The registers' limits at kColumns times 16 channels a warp: blocks that share a multiprocessor (three of 16 channels and
// two of more in 16 bits); whether weights are read a tap ahead of their use, loops over two taps unrolled, and rows taken
// as strips.
template <typename T, int kColumns>
struct PairLimits {
  static constexpr bool kNarrow = sizeof(typename T::Bits) == 2;
  static constexpr int kBlocks = kNarrow && kColumns == 1 ? 3 : kNarrow || kColumns < 3 ? 2 : 1;
  static constexpr bool kAhead = kNarrow ? kColumns == 1 : kColumns > 1;
  static constexpr bool kUnroll = kNarrow ? kColumns < 3 : kColumns == 1;
  static constexpr bool kStrips = kNarrow && kColumns < 3;
};

// The range of a warp's sums: `steps` of K, and taps whose pixels lie `down` and `across` bytes apart.
struct PairTaps {
  int steps, down, across;
};

// A warp's sums over kSide x kSide taps. `weights`: this lane's part of the first; from one tap to the next there are `stride`
// times 16 channels, of which the first kColumns are taken.
template <int kSide, typename Product, int kRows, int kColumns>
ADVKD_INLINE void pair_sums(
    WarpSums<Product, kRows, kColumns>& sums,
    const unsigned char* const (&rows)[kRows],
    const PairTaps& taps,
    const uint4* weights,
    int stride) {
  using Limits = PairLimits<typename Product::Storage, kColumns>;
  constexpr int kUnrolled = Limits::kUnroll && kSide == 2 ? 2 : 1;
  uint4 now[kColumns], next[kColumns];
  const auto load = [&] {
    #pragma unroll
    for (int c = 0; c < kColumns; ++c) next[c] = __ldg(weights + c * 32);
  };
  if (Limits::kAhead) load();
  sums.clear();
  #pragma unroll 1
  for (int step = 0; step < taps.steps; ++step)
    #pragma unroll 1
    for (int i = 0; i < kSide; ++i) {
      const bool last = i + 1 == kSide && step + 1 == taps.steps;
      #pragma unroll(kUnrolled)
      for (int j = 0; j < kSide; ++j) {
        if (!Limits::kAhead) load();
        #pragma unroll
        for (int c = 0; c < kColumns; ++c) now[c] = next[c];
        // There is nothing behind the last tap: it is read once more.
        if (j + 1 < kSide || !last) weights += stride * 32;
        if (Limits::kAhead) load();
        sums.step(rows, step * 32 + i * taps.down + j * taps.across, now);
      }
    }
}

// The same of nine taps for kRows rows of 16 neighbouring pixels, `row` the first of them: what a row of the tile holds is
// read once for each column of taps and counts in up to three rows.
template <typename Product, int kRows, int kColumns>
ADVKD_INLINE void pair_strip(
    WarpSums<Product, kRows, kColumns>& sums,
    const unsigned char* row,
    const PairTaps& taps,
    const uint4* weights,
    int stride) {
  sums.clear();
  #pragma unroll 1
  for (int step = 0; step < taps.steps; ++step)
    #pragma unroll 1
    for (int j = 0; j < 3; ++j) {
      uint4 tap[3][kColumns];
      #pragma unroll
      for (int i = 0; i < 3; ++i)
        #pragma unroll
        for (int c = 0; c < kColumns; ++c) tap[i][c] = __ldg(weights + ((step * 9 + i * 3 + j) * stride + c) * 32);
      #pragma unroll
      for (int down = 0; down < kRows + 2; ++down) {
        OperandA<Product::kParts> a;
        load_fragment(a.words[0], row + step * 32 + down * taps.down + j * taps.across);
        Product::prepare(a);
        #pragma unroll
        for (int i = 0; i < 3; ++i)
          #pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (down < i || down - i >= kRows) continue;
            Product::multiply(sums.sums[down - i][c][0], a, tap[i][c].x, tap[i][c].y);
            Product::multiply(sums.sums[down - i][c][1], a, tap[i][c].z, tap[i][c].w);
          }
      }
    }
}

// Two neighbouring channels rounded to storage.
ADVKD_INLINE Group<f32, 2> pair_round(f32, float low, float high) { return {low, high}; }
ADVKD_INLINE u32 pair_round(bf16, float low, float high) { return pack_bf16(low, high); }
ADVKD_INLINE u32 pair_round(f16, float low, float high) { return pack_f16(low, high); }

// The channels of a warp's turn: kColumns of `units` times 16, from `unit` on, those before `fresh` another turn's.
struct PairUnits {
  int unit, fresh;
};

template <int kColumns>
ADVKD_INLINE PairUnits pair_units(int pass, int units) {
  return {min(pass * kColumns, units - kColumns), pass * kColumns};
}

ADVKD_INLINE int pair_turns(int n, int part) { return (n + part - 1) / part; }

// A warp's sums with bias and activation, rounded to storage: this lane's pixels of the r-th 16 go `to[r]` bytes behind `base`,
// nowhere if that is negative; where they are not inside the image, zeros.
template <typename Product, int kRows, int kColumns>
ADVKD_INLINE void pair_keep(
    const WarpSums<Product, kRows, kColumns>& sums,
    unsigned char* base,
    const int (&to)[kRows][2],
    const bool (&inside)[kRows][2],
    const PairUnits& units,
    const float* biases,
    int activation,
    float slope) {
  using T = typename Product::Storage;
  #pragma unroll
  for (int c = 0; c < kColumns; ++c)
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = (units.unit + c) * 16 + half * 8 + threadIdx.x % 4 * 2;
      const float bias0 = __ldg(biases + channel), bias1 = __ldg(biases + channel + 1);
      #pragma unroll
      for (int r = 0; r < kRows; ++r)
        #pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const float* sum = sums.sums[r][c][half] + lower * 2;
          auto word = pair_round(T(), activate(sum[0], bias0, activation, slope), activate(sum[1], bias1, activation, slope));
          if (!inside[r][lower]) word = {};
          if (to[r][lower] >= 0 && units.unit + c >= units.fresh)
            *reinterpret_cast<decltype(word)*>(base + to[r][lower] + channel * sizeof(typename T::Bits)) = word;
        }
    }
}

// A pixel of a phase's grid, and whether it is one: surplus lanes get the last one once more.
struct PairPixel {
  int row, column;
  bool there;
};

// The i-th of a warp's r-th 16 pixels in its turn at `set`. With strips the grid's 18 columns are 16 and 2 more, of which the
// last set takes care.
template <bool kStrips>
ADVKD_INLINE PairPixel pair_pixel(const ConvPairParameters& p, const PairTile& tile, bool strips, int set, int r, int i) {
  constexpr int kSets = 18 / kPairRows1, kRest = 2 * 18;
  static_assert(18 % kPairRows1 == 0 && kRest <= kPairRows1 * 16, "the last set takes what the others leave");
  if (kStrips && strips) {
    if (set < kSets) return {set * kPairRows1 + r, i, true};
    const int rest = r * 16 + i, pixel = min(rest, kRest - 1);
    return {pixel / 2, 16 + pixel % 2, rest < kRest};
  }
  const int pixels = tile.grid_height * tile.grid_width, any = (set * kPairRows1 + r) * 16 + i, pixel = min(any, pixels - 1);
  const int row = pair_quotient(pixel, p.by_grid_width);
  return {row, pixel - row * tile.grid_width, any < pixels};
}

// Where a phase's grid pixel is among all of them.
ADVKD_INLINE PairPixel pair_interleaved(const PairPixel& grid, int phase) {
  return {2 * grid.row + 1 - phase / 2, 2 * grid.column + 1 - phase % 2, grid.there};
}

// The pixels between the convolutions.
template <typename Product, int kColumns, bool kUpsample>
ADVKD_INLINE void pair_first(
    const ConvPairParameters& p, const PairTile& tile, const PairPlace& place, const unsigned char* input, unsigned char* mid) {
  constexpr int kRows = kPairRows1, kElement = sizeof(typename Product::Storage::Bits), kSide = kUpsample ? 2 : 3;
  constexpr bool kStrips = !kUpsample && PairLimits<typename Product::Storage, kColumns>::kStrips;
  const bool strips = p.tile_height * p.tile_width == 256;
  const int lane = threadIdx.x % 32, pitch = pair_pitch(p.c_in, kElement), units = p.c_mid / 16;
  const int sets = pair_turns(tile.grid_height * tile.grid_width, 16 * kRows);
  const int groups = pair_turns(units, kColumns) * (kUpsample ? 4 : 1);
  const PairTaps taps = {p.c_in * kElement / 32, tile.input_width * pitch, pitch};
  for (int turn = threadIdx.x / 32; turn < sets * groups; turn += kPairThreads / 32) {
    const int group = pair_quotient(turn, p.by_sets), set = turn - group * sets, phase = kUpsample ? group % 4 : 0;
    const PairUnits channels = pair_units<kColumns>(kUpsample ? group / 4 : group, units);
    const unsigned char* rows[kRows];
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const PairPixel pixel = pair_pixel<kStrips>(p, tile, strips, set, r, lane % 16);
      rows[r] = input + (pixel.row * tile.input_width + pixel.column) * pitch + lane / 16 * 16;
    }
    WarpSums<Product, kRows, kColumns> sums;
    const int fragments = phase * taps.steps * kSide * kSide * units + channels.unit;
    const uint4* weights = static_cast<const uint4*>(p.weights1) + fragments * 32 + lane;
    if (kStrips && strips && set + 1 < sets) {
      pair_strip(sums, rows[0], taps, weights, units);
    } else {
      pair_sums<kSide>(sums, rows, taps, weights, units);
    }
    int to[kRows][2];
    bool inside[kRows][2];
    #pragma unroll
    for (int r = 0; r < kRows; ++r)
      #pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const PairPixel grid = pair_pixel<kStrips>(p, tile, strips, set, r, lower * 8 + lane / 4);
        const PairPixel pixel = kUpsample ? pair_interleaved(grid, phase) : grid;
        const int row = place.row - 1 + pixel.row, column = place.column - 1 + pixel.column;
        to[r][lower] = pixel.there ? (pixel.row * tile.mid_width + pixel.column) * pair_pitch(p.c_mid, kElement) : -1;
        // The second convolution's padding is zeros, not what the first would make there.
        inside[r][lower] = pair_inside(row, column, place.height, place.width);
      }
    pair_keep(sums, mid, to, inside, channels, p.bias1, kLeakyRelu, p.slope);
  }
}

// The outputs, to shared memory. With kStrips a warp's groups of 16 pixels are rows of the tile below each other.
template <typename Product, int kRows, int kColumns, bool kStrips>
ADVKD_INLINE void pair_second(
    const ConvPairParameters& p, const PairTile& tile, const unsigned char* mid, unsigned char* outputs) {
  constexpr int kElement = sizeof(typename Product::Storage::Bits);
  const int lane = threadIdx.x % 32, pitch = pair_pitch(p.c_mid, kElement), units = p.c_out / 16;
  const int sets = p.tile_height * p.tile_width / (16 * kRows);
  const PairTaps taps = {p.c_mid * kElement / 32, tile.mid_width * pitch, pitch};
  for (int turn = threadIdx.x / 32; turn < sets * pair_turns(units, kColumns); turn += kPairThreads / 32) {
    const int pass = turn / sets, first = (turn - pass * sets) * kRows * 16;
    const PairUnits channels = pair_units<kColumns>(pass, units);
    const unsigned char* rows[kRows];
    #pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int pixel = first + r * 16 + lane % 16, down = pixel / p.tile_width;
      rows[r] = mid + (down * tile.mid_width + pixel - down * p.tile_width) * pitch + lane / 16 * 16;
    }
    WarpSums<Product, kRows, kColumns> sums;
    const uint4* weights = static_cast<const uint4*>(p.weights2) + channels.unit * 32 + lane;
    if (kStrips) {
      pair_strip(sums, rows[0], taps, weights, units);
    } else {
      pair_sums<3>(sums, rows, taps, weights, units);
    }
    int to[kRows][2];
    bool inside[kRows][2];
    #pragma unroll
    for (int r = 0; r < kRows; ++r)
      #pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        to[r][lower] = (first + r * 16 + lower * 8 + lane / 4) * pair_pitch(p.c_out, kElement);
        inside[r][lower] = true;
      }
    if (p.activation == kTanh) {
      pair_keep(sums, outputs, to, inside, channels, p.bias2, kTanh, 0.0f);
    } else {
      // No activation is a slope of one.
      pair_keep(sums, outputs, to, inside, channels, p.bias2, kLeakyRelu, p.activation == kLeakyRelu ? p.slope : 1.0f);
    }
  }
}

// How a block's warps share the outputs: whole tiles in strips where that makes eight turns.
template <typename Product, int kColumns>
ADVKD_INLINE void pair_outputs(
    const ConvPairParameters& p, const PairTile& tile, const unsigned char* mid, unsigned char* outputs) {
  constexpr bool kStrips = PairLimits<typename Product::Storage, kColumns>::kStrips;
  const int units = p.tile_height * p.tile_width == 256 ? p.c_out / 16 : 0;
  if (kStrips && kColumns == 1 && units == 1) {
    pair_second<Product, 2, 1, kStrips>(p, tile, mid, outputs);
  } else if (kStrips && kColumns == 2 && units == 2) {
    pair_second<Product, 4, 1, kStrips>(p, tile, mid, outputs);
  } else if (kStrips && kColumns == 2 && units == 4) {
    pair_second<Product, 4, 2, kStrips>(p, tile, mid, outputs);
  } else if (p.c_out >= 16 * kColumns) {
    pair_second<Product, kPairRows2, kColumns, false>(p, tile, mid, outputs);
  } else {
    pair_second<Product, kPairRows2, 1, false>(p, tile, mid, outputs);
  }
}

// The outputs from shared to device memory: whole vectors, a pixel's one after another.
ADVKD_INLINE void pair_write(const ConvPairParameters& p, const PairPlace& place, int element, const unsigned char* from) {
  const int chunks = p.c_out * element / 16, pitch = pair_pitch(p.c_out, element), out_chunks = p.pitch * element / 16;
  for (int i = threadIdx.x; i < p.tile_height * p.tile_width * chunks; i += kPairThreads) {
    const int pixel = pair_quotient(i, p.by_out_chunks), chunk = i - pixel * chunks, down = pixel / p.tile_width;
    const int row = place.row + down, column = place.column + pixel - down * p.tile_width;
    if (row >= place.height || column >= place.width) continue;
    const i64 to = ((place.sample * place.height + row) * place.width + column) * out_chunks + chunk;
    static_cast<uint4*>(p.out)[to] = *reinterpret_cast<const uint4*>(from + pixel * pitch + chunk * 16);
  }
}

// Every pixel between times the nine taps' columns of the image.
template <typename Product, int kColumns>
ADVKD_INLINE void pair_products(const ConvPairParameters& p, const PairTile& tile, const unsigned char* mid, float* products) {
  constexpr int kRows = kPairRows1, kElement = sizeof(typename Product::Storage::Bits);
  const int lane = threadIdx.x % 32, pitch = pair_pitch(p.c_mid, kElement), columns = 9 * p.c_out;
  const int pixels = tile.mid_height * tile.mid_width, sets = pair_turns(pixels, 16 * kRows);
  const int units = pair_turns(columns, 16);
  for (int turn = threadIdx.x / 32; turn < sets * pair_turns(units, kColumns); turn += kPairThreads / 32) {
    const int pass = turn / sets, first = (turn - pass * sets) * kRows * 16;
    const PairUnits channels = pair_units<kColumns>(pass, units);
    const unsigned char* rows[kRows];
    #pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = mid + min(first + r * 16 + lane % 16, pixels - 1) * pitch + lane / 16 * 16;
    WarpSums<Product, kRows, kColumns> sums;
    const PairTaps taps = {p.c_mid * kElement / 32, 0, 0};
    pair_sums<1>(sums, rows, taps, static_cast<const uint4*>(p.weights2) + channels.unit * 32 + lane, units);
    #pragma unroll
    for (int r = 0; r < kRows; ++r)
      #pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int pixel = first + r * 16 + lower * 8 + lane / 4, last = pixel < pixels ? columns : 0;
        float* to = products + pixel * pair_image_pitch(p.c_out);
        #pragma unroll
        for (int c = 0; c < kColumns; ++c)
          #pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = (channels.unit + c) * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2;
            if (column < last && channels.unit + c >= channels.fresh) to[column] = sums.sums[r][c][i / 2][lower * 2 + i % 2];
          }
      }
  }
}

// The image: nine neighbours' columns added up. A thread has a pixel, neighbours in a row.
template <typename T>
ADVKD_INLINE void pair_image(const ConvPairParameters& p, const PairTile& tile, const PairPlace& place, const float* products) {
  const int pixel = threadIdx.x, down = pixel / p.tile_width, across = pixel - down * p.tile_width;
  const int row = place.row + down, column = place.column + across, pitch = pair_image_pitch(p.c_out);
  if (down >= p.tile_height || row >= place.height || column >= place.width) return;
  for (int channel = 0; channel < p.c_out; ++channel) {
    float sum = 0.0f;
    #pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int neighbour = (down + tap / 3) * tile.mid_width + across + tap % 3;
      sum = __fadd_rn(sum, products[neighbour * pitch + p.c_out * tap + channel]);
    }
    const i64 to = ((place.sample * p.c_out + channel) * place.height + row) * place.width + column;
    static_cast<typename T::Bits*>(p.out)[to] = T::encode(activate(sum, __ldg(p.bias2 + channel), p.activation, p.slope));
  }
}

template <typename Product, int kColumns>
ADVKD_INLINE void conv_pair(const ConvPairParameters& p) {
  using T = typename Product::Storage;
  constexpr int kElement = sizeof(typename T::Bits);
  const PairTile tile = pair_tile(p.tile_height, p.tile_width, p.upsample != 0);
  const PairPlace place = pair_place(p);
  // The inputs, and in their place what becomes of them in the end; the pixels between.
  unsigned char *ends = shared_memory(), *mid = ends + p.mid_place;
  pair_copy(p, tile, place, kElement, ends);
  __syncthreads();
  if (p.upsample) {
    pair_first<Product, kColumns, true>(p, tile, place, ends, mid);
  } else {
    pair_first<Product, kColumns, false>(p, tile, place, ends, mid);
  }
  __syncthreads();
  if (p.image) {
    float* products = reinterpret_cast<float*>(ends);
    if (9 * p.c_out > 16 * (kColumns - 1)) {
      pair_products<Product, kColumns>(p, tile, mid, products);
    } else {
      pair_products<Product, 1>(p, tile, mid, products);
    }
    __syncthreads();
    pair_image<T>(p, tile, place, products);
  } else {
    pair_outputs<Product, kColumns>(p, tile, mid, ends);
    __syncthreads();
    pair_write(p, place, kElement, ends);
  }
}

#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_PRODUCTS
#endif
#define ADVKD_CONV_PAIR(COLUMNS, P)                                                                              \
  extern "C" __global__ void __launch_bounds__(kPairThreads, PairLimits<product_##P::Storage, COLUMNS>::kBlocks) \
      advkd_conv_pair_columns##COLUMNS##_##P(const ConvPairParameters p) {                                       \
    conv_pair<product_##P, COLUMNS>(p);                                                                          \
  }                                                                                                              \
  ADVKD_KERNEL(advkd_conv_pair_columns##COLUMNS##_##P)
#define ADVKD_CONV_PAIRS(P) ADVKD_CONV_PAIR(1, P) ADVKD_CONV_PAIR(2, P) ADVKD_CONV_PAIR(3, P)
ADVKD_VARIANTS(ADVKD_CONV_PAIRS)

}  // namespace advkd
