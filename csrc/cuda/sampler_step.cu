// One step of a diffusion sampler on NVIDIA GPUs. A thread takes groups of neighbouring elements of one channel: one vector per
// tensor where alignment allows, one Philox call per four elements where it draws the noise.
// Flat: a warp belongs to one sample. Its threads take one or two vectors of 16 bytes of x, a warp's width apart and all loaded
// before the first is used; where vectors are not aligned, four elements each, over groups x channels, channels fastest (the
// order of memory).
// Pool: a block takes `strips` strips of `pool` rows, as wide as `outputs` pooled columns. Its threads are `lanes` groups of four
// columns times `rows`; each adds its columns down every `rows`-th row in registers, then shared memory joins them.
// Plain and extended steps (with a second history, and another stored output than x0) are kernels of their own.
// Every product and sum is rounded by itself, in the reference's order. NVRTC compiles this file as it is.

#include "cuda/sampler_step.h"

#include "cuda/kernel.h"
#include "cuda/normals.cuh"
#include "cuda/storage.cuh"

namespace advkd {

// Up to a group of elements of one channel: `left` of them, `stride` apart in memory from `place`.
struct Run {
  i64 place, stride;
  int left;
  bool vector;
};

template <typename T, int kGroup>
ADVKD_INLINE Group<T, kGroup> load(const void* tensor, const Run& run) {
  const auto* from = static_cast<const typename T::Bits*>(tensor) + run.place;
  Group<T, kGroup> group = {};
  if (run.vector) {
    group = *reinterpret_cast<const Group<T, kGroup>*>(from);
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < run.left) group.bits[i] = from[i * run.stride];
  }
  return group;
}

template <typename T, int kGroup>
ADVKD_INLINE void store(void* tensor, const Run& run, const Group<T, kGroup>& group) {
  auto* to = static_cast<typename T::Bits*>(tensor) + run.place;
  if (run.vector) {
    if constexpr (sizeof(group) % 16 == 0) {
      store_bits<T>(to, Span{0, kGroup, true}, group);
    } else {
      *reinterpret_cast<Group<T, kGroup>*>(to) = group;
    }
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < run.left) to[i * run.stride] = group.bits[i];
  }
}

// Whether the first `left` elements are finite as they are stored.
template <typename T, int kGroup>
ADVKD_INLINE bool finite(const Group<T, kGroup>& group, int left) {
  bool all = true;
  for (int i = 0; i < kGroup; ++i) all &= i >= left || fabsf(T::decode(group.bits[i])) < __uint_as_float(0x7F800000u);
  return all;
}

// Columns of the table of coefficients, and blocks to a multiprocessor of each kernel: with no number the compiler takes more
// registers than help, or spills them here and there.
struct plain {
  static constexpr bool kExtended = false;
  static constexpr int kColumns = 8, kFlatBlocks = 4, kPoolBlocks = 3;
};
struct extended {
  static constexpr bool kExtended = true;
  static constexpr int kColumns = 12, kFlatBlocks = 3, kPoolBlocks = 2;
};

// The numbers that a sample's elements share; the last four are those of extended steps.
struct Sample {
  i64 number;
  float k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z;
  u64 index;
  u32 stream_step;
  float c_g, s_0, s_x, s_m;
};

template <typename F, bool kDraw>
ADVKD_INLINE Sample sample_of(const StepParameters& p, i64 number, bool vector) {
  float k[F::kColumns];
  load<f32>(p.table, Span{number * p.row_stride, F::kColumns, vector}, k);
  Sample s = {number, k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], 0, p.stream_step};
  if constexpr (F::kExtended) {
    s.c_g = k[8];
    s.s_0 = k[9];
    s.s_x = k[10];
    s.s_m = k[11];
  }
  if (kDraw) {
    s.index = static_cast<u64>(p.indices[number]);
    if (p.steps) s.stream_step |= static_cast<u32>(p.steps[number * p.step_stride]);
  }
  return s;
}

