// Batch norm, LeakyReLU and nearest up-sampling of a training step on NVIDIA GPUs: moments, the forward pass, the backward
// pass' sums and its second half. A thread takes groups of 16 bytes in turn, always of the same channels.
// Planes: a block works on one channel, all threads along its rows. Channels last: a block's threads are `lanes` groups of
// neighbouring channels times `rows` pixels. To up-sample, a position's four pixels are written or added up at once.
// Moments and sums: registers, then shared memory, then a partial result per block, which a block per channel joins in a
// second kernel; no atomics. Numbers that decide a sign are rounded step by step, as in the reference.
// NVRTC compiles this file as it is.

#include "cuda/norm_act.h"

#include "cuda/kernel.h"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"

namespace advkd {

// A kernel's form: a dtype, whether channels are neighbours in memory, and how many elements a position has.
template <typename T, bool kIsLast, int kElements>
struct Layout {
  using Type = T;
  static constexpr bool kLast = kIsLast;
  static constexpr int kGroup = kElements;
  static constexpr int kSets = kLast ? kGroup : 1;  // channels of a position
  static_assert(kGroup == 1 || kGroup * sizeof(typename T::Bits) == 16, "a position is one element or 16 bytes");
  ADVKD_INLINE int set(int element) { return kLast ? element : 0; }
};

// A thread's first channel, and its position.
struct Walk {
  int channel, sample, row, column;
};

template <typename L>
ADVKD_INLINE Walk first_position(const NormParameters& p) {
  const int part = blockIdx.x / p.tiles, tile = blockIdx.x - part * p.tiles, thread = threadIdx.x, row = thread / p.lanes;
  const int channel = L::kLast ? (tile * p.lanes + thread - row * p.lanes) * L::kGroup : tile;
  const i64 position = static_cast<i64>(part) * p.rows + row, line = position / p.columns, sample = line / p.height;
  // Threads that are left over, and those beyond the last channel, have no position.
  const bool idle = row >= p.rows || channel >= p.channels;
  return {channel, idle ? p.samples : static_cast<int>(sample), static_cast<int>(line - sample * p.height),
          static_cast<int>(position - line * p.columns)};
}

ADVKD_INLINE void advance(const NormParameters& p, Walk& w) {
  w.column += p.column_step;
  w.row += p.row_step;
  w.sample += p.sample_step;
  if (w.column >= p.columns) {
    w.column -= p.columns;
    ++w.row;
  }
  if (w.row >= p.height) {
    w.row -= p.height;
    ++w.sample;
  }
}

// All of a position's elements.
template <typename L>
ADVKD_INLINE Span whole(i64 place) {
  return {place, L::kGroup, L::kGroup > 1};
}

// Where a position's elements are in x, and the first of its four pixels' where x is up-sampled: those to the right in the same
// row are `side` elements further, those in the next row `pitch`.
struct Place {
  i64 single, doubled, side, pitch;
};

template <typename L>
ADVKD_INLINE Place place_of(const NormParameters& p, const Walk& w) {
  if (L::kLast) {
    const i64 side = p.channels, line = w.sample * p.width;
    return {(line + w.column) * side + w.channel, (4 * line + 2 * w.column) * side + w.channel, side, 2 * p.width * side};
  }
  const i64 line = ((static_cast<i64>(w.sample) * p.channels + w.channel) * p.height + w.row) * p.width;
  const i64 column = static_cast<i64>(w.column) * L::kGroup;
  return {line + column, 4 * line + 2 * column, L::kGroup, 2 * p.width};
}

// The group, and the element in it, that holds element i's left (0) or right (1) pixel of a row.
template <typename L>
ADVKD_INLINE int group_of(int i, int side) {
  return L::kLast ? side : (2 * i + side) / L::kGroup;
}

template <typename L>
ADVKD_INLINE int element_of(int i, int side) {
  return L::kLast ? i : (2 * i + side) % L::kGroup;
}

template <typename L>
ADVKD_INLINE void store_four(const NormParameters& p, const Place& place, const float (&values)[L::kGroup]) {
  float row[2][L::kGroup];
  for (int i = 0; i < L::kGroup; ++i)
    for (int side = 0; side < 2; ++side) row[group_of<L>(i, side)][element_of<L>(i, side)] = values[i];
  for (int side = 0; side < 2; ++side) {
    const i64 above = place.doubled + side * place.side;
    store<typename L::Type>(p.out, whole<L>(above), row[side]);
    store<typename L::Type>(p.out, whole<L>(above + place.pitch), row[side]);
  }
}

template <typename L>
ADVKD_INLINE void sum_four(const NormParameters& p, const Place& place, float (&sums)[L::kGroup]) {
  float above[2][L::kGroup], below[2][L::kGroup];
  for (int side = 0; side < 2; ++side) {
    const i64 first = place.doubled + side * place.side;
    load<typename L::Type>(p.gradient, whole<L>(first), above[side]);
    load<typename L::Type>(p.gradient, whole<L>(first + place.pitch), below[side]);
  }
  for (int i = 0; i < L::kGroup; ++i) {
    const int left = group_of<L>(i, 0), right = group_of<L>(i, 1), j = element_of<L>(i, 0), k = element_of<L>(i, 1);
    sums[i] = __fadd_rn(__fadd_rn(__fadd_rn(above[left][j], above[right][k]), below[left][j]), below[right][k]);
  }
}

// The numbers that a thread's channels share.
template <int kSets>
struct Channels {
  float gamma[kSets], beta[kSets], mean[kSets], inverse[kSets];  // inverse: of the standard deviation
};

template <typename L>
ADVKD_INLINE void load_channels(const NormParameters& p, int channel, const float* table, int row, float (&to)[L::kSets]) {
  load<f32>(table, Span{row * static_cast<i64>(p.channels) + channel, L::kSets, L::kSets > 1}, to);
}

template <typename L>
ADVKD_INLINE void load_statistics(const NormParameters& p, int channel, Channels<L::kSets>& c) {
  load_channels<L>(p, channel, p.statistics, 0, c.mean);
  load_channels<L>(p, channel, p.statistics, 1, c.inverse);
  for (int i = 0; i < L::kSets; ++i) c.inverse[i] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(c.inverse[i], p.eps)));
}

