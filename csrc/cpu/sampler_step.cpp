// One step of a diffusion sampler: x0 = clamp(k_x x + k_m m), x_next = c_0 x0 + c_x x + c_m m + c_h x0_prev + c_g history
// + c_z z, stored = s_0 x0 + s_x x + s_m m. Plain steps have no history and store x0: they are instances of their own.
//
// Bound by memory, so that all happens in one pass: a piece's noise is drawn into a buffer of the first-level cache, then
// every pair of vectors is loaded, combined and stored, past the caches where the result is larger than they are. With
// pooling a piece is a strip of r rows: their sum over rows stays in a row of column sums, which is then summed over columns.
// Products and sums in the reference's order and without contraction: every instruction set gives the same bits.

#include "cpu/sampler_step.h"

#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/normals.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Coefficients {
  using Row = StepRow;
  static constexpr bool kExtended = false;
  explicit Coefficients(const StepRow& r)
      : k_x(splat(r.k_x)), k_m(splat(r.k_m)), clip(splat(r.clip)), c_0(splat(r.c_0)), c_x(splat(r.c_x)), c_m(splat(r.c_m)),
        c_h(splat(r.c_h)), c_z(splat(r.c_z)) {}
  V k_x, k_m, clip, c_0, c_x, c_m, c_h, c_z;
};

struct ExtendedCoefficients : Coefficients {
  using Row = ExtendedStepRow;
  static constexpr bool kExtended = true;
  explicit ExtendedCoefficients(const ExtendedStepRow& r)
      : Coefficients(r), c_g(splat(r.c_g)), s_0(splat(r.s_0)), s_x(splat(r.s_x)), s_m(splat(r.s_m)) {}
  V c_g, s_0, s_x, s_m;
};

// The smallest magnitude that is infinite once stored.
constexpr float overflow(const float*) { return __builtin_inff(); }
constexpr float overflow(const bf16*) { return 0x1.FFp127f; }
constexpr float overflow(const f16*) { return 65520.0f; }

// Two vectors that are combined together: even and odd elements where the states are bfloat16, else neighbouring halves.
struct Pair {
  V a, b;
};
constexpr i64 kPair = 2 * kLanes;
template <typename X>
constexpr bool kEvenOdd = std::is_same_v<X, bf16>;

inline Pair operator+(Pair x, Pair y) {
  return {x.a + y.a, x.b + y.b};
}

inline Pair operator*(V c, Pair x) {
  return {c * x.a, c * x.b};
}

// In this form a NaN survives.
inline V clamp(V x, V limit) {
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}

template <std::size_t... I>
inline Pair evens_and_odds(V a, V b, std::index_sequence<I...>) {
  return {__builtin_shufflevector(a, b, 2 * I...), __builtin_shufflevector(a, b, 2 * I + 1 ...)};
}

template <std::size_t... I>
inline Pair halves(V evens, V odds, std::index_sequence<I...>) {
  constexpr int kHalf = kLanes / 2;
  return {__builtin_shufflevector(evens, odds, (I / 2 + I % 2 * kLanes)...),
          __builtin_shufflevector(evens, odds, (kHalf + I / 2 + I % 2 * kLanes)...)};
}

constexpr auto kEach = std::make_index_sequence<kLanes>{};

// Past the end a pair is made of zeros. X is the dtype of the states.
template <bool kWhole, typename X, typename T>
inline Pair get(const T* p, i64 count) {
  if constexpr (!kWhole) {
    T part[kPair] = {};
    std::memcpy(part, p, count * sizeof(T));
    return get<true, X>(part, kPair);
  } else if constexpr (kEvenOdd<X> && kEvenOdd<T>) {
    Pair pair;
    load_even_odd(p, pair.a, pair.b);
    return pair;
  } else if constexpr (kEvenOdd<X>) {
    return evens_and_odds(load(p), load(p + kLanes), kEach);
  } else {
    return {load(p), load(p + kLanes)};
  }
}

template <typename T, typename Vector>
inline void put_vector(T* p, Vector x, bool stream) {
  if (stream)
    store_past_caches(p, x);
  else
    std::memcpy(p, &x, sizeof x);
}

template <bool kWhole, typename X, typename T>
inline void put(T* p, Pair x, i64 count, bool stream) {
  static_assert(!kEvenOdd<T> || kEvenOdd<X>);
  if constexpr (!kWhole) {
    T part[kPair];
    put<true, X>(part, x, kPair, false);
    std::memcpy(p, part, count * sizeof(T));
  } else if constexpr (kEvenOdd<T>) {
    put_vector(p, narrow_even_odd(x.a, x.b), stream);
  } else {
    if constexpr (kEvenOdd<X>) x = halves(x.a, x.b, kEach);
    put_vector(p, narrow(x.a, p), stream);
    put_vector(p + kLanes, narrow(x.b, p), stream);
  }
}