// Normals of a sample's logical elements first .. first + 3; where they begin inside a block the next one is drawn too.
ADVKD_INLINE void four_normals(const StepParameters& p, const Sample& s, i64 first, float* out) {
  u32 words[4];
  float n[8] = {};
  draw_words(s.index, first / 4, p.key0, p.key1, s.stream_step, words);
  normals_of(words, n);
  if (first % 4 != 0) {
    draw_words(s.index, first / 4 + 1, p.key0, p.key1, s.stream_step, words);
    normals_of(words, n + 4);
    // Two conditional moves rather than an index that varies: the array stays in registers.
    for (int i = 0; i < 7; ++i) n[i] = first & 1 ? n[i + 1] : n[i];
    for (int i = 0; i < 6; ++i) n[i] = first & 2 ? n[i + 2] : n[i];
  }
  for (int i = 0; i < 4; ++i) out[i] = n[i];
}

// A group of each tensor, as it lies in memory; zeros for those that are not there.
template <typename X, typename M, int kGroup>
struct Inputs {
  Group<X, kGroup> x;
  Group<M, kGroup> m;
  Group<X, kGroup> previous, noise, history;
};

template <typename X, typename M, typename F, bool kDraw, int kGroup>
ADVKD_INLINE Inputs<X, M, kGroup> fetch(const StepParameters& p, const Run& run) {
  Inputs<X, M, kGroup> in = {load<X, kGroup>(p.x, run), load<M, kGroup>(p.m, run), {}, {}, {}};
  if (p.previous_x0) in.previous = load<X, kGroup>(p.previous_x0, run);
  if constexpr (F::kExtended)
    if (p.history) in.history = load<X, kGroup>(p.history, run);
  if (!kDraw && p.noise) in.noise = load<X, kGroup>(p.noise, run);
  return in;
}

// The step on what was fetched; `first`: its first logical element. The next state is stored and handed back.
template <typename X, typename M, typename F, bool kDraw, int kGroup>
ADVKD_INLINE void finish(
    const StepParameters& p,
    const Sample& s,
    const Run& run,
    const Inputs<X, M, kGroup>& in,
    i64 first,
    float (&next)[kGroup]) {
  float x[kGroup], m[kGroup], previous[kGroup], history[kGroup], z[kGroup], kept[kGroup];
  decode<X>(in.x, x);
  decode<M>(in.m, m);
  decode<X>(in.previous, previous);
  if constexpr (F::kExtended) decode<X>(in.history, history);
  if (kDraw) {
    static_assert(kGroup % 4 == 0, "normals are drawn in fours");
    for (int i = 0; i < kGroup; i += 4) four_normals(p, s, first + i, z + i);
  } else {
    decode<X>(in.noise, z);
  }
  for (int i = 0; i < kGroup; ++i) {
    float c = __fadd_rn(__fmul_rn(s.k_x, x[i]), __fmul_rn(s.k_m, m[i]));
    // Comparisons rather than fminf and fmaxf: NaN must survive.
    c = c < -s.clip ? -s.clip : c;
    c = c > s.clip ? s.clip : c;
    kept[i] = c;
    if constexpr (F::kExtended) kept[i] = __fadd_rn(__fadd_rn(__fmul_rn(s.s_0, c), __fmul_rn(s.s_x, x[i])), __fmul_rn(s.s_m, m[i]));
    next[i] = __fadd_rn(__fadd_rn(__fmul_rn(s.c_0, c), __fmul_rn(s.c_x, x[i])), __fmul_rn(s.c_m, m[i]));
    if (p.previous_x0) next[i] = __fadd_rn(next[i], __fmul_rn(s.c_h, previous[i]));
    if constexpr (F::kExtended)
      if (p.history) next[i] = __fadd_rn(next[i], __fmul_rn(s.c_g, history[i]));
    if (kDraw || p.noise) next[i] = __fadd_rn(next[i], __fmul_rn(s.c_z, z[i]));
  }
  // First, so that its registers are free.
  if (p.x0) store<X>(p.x0, run, encode<X>(kept));
  const auto stored = encode<X>(next);
  store<X>(p.out, run, stored);
  // Every thread that finds an offender writes the same 1.
  if (p.flags && !finite<X>(stored, run.left)) p.flags[s.number] = 1;
}

// The step on up to four elements, `left` of a channel whose elements are `stride` apart, from its element `offset` on.
template <typename X, typename M, typename F, bool kDraw>
ADVKD_INLINE void step_four(
    const StepParameters& p,
    const Sample& s,
    int channel,
    i64 stride,
    i64 offset,
    i64 left,
    bool vectors,
    float (&next)[4]) {
  const i64 place = (s.number * p.length + offset) * stride + channel;
  const bool vector = vectors && left >= 4 && offset % 4 == 0;
  const Run run = {place, stride, static_cast<int>(left < 4 ? left : 4), vector};
  finish<X, M, F, kDraw>(p, s, run, fetch<X, M, F, kDraw, 4>(p, run), channel * p.length + offset, next);
}

