// One step of a diffusion sampler on NVIDIA GPUs. A thread takes groups of neighbouring elements of one channel: one vector per
// tensor where alignment allows, one Philox call per four elements where it draws the noise.
// Flat: a thread takes 16 bytes of x; threads run over samples x groups x channels, channels fastest (the order of memory).
// Pool: a block takes `strips` strips of `pool` rows, as wide as `outputs` pooled columns. Its threads are `lanes` groups of four
// columns times `rows`; each adds its columns down every `rows`-th row in registers, then shared memory joins them.
// Every product and sum is rounded by itself, in the reference's order. NVRTC compiles this file as it is.

#include "cuda/sampler_step.h"

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
ADVKD_INLINE void load(const void* tensor, const Run& run, float (&to)[kGroup]) {
  const auto* from = static_cast<const typename T::Bits*>(tensor) + run.place;
  Vector<typename T::Bits, kGroup> vector = {};
  if (run.vector) {
    vector = *reinterpret_cast<const Vector<typename T::Bits, kGroup>*>(from);
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < run.left) vector.bits[i] = from[i * run.stride];
  }
  for (int i = 0; i < kGroup; ++i) to[i] = T::decode(vector.bits[i]);
}

// Whether what was stored is finite.
template <typename T, int kGroup>
ADVKD_INLINE bool store(void* tensor, const Run& run, const float (&values)[kGroup]) {
  auto* to = static_cast<typename T::Bits*>(tensor) + run.place;
  Vector<typename T::Bits, kGroup> vector;
  bool finite = true;
  for (int i = 0; i < kGroup; ++i) {
    vector.bits[i] = T::encode(values[i]);
    finite &= i >= run.left || fabsf(T::decode(vector.bits[i])) < __uint_as_float(0x7F800000u);
  }
  if (run.vector) {
    *reinterpret_cast<Vector<typename T::Bits, kGroup>*>(to) = vector;
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (i < run.left) to[i * run.stride] = vector.bits[i];
  }
  return finite;
}

// What the elements of a sample have in common.
struct Sample {
  i64 number;
  float k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z;
  u64 index;
  u32 stream_step;
};

template <bool kDraw>
ADVKD_INLINE Sample sample_of(const StepParameters& p, i64 number) {
  const float* k = p.table + number * p.row_stride;
  Sample s = {number, k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], 0, p.stream_step};
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

// The step on `left` elements of a channel from `offset` on; the next state is stored and handed back.
template <typename X, typename M, bool kDraw, int kGroup>
ADVKD_INLINE void step(const StepParameters& p, const Sample& s, int channel, i64 offset, i64 left, float (&next)[kGroup]) {
  const i64 place = (s.number * p.length + offset) * p.channels + channel;
  const bool vector = p.vectors && left >= kGroup && offset % kGroup == 0;
  const Run run = {place, p.channels, static_cast<int>(left < kGroup ? left : kGroup), vector};
  float x[kGroup], m[kGroup], previous[kGroup] = {}, z[kGroup] = {}, clean[kGroup];
  load<X>(p.x, run, x);
  load<M>(p.m, run, m);
  if (p.previous_x0) load<X>(p.previous_x0, run, previous);
  if (kDraw) {
    for (int i = 0; i < kGroup; i += 4) four_normals(p, s, channel * p.length + offset + i, z + i);
  } else if (p.noise) {
    load<X>(p.noise, run, z);
  }
  for (int i = 0; i < kGroup; ++i) {
    float c = __fadd_rn(__fmul_rn(s.k_x, x[i]), __fmul_rn(s.k_m, m[i]));
    // Comparisons rather than fminf and fmaxf: NaN must survive.
    c = c < -s.clip ? -s.clip : c;
    c = c > s.clip ? s.clip : c;
    clean[i] = c;
    next[i] = __fadd_rn(__fadd_rn(__fmul_rn(s.c_0, c), __fmul_rn(s.c_x, x[i])), __fmul_rn(s.c_m, m[i]));
    if (p.previous_x0) next[i] = __fadd_rn(next[i], __fmul_rn(s.c_h, previous[i]));
    if (kDraw || p.noise) next[i] = __fadd_rn(next[i], __fmul_rn(s.c_z, z[i]));
  }
  // Every thread that finds an offender writes the same 1.
  if (!store<X>(p.out, run, next) && p.flags) p.flags[s.number] = 1;
  if (p.x0) store<X>(p.x0, run, clean);
}