// Neighbouring elements of one sample.
template <typename X, typename M>
struct Run {
  const X* x;
  const M* model_output;
  const X* previous_x0;
  const X* history;
  const X* noise;
  const float* drawn;
  X* out;
  X* x0;
  float* sums;  // column sums of a strip, or null
  bool first;   // row of the strip
  bool stream;
  bool check;  // for infinities and NaN
};

// A pair of a run, from element i on; true lanes of the result are not finite (where that is looked for).
template <bool kWhole, typename X, typename M, typename C>
inline VI combine(const Run<X, M>& run, const C& c, i64 i, i64 count) {
  const Pair x = get<kWhole, X>(run.x + i, count), m = get<kWhole, X>(run.model_output + i, count);
  Pair clean = c.k_x * x + c.k_m * m;
  clean = {clamp(clean.a, c.clip), clamp(clean.b, c.clip)};
  Pair next = c.c_0 * clean + c.c_x * x + c.c_m * m;
  if (run.previous_x0) next = next + c.c_h * get<kWhole, X>(run.previous_x0 + i, count);
  if constexpr (C::kExtended)
    if (run.history) next = next + c.c_g * get<kWhole, X>(run.history + i, count);
  if (run.noise) next = next + c.c_z * get<kWhole, X>(run.noise + i, count);
  if (run.drawn) next = next + c.c_z * get<kWhole, X>(run.drawn + i, count);
  put<kWhole, X>(run.out + i, next, count, run.stream);
  Pair stored = clean;
  if constexpr (C::kExtended) stored = c.s_0 * clean + c.s_x * x + c.s_m * m;
  if (run.x0) put<kWhole, X>(run.x0 + i, stored, count, run.stream);
  if (run.sums) put<kWhole, X>(run.sums + i, run.first ? next : next + get<kWhole, X>(run.sums + i, count), count, false);
  if (!run.check) return VI{};
  const V limit = splat(overflow(run.out));
  return !(next.a < limit && -next.a < limit && next.b < limit && -next.b < limit);
}

template <typename X, typename M, typename C>
bool is_finite_run(const Run<X, M>& run, const C& c, i64 count) {
  VI wrong{};
  i64 i = 0;
  for (; i + kPair <= count; i += kPair) wrong |= combine<true>(run, c, i, kPair);
  if (i < count) wrong |= combine<false>(run, c, i, count - i);
  std::int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= wrong[lane];
  return any == 0;
}

// The noise of one piece's samples, in the order of memory.
class Noise {
 public:
  Noise(const SamplerStep& s, i64 largest) : s_(s) {
    if (s.indices) logical_.resize(largest + 4 + 4 * kLanes);
    if (s.indices && s.channels > 1) stored_.resize(largest);
  }

  // Elements begin .. begin + count - 1 of a sample's memory; null where no noise is drawn.
  const float* draw(i64 sample, i64 begin, i64 count) {
    if (!s_.indices) return nullptr;
    if (s_.channels == 1) return logical(sample, begin, count);
    const i64 channels = s_.channels, plane = s_.height * s_.width / channels;
    for (i64 channel = 0; channel < channels; ++channel) {
      const float* run = logical(sample, channel * plane + begin / channels, count / channels);
      for (i64 pixel = 0; pixel < count / channels; ++pixel) stored_[pixel * channels + channel] = run[pixel];
    }
    return stored_.data();
  }

 private:
  // Elements in NCHW order: block j makes 4j .. 4j + 3 of them.
  const float* logical(i64 sample, i64 begin, i64 count) {
    PhiloxParameters p = s_.philox;
    if (s_.steps) p.stream_step |= static_cast<u32>(s_.steps[s_.step_count > 1 ? sample : 0]);
    const i64 skipped = begin % 4;
    for (i64 i = 0; i < skipped + count; i += 4 * kLanes)
      draw_normals(static_cast<u64>(s_.indices[sample]), static_cast<u32>((begin + i) / 4), p, logical_.data() + i);
    return logical_.data() + skipped;
  }

  const SamplerStep& s_;
  std::vector<float> logical_, stored_;
};

// Pairs of pixels become one; reads are ahead of writes.
template <i64 kChannels>
void halve_pixels(float* sums, i64 pixels, i64 channels) {
  if constexpr (kChannels > 0) channels = kChannels;
  i64 i = 0;
  if constexpr (kChannels == 1)
    for (; i + kLanes <= pixels / 2; i += kLanes)
      store(sums + i, sum_of_pairs(load(sums + 2 * i), load(sums + 2 * i + kLanes)));
  for (; i < pixels / 2; ++i) {
    const float* pair = sums + 2 * i * channels;
    for (i64 c = 0; c < channels; ++c) sums[i * channels + c] = pair[c] + pair[channels + c];
  }
}