// n divided by d, of which `inverse` is the step_inverse.
ADVKD_INLINE i64 quotient(u64 n, u64 inverse) {
  return static_cast<i64>(__umul64hi(n + 1, inverse));
}

// Where a thread of the flat kernel works: its warp's sample and number in it, and its place in the warp.
struct Lane {
  i64 sample, tile;
  int lane;
};

// The step on `kEach` vectors; several of them are all inside the sample.
template <typename X, typename M, typename F, bool kDraw, int kEach>
ADVKD_INLINE void flat_vectors(const StepParameters& p, const Lane& t) {
  constexpr int kGroup = 16 / sizeof(typename X::Bits), kApart = kStepLanes * kGroup;
  const i64 offset = t.tile * (kEach * kApart) + t.lane * kGroup, place = t.sample * p.length + offset;
  if (kEach == 1 && offset >= p.length) return;
  const Sample s = sample_of<F, kDraw>(p, t.sample, true);
  Inputs<X, M, kGroup> in[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) in[i] = fetch<X, M, F, kDraw, kGroup>(p, Run{place + i * kApart, 1, kGroup, true});
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float next[kGroup];
    finish<X, M, F, kDraw>(p, s, Run{place + i * kApart, 1, kGroup, true}, in[i], offset + i * kApart, next);
  }
}

template <typename X, typename M, typename F, bool kDraw>
ADVKD_INLINE void flat_elements(const StepParameters& p, const Lane& t) {
  const i64 item = t.tile * kStepLanes + t.lane, group = kDraw ? quotient(item, p.inverse_channels) : item;
  // Without drawn normals the order of memory is one channel.
  const int channels = kDraw ? p.channels : 1, channel = static_cast<int>(item - group * channels);
  if (4 * group >= p.length) return;
  float next[4];
  const Sample s = sample_of<F, kDraw>(p, t.sample, false);
  step_four<X, M, F, kDraw>(p, s, channel, channels, 4 * group, p.length - 4 * group, false, next);
}

template <typename X, typename M, typename F, bool kDraw>
ADVKD_INLINE void flat(const StepParameters& p) {
  const u32 warp = blockIdx.x * (kStepThreads / kStepLanes) + threadIdx.x / kStepLanes;
  const u32 sample = static_cast<u32>(quotient(warp, p.inverse_warps));
  if (sample >= p.samples) return;
  const Lane t = {sample, warp - sample * p.warps, static_cast<int>(threadIdx.x % kStepLanes)};
  if (!kDraw && !F::kExtended && p.vectors_each == 2) {
    flat_vectors<X, M, F, kDraw, kDraw || F::kExtended ? 1 : 2>(p, t);
  } else if (p.vectors_each) {
    flat_vectors<X, M, F, kDraw, 1>(p, t);
  } else {
    flat_elements<X, M, F, kDraw>(p, t);
  }
}

// Where a thread of the pool kernel works: its part of the block and the first column and channel of the block's tile.
struct Tile {
  int lane, row, slot, output, channel;
  i64 strip;
};

ADVKD_INLINE Tile tile_of(const StepParameters& p) {
  const int thread = threadIdx.x, block = blockIdx.x, per_strip = p.column_tiles * p.channel_tiles, rest = block % per_strip;
  const int slot = thread / (p.lanes * p.rows);
  const int output = rest / p.channel_tiles * p.outputs, channel = rest % p.channel_tiles * p.tile_channels;
  const i64 strip = static_cast<i64>(block / per_strip) * p.strips + slot;
  return {thread % p.lanes, thread / p.lanes % p.rows, slot, output, channel, strip};
}

// The step on a thread's columns; their sums down its rows.
template <typename X, typename M, typename F, bool kDraw>
ADVKD_INLINE void column_sums(const StepParameters& p, const Tile& t, i64 strips_per_sample, float (&sums)[4]) {
  const int channel = t.channel + t.lane % p.tile_channels, first = t.output * p.pool;
  const int columns = min(p.outputs * p.pool, p.width - first), groups = p.lanes / p.tile_channels;
  if (channel >= p.channels) return;
  const Sample s = sample_of<F, kDraw>(p, t.strip / strips_per_sample, false);
  const i64 first_row = t.strip % strips_per_sample * p.pool;
  // A second turn is there only where one output is wider than the block.
  for (int column = 4 * (t.lane / p.tile_channels); column < columns; column += 4 * groups) {
#pragma unroll 1
    for (int row = t.row; row < p.pool; row += p.rows) {
      float next[4];
      const i64 offset = (first_row + row) * p.width + first + column;
      step_four<X, M, F, kDraw>(p, s, channel, p.channels, offset, columns - column, p.vectors, next);
      for (int i = 0; i < 4; ++i) sums[i] += column + i < columns ? next[i] : 0.0f;
    }
  }
}