template <typename L>
ADVKD_INLINE void load_weights(const NormParameters& p, int channel, Channels<L::kSets>& c) {
  load_channels<L>(p, channel, p.weights, 0, c.gamma);
  load_channels<L>(p, channel, p.weights, 1, c.beta);
}

template <typename L>
ADVKD_INLINE void load_normalized(
    const NormParameters& p, const Place& place, const Channels<L::kSets>& c, float (&normal)[L::kGroup]) {
  load<typename L::Type>(p.x, whole<L>(place.single), normal);
  for (int i = 0; i < L::kGroup; ++i)
    normal[i] = __fmul_rn(__fadd_rn(normal[i], -c.mean[L::set(i)]), c.inverse[L::set(i)]);
}

// The value before LeakyReLU.
template <typename L>
ADVKD_INLINE float before(const Channels<L::kSets>& c, int i, float normal) {
  return __fadd_rn(__fmul_rn(c.gamma[L::set(i)], normal), c.beta[L::set(i)]);
}

// `value` where `before` is positive, else the slope's share of it.
ADVKD_INLINE float leaky(const NormParameters& p, float before, float value) {
  return before > 0.0f ? value : __fmul_rn(p.slope, value);
}

// The gradient by the values before LeakyReLU: from the incoming one, or as it was kept. The weights come from the cache at
// every position: eight channels' would be registers too many.
template <typename L>
ADVKD_INLINE void gradient_before(
    const NormParameters& p,
    const Place& place,
    int channel,
    const float (&normal)[L::kGroup],
    Channels<L::kSets>& c,
    float (&d)[L::kGroup]) {
  if (p.upsample)
    sum_four<L>(p, place, d);
  else
    load<typename L::Type>(p.gradient, whole<L>(place.single), d);
  load_weights<L>(p, channel, c);
  if (p.masked) return;
  for (int i = 0; i < L::kGroup; ++i) d[i] = leaky(p, before<L>(c, i, normal[i]), d[i]);
}