template <typename X, typename M, bool kDraw>
ADVKD_INLINE void flat(const StepParameters& p) {
  constexpr int kGroup = 16 / sizeof(typename X::Bits);
  const i64 groups = (p.length + kGroup - 1) / kGroup, item = static_cast<i64>(blockIdx.x) * kStepThreads + threadIdx.x;
  const i64 pixel = p.channels == 1 ? item : item / p.channels, sample = pixel / groups;
  const i64 offset = (pixel - sample * groups) * kGroup;
  if (sample >= p.samples) return;
  const int channel = static_cast<int>(item - pixel * p.channels);
  float next[kGroup];
  step<X, M, kDraw>(p, sample_of<kDraw>(p, sample), channel, offset, p.length - offset, next);
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
template <typename X, typename M, bool kDraw>
ADVKD_INLINE void column_sums(const StepParameters& p, const Tile& t, i64 strips_per_sample, float (&sums)[4]) {
  const int channel = t.channel + t.lane % p.tile_channels, first = t.output * p.pool;
  const int columns = min(p.outputs * p.pool, p.width - first), groups = p.lanes / p.tile_channels;
  if (channel >= p.channels) return;
  const Sample s = sample_of<kDraw>(p, t.strip / strips_per_sample);
  const i64 first_row = t.strip % strips_per_sample * p.pool;
  // A second turn is there only where one output is wider than the block.
  for (int column = 4 * (t.lane / p.tile_channels); column < columns; column += 4 * groups) {
#pragma unroll 1
    for (int row = t.row; row < p.pool; row += p.rows) {
      float next[4];
      step<X, M, kDraw>(p, s, channel, (first_row + row) * p.width + first + column, columns - column, next);
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

template <typename X, typename M, bool kDraw>
ADVKD_INLINE void pool(const StepParameters& p) {
  __shared__ float4 shared[kStepThreads];
  const i64 strips_per_sample = p.length / p.width / p.pool;
  const Tile t = tile_of(p);
  const bool live = t.slot < p.strips && t.strip < p.samples * strips_per_sample;
  float sums[4] = {};
  if (live) column_sums<X, M, kDraw>(p, t, strips_per_sample, sums);
  if (p.pool % 4 == 0) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  shared[threadIdx.x] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  __syncthreads();
  if (live) means<X>(p, t, reinterpret_cast<const float*>(shared));
}

// Entry points by name, advkd_step_<flat or pool>_<tensor or draw>_<x>_<m>. Whoever needs one pair of dtypes defines the list.
#ifndef ADVKD_STEP_DTYPES
#define ADVKD_STEP_DTYPES(EACH)                    \
  EACH(f32, f32) EACH(f32, bf16) EACH(f32, f16)    \
  EACH(bf16, f32) EACH(bf16, bf16) EACH(bf16, f16) \
  EACH(f16, f32) EACH(f16, bf16) EACH(f16, f16)
#endif
// Three blocks to a multiprocessor: with no number the compiler spills registers here and there.
#define ADVKD_STEP_ENTRY(KIND, NOISE, DRAW, X, M)                                                                    \
  extern "C" __global__ void __launch_bounds__(kStepThreads, 3)                                                      \
      advkd_step_##KIND##_##NOISE##_##X##_##M(const StepParameters p) {                                              \
    KIND<X, M, DRAW>(p);                                                                                             \
  }
#define ADVKD_STEP_ENTRIES(X, M)              \
  ADVKD_STEP_ENTRY(flat, tensor, false, X, M) \
  ADVKD_STEP_ENTRY(flat, draw, true, X, M)    \
  ADVKD_STEP_ENTRY(pool, tensor, false, X, M) \
  ADVKD_STEP_ENTRY(pool, draw, true, X, M)
ADVKD_STEP_DTYPES(ADVKD_STEP_ENTRIES)

}  // namespace advkd