// The tile's means from the sums of its threads' columns.
template <typename X>
ADVKD_INLINE void means(const StepParameters& p, const Tile& t, const float* sums) {
  const int outputs = p.width / p.pool, span = min(p.pool, 4 * kStepThreads);
  const float pixels = static_cast<float>(p.pool) * static_cast<float>(p.pool);
  for (int item = t.row * p.lanes + t.lane; item < p.outputs * p.tile_channels; item += p.lanes * p.rows) {
    const int output = item / p.tile_channels, channel = item % p.tile_channels;
    if (t.output + output >= outputs || t.channel + channel >= p.channels) continue;
    float total = 0.0f;
    for (int row = 0; row < p.rows; ++row) {
      const float* from = sums + 4 * ((t.slot * p.rows + row) * p.lanes + channel);
      // Where an output is whole groups of four, each thread has added its four.
      for (int j = output * p.pool; j < output * p.pool + span; j += p.pool % 4 ? 1 : 4)
        total += from[j / 4 * 4 * p.tile_channels + j % 4];
    }
    const i64 place = (t.strip * outputs + t.output + output) * p.channels + t.channel + channel;
    static_cast<typename X::Bits*>(p.pooled)[place] = X::encode(__fdiv_rn(total, pixels));
  }
}

template <typename X, typename M, typename F, bool kDraw>
ADVKD_INLINE void pool(const StepParameters& p) {
  __shared__ float4 shared[kStepThreads];
  const i64 strips_per_sample = p.length / p.width / p.pool;
  const Tile t = tile_of(p);
  const bool live = t.slot < p.strips && t.strip < p.samples * strips_per_sample;
  float sums[4] = {};
  if (live) column_sums<X, M, F, kDraw>(p, t, strips_per_sample, sums);
  if (p.pool % 4 == 0) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  shared[threadIdx.x] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  __syncthreads();
  if (live) means<X>(p, t, reinterpret_cast<const float*>(shared));
}

// Entry points by name, advkd_step_<flat or pool>_<tensor or draw>_<x>_<m>_<plain or extended>.
#ifndef ADVKD_VARIANTS
#define ADVKD_STEP_DTYPES(EACH, F)                          \
  EACH(f32, f32, F) EACH(f32, bf16, F) EACH(f32, f16, F)    \
  EACH(bf16, f32, F) EACH(bf16, bf16, F) EACH(bf16, f16, F) \
  EACH(f16, f32, F) EACH(f16, bf16, F) EACH(f16, f16, F)
#define ADVKD_VARIANTS(EACH) ADVKD_STEP_DTYPES(EACH, plain) ADVKD_STEP_DTYPES(EACH, extended)
#endif
#define ADVKD_STEP_ENTRY(KIND, NOISE, DRAW, BLOCKS, X, M, F)                  \
  extern "C" __global__ void __launch_bounds__(kStepThreads, F::BLOCKS)       \
      advkd_step_##KIND##_##NOISE##_##X##_##M##_##F(const StepParameters p) { \
    KIND<X, M, F, DRAW>(p);                                                   \
  }                                                                           \
  ADVKD_KERNEL(advkd_step_##KIND##_##NOISE##_##X##_##M##_##F)
#define ADVKD_STEP_ENTRIES(X, M, F)                           \
  ADVKD_STEP_ENTRY(flat, tensor, false, kFlatBlocks, X, M, F) \
  ADVKD_STEP_ENTRY(flat, draw, true, kFlatBlocks, X, M, F)    \
  ADVKD_STEP_ENTRY(pool, tensor, false, kPoolBlocks, X, M, F) \
  ADVKD_STEP_ENTRY(pool, draw, true, kPoolBlocks, X, M, F)
ADVKD_VARIANTS(ADVKD_STEP_ENTRIES)

}  // namespace advkd