template <typename L>
ADVKD_INLINE void norm_act(const NormParameters& p) {
  Walk w = first_position<L>(p);
  if (w.sample >= p.samples) return;
  Channels<L::kSets> c;
  load_statistics<L>(p, w.channel, c);
  load_weights<L>(p, w.channel, c);
  for (; w.sample < p.samples; advance(p, w)) {
    const Place place = place_of<L>(p, w);
    float y[L::kGroup];
    load_normalized<L>(p, place, c, y);
    for (int i = 0; i < L::kGroup; ++i) {
      const float value = before<L>(c, i, y[i]);
      y[i] = leaky(p, value, value);
    }
    if (p.upsample)
      store_four<L>(p, place, y);
    else
      store<typename L::Type>(p.out, whole<L>(place.single), y);
  }
}

template <typename L>
ADVKD_INLINE void norm_backward(const NormParameters& p) {
  Walk w = first_position<L>(p);
  if (w.sample >= p.samples) return;
  Channels<L::kSets> c;
  float mean_d[L::kSets], mean_dx[L::kSets];
  load_statistics<L>(p, w.channel, c);
  for (; w.sample < p.samples; advance(p, w)) {
    const Place place = place_of<L>(p, w);
    float normal[L::kGroup], d[L::kGroup];
    load_normalized<L>(p, place, c, normal);
    gradient_before<L>(p, place, w.channel, normal, c, d);
    load_channels<L>(p, w.channel, p.means, 0, mean_d);
    load_channels<L>(p, w.channel, p.means, 1, mean_dx);
    for (int i = 0; i < L::kGroup; ++i) {
      const int set = L::set(i);
      const float centred = __fadd_rn(__fadd_rn(d[i], -mean_d[set]), -__fmul_rn(normal[i], mean_dx[set]));
      d[i] = __fmul_rn(__fmul_rn(c.gamma[set], c.inverse[set]), centred);
    }
    store<typename L::Type>(p.out, whole<L>(place.single), d);
  }
}

// A position's values into the running count, and into each channel's mean and sum of squares around it.
template <typename L>
ADVKD_INLINE void add_moments(const float (&x)[L::kGroup], float (&moments)[1 + 2 * L::kSets]) {
  if constexpr (L::kSets > 1) {
    // One more value of each channel (Welford 1962).
    moments[0] += 1.0f;
    const float share = __fdiv_rn(1.0f, moments[0]);
    for (int i = 0; i < L::kSets; ++i) {
      const float delta = x[i] - moments[2 * i + 1];
      moments[2 * i + 1] += delta * share;
      moments[2 * i + 2] += delta * (x[i] - moments[2 * i + 1]);
    }
  } else {
    float group[3] = {L::kGroup, 0.0f, 0.0f};
    for (int i = 0; i < L::kGroup; ++i) group[1] += x[i];
    group[1] *= 1.0f / L::kGroup;
    for (int i = 0; i < L::kGroup; ++i) group[2] += (x[i] - group[1]) * (x[i] - group[1]);
    Combine::merge(moments, group);
  }
}

// The block's partial result: for each channel a count, which is there for moments alone, and two values.
template <typename Merge, typename L, int kValues>
ADVKD_INLINE void write_partials(const NormParameters& p, int channel, float (&values)[kValues]) {
  constexpr int kCounts = kValues - 2 * L::kSets;
  block_reduce<Merge>(values, p.lanes, p.rows);
  if (static_cast<int>(threadIdx.x) >= p.lanes || channel >= p.channels) return;
  const i64 channels = p.channels;
  float* to = p.partials + blockIdx.x / p.tiles * 3 * channels + channel;
  for (int i = 0; i < L::kSets; ++i) {
    if (kCounts) to[i] = values[0];
    to[channels + i] = values[kCounts + 2 * i];
    to[2 * channels + i] = values[kCounts + 2 * i + 1];
  }
}