void halve(float* sums, i64 pixels, i64 channels) {
  const auto known = channels == 1 ? halve_pixels<1> : channels == 3 ? halve_pixels<3> : halve_pixels<0>;
  known(sums, pixels, channels);
}

// Each of `pixels / r` pixels is the sum of r neighbours.
void sum_neighbours(float* sums, i64 r, i64 pixels, i64 channels) {
  for (i64 pixel = 0; pixel < pixels / r; ++pixel)
    for (i64 c = 0; c < channels; ++c) {
      float sum = 0;
      for (i64 i = 0; i < r; ++i) sum += sums[(pixel * r + i) * channels + c];
      sums[pixel * channels + c] = sum;
    }
}

// The averages over r x r pixels from a strip's column sums, which are used up.
template <typename X>
void average(const SamplerStep& s, float* sums, X* pooled) {
  i64 r = s.pool, pixels = s.width / s.channels;
  for (; r % 2 == 0; r /= 2, pixels /= 2) halve(sums, pixels, s.channels);
  if (r > 1) sum_neighbours(sums, r, pixels, s.channels);
  const V scale = splat(1.0f / static_cast<float>(s.pool * s.pool));
  const i64 count = pixels / r * s.channels;
  const bool stream = s.stream && is_vector_aligned(pooled);
  i64 i = 0;
  for (; i + kPair <= count; i += kPair) put<true, X>(pooled + i, scale * get<true, X>(sums + i, kPair), kPair, stream);
  if (i < count) put<false, X>(pooled + i, scale * get<false, X>(sums + i, count - i), count - i, false);
}

template <typename T>
T* at(const void* base, i64 place) {
  return base ? static_cast<T*>(const_cast<void*>(base)) + place : nullptr;
}

template <typename C, typename X, typename M>
void make_pieces(const SamplerStep& s, i64 begin, i64 end) {
  const i64 piece = step_piece(s), pieces = step_pieces_per_sample(s), sample_size = s.planes * s.height * s.width;
  const i64 run_size = s.pool ? s.width : piece;
  Noise noise(s, run_size);
  std::vector<float> sums(s.pool ? s.width : 0);
  for (i64 item = begin; item < end; ++item) {
    const i64 sample = item / pieces, offset = item % pieces * piece;
    const i64 limit = offset + piece < sample_size ? offset + piece : sample_size;
    const C c(static_cast<const typename C::Row*>(s.rows)[s.row_count > 1 ? sample : 0]);
    for (i64 start = offset; start < limit; start += run_size) {
      const i64 place = sample * sample_size + start, count = start + run_size < limit ? run_size : limit - start;
      Run<X, M> run;
      run.x = at<X>(s.x, place);
      run.model_output = at<M>(s.model_output, place);
      run.previous_x0 = at<X>(s.previous_x0, place);
      if constexpr (C::kExtended) run.history = at<X>(s.history, place);
      run.noise = at<X>(s.noise, place);
      run.drawn = noise.draw(sample, start, count);
      run.out = at<X>(s.out, place);
      run.x0 = at<X>(s.x0, place);
      run.sums = s.pool ? sums.data() : nullptr;
      run.first = start == offset;
      run.check = s.flags != nullptr;
      run.stream = s.stream && is_vector_aligned(run.out) && (!run.x0 || is_vector_aligned(run.x0));
      if (!is_finite_run(run, c, count)) __atomic_store_n(s.flags + sample, 1, __ATOMIC_RELAXED);
    }
    const i64 strip = item % pieces, strip_size = s.pool ? s.width / s.pool : 0;
    if (s.pool) average(s, sums.data(), static_cast<X*>(s.pooled) + (sample * pieces + strip) * strip_size);
  }
  if (s.stream) order_stores();
}

using Kernel = void (*)(const SamplerStep&, i64, i64);
using P = Coefficients;
using E = ExtendedCoefficients;
// In the order of step_kernel.
constexpr Kernel kKernels[18] = {
    make_pieces<P, float, float>, make_pieces<P, float, bf16>, make_pieces<P, float, f16>,
    make_pieces<P, bf16, float>,  make_pieces<P, bf16, bf16>,  make_pieces<P, bf16, f16>,
    make_pieces<P, f16, float>,   make_pieces<P, f16, bf16>,   make_pieces<P, f16, f16>,
    make_pieces<E, float, float>, make_pieces<E, float, bf16>, make_pieces<E, float, f16>,
    make_pieces<E, bf16, float>,  make_pieces<E, bf16, bf16>,  make_pieces<E, bf16, f16>,
    make_pieces<E, f16, float>,   make_pieces<E, f16, bf16>,   make_pieces<E, f16, f16>};

}  // namespace

void sampler_step(const SamplerStep& s, i64 begin, i64 end) {
  kKernels[s.kernel](s, begin, end);
}

}  // namespace advkd::ADVKD_ISA