template <typename L>
ADVKD_INLINE void norm_moments(const NormParameters& p) {
  Walk w = first_position<L>(p);
  float moments[1 + 2 * L::kSets] = {};
  for (; w.sample < p.samples; advance(p, w)) {
    float x[L::kGroup];
    load<typename L::Type>(p.x, whole<L>(place_of<L>(p, w).single), x);
    add_moments<L>(x, moments);
  }
  write_partials<Combine, L>(p, w.channel, moments);
}

template <typename L>
ADVKD_INLINE void norm_sums(const NormParameters& p) {
  Walk w = first_position<L>(p);
  Channels<L::kSets> c = {};
  float sums[2 * L::kSets] = {};
  if (w.sample < p.samples) load_statistics<L>(p, w.channel, c);
  for (; w.sample < p.samples; advance(p, w)) {
    const Place place = place_of<L>(p, w);
    float normal[L::kGroup], d[L::kGroup];
    load_normalized<L>(p, place, c, normal);
    gradient_before<L>(p, place, w.channel, normal, c, d);
    if (p.out) store<typename L::Type>(p.out, whole<L>(place.single), d);
    for (int i = 0; i < L::kGroup; ++i) {
      sums[2 * L::set(i)] += d[i];
      sums[2 * L::set(i) + 1] += d[i] * normal[i];
    }
  }
  write_partials<Add, L>(p, w.channel, sums);
}

// A block per channel joins the parts.
template <typename Merge, int kFirst>
ADVKD_INLINE void norm_finish(const NormParameters& p) {
  const int channel = blockIdx.x, thread = threadIdx.x;
  float values[3 - kFirst] = {};
  for (int part = thread; part < p.parts; part += kThreads) {
    const float* from = p.partials + static_cast<i64>(part) * 3 * p.channels + channel;
    float other[3 - kFirst];
    for (int i = kFirst; i < 3; ++i) other[i - kFirst] = from[i * static_cast<i64>(p.channels)];
    Merge::merge(values, other);
  }
  block_reduce<Merge>(values, 1, kThreads);
  if (thread != 0) return;
  p.results[channel] = values[1 - kFirst];
  p.results[p.channels + static_cast<i64>(channel)] = kFirst ? values[1] : __fdiv_rn(values[2], values[0]);
}

extern "C" __global__ void __launch_bounds__(kThreads) advkd_norm_finish_moments(const NormParameters p) {
  norm_finish<Combine, 0>(p);
}
ADVKD_KERNEL(advkd_norm_finish_moments)

extern "C" __global__ void __launch_bounds__(kThreads) advkd_norm_finish_sums(const NormParameters p) {
  norm_finish<Add, 1>(p);
}
ADVKD_KERNEL(advkd_norm_finish_sums)

// Entry points by name, advkd_norm_<kind>_<planes or last>_<dtype>. Three blocks to a multiprocessor hide the memory's latency.
#ifndef ADVKD_VARIANTS
#define ADVKD_VARIANTS ADVKD_DTYPES
#endif
#define ADVKD_NORM_ENTRY(KIND, LAYOUT, LAST, T)                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 3) advkd_norm_##KIND##_##LAYOUT##_##T(const NormParameters p) { \
    if (p.group == 1)                                                                                                    \
      norm_##KIND<Layout<T, LAST, 1>>(p);                                                                                \
    else                                                                                                                 \
      norm_##KIND<Layout<T, LAST, 16 / sizeof(T::Bits)>>(p);                                                             \
  }                                                                                                                      \
  ADVKD_KERNEL(advkd_norm_##KIND##_##LAYOUT##_##T)
#define ADVKD_NORM_KIND(KIND, T) ADVKD_NORM_ENTRY(KIND, planes, false, T) ADVKD_NORM_ENTRY(KIND, last, true, T)
#define ADVKD_NORM_ENTRIES(T) \
  ADVKD_NORM_KIND(moments, T) ADVKD_NORM_KIND(act, T) ADVKD_NORM_KIND(sums, T) ADVKD_NORM_KIND(backward, T)
ADVKD_VARIANTS(ADVKD_NORM_ENTRIES)

}  // namespace advkd
