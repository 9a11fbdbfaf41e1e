// A training step's batch norm, LeakyReLU and nearest up-sampling: moments, forward pass, and the backward pass' sums and dx.
//
// Bound by memory: every pass reads and writes each tensor once, the results past the caches where they are larger. A run that
// fits the first-level cache is swept by columns: vectors a period of channels apart share weights and sums, which stay in
// registers. Four gradients are summed to, and a value repeated from, a buffer of one run. Moments are those of x minus the mean
// of the piece's first run, so that they lose nothing where the mean is large, in float32 over some hundred values and in double
// beyond. Products and sums are not contracted: every instruction set and number of threads gives the same bits.

#include "cpu/norm_act.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {
namespace {

template <bool kWhole, typename T>
inline V get(const T* p, i64 count) {
  if constexpr (kWhole) return load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <bool kWhole, typename T>
inline void put(T* p, V x, i64 count, bool stream = false) {
  const auto narrowed = narrow(x, p);
  if constexpr (!kWhole) {
    std::memcpy(p, &narrowed, count * sizeof(T));
  } else if (stream) {
    store_past_caches(p, narrowed);
  } else {
    std::memcpy(p, &narrowed, sizeof narrowed);
  }
}

// Some rows of a plane, or a part of one row.
struct Run {
  i64 row, pixel;     // the first, `row` among those of all planes
  i64 rows, pixels;
  i64 place, count;   // in elements of x
};

Run run_of(const NormAct& n, const NormTiling& t, i64 group, i64 index) {
  const i64 plane = index / t.plane_runs * n.groups + group, in_plane = index % t.plane_runs;
  const i64 row = in_plane / t.row_runs * t.rows, pixel = in_plane % t.row_runs * t.pixels;
  Run run;
  run.row = plane * n.height + row;
  run.pixel = pixel;
  run.rows = std::min(t.rows, n.height - row);
  run.pixels = std::min(t.pixels, n.width - pixel);
  run.place = (run.row * n.width + pixel) * n.channels;
  run.count = run.rows * run.pixels * n.channels;
  return run;
}

// Pixels of a group in the runs before this one.
i64 pixels_before(const NormAct& n, const NormTiling& t, i64 index) {
  const i64 in_plane = index % t.plane_runs, row = std::min(in_plane / t.row_runs * t.rows, n.height);
  const i64 pixel = std::min(in_plane % t.row_runs * t.pixels, n.width);
  return (index / t.plane_runs * n.height + row) * n.width + pixel;
}

struct Piece {
  Piece(const NormTiling& t, i64 item)
      : group(item / t.pieces), first(item % t.pieces * t.piece_runs), last(std::min(first + t.piece_runs, t.runs)) {}
  i64 group, first, last;  // runs first .. last - 1
};

// Whole vectors of columns, then what is left of one.
template <int kColumns, bool kWhole, typename Op>
inline void sweep_columns(const Op& op, i64 first, i64 column, i64 rows, i64 period, i64 lanes) {
  typename Op::State states[kColumns];
  for (int k = 0; k < kColumns; ++k) states[k] = op.template begin<kWhole>(column + k * kLanes, lanes);
  for (i64 row = 0; row < rows; ++row)
    for (int k = 0; k < kColumns; ++k)
      op.template step<kWhole>(states[k], first + row * period + column + k * kLanes, lanes);
  for (int k = 0; k < kColumns; ++k) op.template end<kWhole>(states[k], column + k * kLanes, lanes);
}

template <typename Op>
inline void sweep_rows(const Op& op, i64 first, i64 width, i64 rows, i64 period) {
  constexpr int kColumns = kLanes == 16 ? 4 : 2;
  i64 column = 0;
  for (; column + kColumns * kLanes <= width; column += kColumns * kLanes)
    sweep_columns<kColumns, true>(op, first, column, rows, period, kLanes);
  for (; column + kLanes <= width; column += kLanes) sweep_columns<1, true>(op, first, column, rows, period, kLanes);
  if (column < width) sweep_columns<1, false>(op, first, column, rows, period, width - column);
}

template <typename Op>
void sweep(const Op& op, i64 count, i64 period) {
  const i64 rows = count / period;
  if (rows) sweep_rows(op, 0, period, rows, period);
  if (count % period) sweep_rows(op, rows * period, count % period, 1, period);
}

// The channels' numbers, repeated over a period.
class Weights {
 public:
  Weights(const NormAct& n, const NormTiling& t)
      : mean(t.period), scale(t.period), beta(t.period), mean_d(t.period), slope_x(t.period), n_(n) {}

  void set(i64 group) {
    if (group == group_) return;
    group_ = group;
    for (i64 i = 0; i < n_.channels; ++i) {
      const i64 channel = group * n_.channels + i;
      const float inverse = inverse_deviation(n_, channel);
      mean[i] = n_.mean[channel];
      scale[i] = n_.gamma[channel] * inverse;
      beta[i] = n_.beta[channel];
      if (!n_.mean_d) continue;
      mean_d[i] = n_.mean_d[channel];
      slope_x[i] = n_.mean_dx[channel] * inverse;
    }
    for (std::vector<float>* weights : {&mean, &scale, &beta, &mean_d, &slope_x})
      for (size_t known = n_.channels; known < weights->size(); known *= 2)
        std::copy_n(weights->begin(), known, weights->begin() + known);
  }

  static float inverse_deviation(const NormAct& n, i64 channel) {
    return static_cast<float>(1 / std::sqrt(n.variance[channel] + n.eps));
  }

  std::vector<float> mean, scale, beta, mean_d, slope_x;  // slope_x: of d by the centred x

 private:
  const NormAct& n_;
  i64 group_ = -1;
};

// Two sums per column, in float32 over some rows, then in double.
class Sums {
 public:
  explicit Sums(i64 period) : first(period), second(period), first_(period), second_(period) {}

  void clear() {
    for (auto* sums : {&first_, &second_}) std::fill(sums->begin(), sums->end(), 0.0);
  }

  void swept(i64 count) {
    constexpr i64 kRows = 32;
    rows_ += count / static_cast<i64>(first.size()) + 1;
    if (rows_ >= kRows) flush();
  }

  // The sums of each channel.
  void fold(i64 channels, double* sums) {
    flush();
    for (i64 half = first.size() / 2; half >= channels; half /= 2)
      for (i64 i = 0; i < half; ++i) {
        first_[i] += first_[half + i];
        second_[i] += second_[half + i];
      }
    std::copy_n(first_.begin(), channels, sums);
    std::copy_n(second_.begin(), channels, sums + channels);
  }

  std::vector<float> first, second;

 private:
  void flush() {
    for (size_t i = 0; i < first.size(); ++i) {
      first_[i] += first[i];
      second_[i] += second[i];
      first[i] = second[i] = 0;
    }
    rows_ = 0;
  }

  std::vector<double> first_, second_;
  i64 rows_ = 0;
};

// Sums of x - pivot and of its squares.
template <typename X>
struct Moments {
  struct State {
    V pivot, sum, square;
  };
  const X* x;
  const float* pivot;
  Sums* sums;

  template <bool kWhole>
  State begin(i64 column, i64 lanes) const {
    return {
        get<kWhole>(pivot + column, lanes), get<kWhole>(&sums->first[column], lanes), get<kWhole>(&sums->second[column], lanes)};
  }
  template <bool kWhole>
  void step(State& s, i64 i, i64 lanes) const {
    const V d = get<kWhole>(x + i, lanes) - s.pivot;
    s.sum = s.sum + d;
    s.square = s.square + d * d;
  }
  template <bool kWhole>
  void end(const State& s, i64 column, i64 lanes) const {
    put<kWhole>(&sums->first[column], s.sum, lanes);
    put<kWhole>(&sums->second[column], s.square, lanes);
  }
};

template <typename X>
void make_moments(const NormAct& n, i64 begin, i64 end) {
  const NormTiling t(n);
  Sums sums(t.period);
  std::vector<float> pivot(t.period);
  for (i64 item = begin; item < end; ++item) {
    const Piece piece(t, item);
    double* partials = n.partials + item * 2 * n.channels;
    const auto add = [&](const Run& run) {
      sweep(Moments<X>{static_cast<const X*>(n.x) + run.place, pivot.data(), &sums}, run.count, t.period);
      sums.swept(run.count);
    };
    const Run first = run_of(n, t, piece.group, piece.first);
    std::fill(pivot.begin(), pivot.end(), 0.0f);
    sums.clear();
    add(first);
    sums.fold(n.channels, partials);
    for (i64 i = 0; i < t.period; ++i) pivot[i] = static_cast<float>(partials[i % n.channels] / (first.rows * first.pixels));
    sums.clear();
    for (i64 index = piece.first; index < piece.last; ++index) add(run_of(n, t, piece.group, index));
    sums.fold(n.channels, partials);
    // The mean, and the sum of squares around it.
    const double count = pixels_before(n, t, piece.last) - pixels_before(n, t, piece.first);
    for (i64 c = 0; c < n.channels; ++c) {
      const double shift = partials[c] / count;
      partials[n.channels + c] -= shift * partials[c];
      partials[c] = pivot[c] + shift;
    }
  }
}

template <typename X>
struct Forward {
  struct State {
    V mean, scale, beta;
  };
  const X* x;
  X* y;
  const Weights& w;
  float slope;
  bool stream;

  template <bool kWhole>
  State begin(i64 column, i64 lanes) const {
    return {get<kWhole>(&w.mean[column], lanes), get<kWhole>(&w.scale[column], lanes), get<kWhole>(&w.beta[column], lanes)};
  }
  template <bool kWhole>
  void step(State& s, i64 i, i64 lanes) const {
    const V before = (get<kWhole>(x + i, lanes) - s.mean) * s.scale + s.beta;
    put<kWhole>(y + i, before > 0.0f ? before : slope * before, lanes, stream);
  }
  template <bool kWhole>
  void end(const State&, i64, i64) const {}
};

inline void twice(const float* y, float* out) {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    const V x = load(y);
    store(out, __builtin_shufflevector(x, x, I / 2 ...));
    store(out + kLanes, __builtin_shufflevector(x, x, (kLanes + I) / 2 ...));
  }(std::make_index_sequence<kLanes>{});
}

template <typename Half>
inline void twice(const Half* y, Half* out) {
  const VU bits = __builtin_convertvector(*reinterpret_cast<const VHUnaligned*>(y), VU);
  const VU pair = bits << 16 | bits;
  std::memcpy(out, &pair, sizeof pair);
}

// Every pixel twice. Up to a vector beyond the pixels is read and two are written.
template <typename X>
void repeat_pixels(const X* y, i64 pixels, i64 channels, X* out) {
  if (channels == 1) {
    for (i64 i = 0; i < pixels; i += kLanes) twice(y + i, out + 2 * i);
    return;
  }
  constexpr i64 kElements = sizeof(V) / sizeof(X);
  for (i64 pixel = 0; pixel < pixels; ++pixel, y += channels)
    for (int copy = 0; copy < 2; ++copy, out += channels)
      for (i64 c = 0; c < channels; c += kElements) std::memcpy(out + c, y + c, sizeof(V));
}

template <typename X>
void copy_elements(const X* from, X* to, i64 count, bool stream) {
  i64 i = 0;
  constexpr i64 kElements = sizeof(V) / sizeof(X);
  if (stream && is_vector_aligned(to))
    for (; i + kElements <= count; i += kElements) {
      V bits;
      std::memcpy(&bits, from + i, sizeof bits);
      store_past_caches(reinterpret_cast<float*>(to + i), bits);
    }
  std::memcpy(to + i, from + i, (count - i) * sizeof(X));
}

// Whether every whole vector of a run at p can be stored past the caches.
bool streams(const NormAct& n, const NormTiling& t, const void* p) {
  return n.stream && is_vector_aligned(p) && t.period % kLanes == 0;
}

// Calls visit(group, run) for the runs of pieces begin .. end - 1.
template <typename Visit>
void for_each_run(const NormAct& n, const NormTiling& t, i64 begin, i64 end, const Visit& visit) {
  for (i64 item = begin; item < end; ++item) {
    const Piece piece(t, item);
    for (i64 index = piece.first; index < piece.last; ++index) visit(piece.group, run_of(n, t, piece.group, index));
  }
}

template <typename X>
void make_forward(const NormAct& n, i64 begin, i64 end) {
  const NormTiling t(n);
  Weights weights(n, t);
  const i64 room = t.rows * t.pixels * n.channels + 2 * kLanes;
  std::vector<X> value(n.upsample ? room : 0), repeated(n.upsample ? 2 * room + 2 * kLanes : 0);
  for_each_run(n, t, begin, end, [&](i64 group, const Run& run) {
    weights.set(group);
    const X* x = static_cast<const X*>(n.x) + run.place;
    if (!n.upsample) {
      X* y = static_cast<X*>(n.out) + run.place;
      sweep(Forward<X>{x, y, weights, n.slope, streams(n, t, y)}, run.count, t.period);
      return;
    }
    sweep(Forward<X>{x, value.data(), weights, n.slope, false}, run.count, t.period);
    const i64 size = run.pixels * n.channels, out_row = 2 * n.width * n.channels;
    for (i64 row = 0; row < run.rows; ++row) {
      repeat_pixels(value.data() + row * size, run.pixels, n.channels, repeated.data());
      X* y = static_cast<X*>(n.out) + 2 * (run.row + row) * out_row + 2 * run.pixel * n.channels;
      for (X* copy : {y, y + out_row}) copy_elements(repeated.data(), copy, 2 * size, n.stream);
    }
  });
  if (n.stream) order_stores();
}

// The sums of neighbours in a row of 2 * pixels are `out`, or are added to it.
template <bool kBegin, typename X>
void add_pairs(const X* row, i64 pixels, float* out) {
  i64 i = 0;
  for (; i + kLanes <= pixels; i += kLanes) {
    const V pair = sum_of_pairs(load(row + 2 * i), load(row + 2 * i + kLanes));
    store(out + i, kBegin ? pair : load(out + i) + pair);
  }
  for (; i < pixels; ++i) {
    const V two = get<false>(row + 2 * i, 2);
    out[i] = kBegin ? two[0] + two[1] : out[i] + (two[0] + two[1]);
  }
}

// Sums of four pixels of two rows, each of 2 * pixels. Up to a vector beyond the result is written.
template <typename X>
void sum_fours(const X* above, const X* below, i64 pixels, i64 channels, float* out) {
  if (channels == 1) {
    // One row after the other: together, rows of a kilobyte are no streams that the processor would read ahead.
    add_pairs<true>(above, pixels, out);
    add_pairs<false>(below, pixels, out);
    return;
  }
  for (i64 pixel = 0; pixel < pixels; ++pixel)
    for (i64 c = 0; c < channels; c += kLanes) {
      const i64 left = pixel * 2 * channels + c, right = left + channels, rest = 2 * pixels * channels - right;
      const V sum = rest >= kLanes ? (load(above + left) + load(above + right)) + (load(below + left) + load(below + right))
                                   : (get<false>(above + left, rest) + get<false>(above + right, rest)) +
                                         (get<false>(below + left, rest) + get<false>(below + right, rest));
      store(out + pixel * channels + c, sum);
    }
}

// The gradient by a run's values: as it is stored, or the sums of each value's four pixels.
template <typename X>
class Gradient {
 public:
  Gradient(const NormAct& n, const NormTiling& t) : n_(n), sums_(fours() ? t.rows * t.pixels * n.channels + kLanes : 0) {}

  bool fours() const { return n_.upsample && !n_.masked; }

  const X* stored(const Run& run) const { return static_cast<const X*>(n_.gradient) + run.place; }

  const float* summed(const Run& run) {
    const i64 out_row = 2 * n_.width * n_.channels;
    for (i64 row = 0; row < run.rows; ++row) {
      const X* above = static_cast<const X*>(n_.gradient) + 2 * (run.row + row) * out_row + 2 * run.pixel * n_.channels;
      sum_fours(above, above + out_row, run.pixels, n_.channels, sums_.data() + row * run.pixels * n_.channels);
    }
    return sums_.data();
  }

 private:
  const NormAct& n_;
  std::vector<float> sums_;
};

// Sums of d and of d (x - mean); G is the gradient's type, float where four were summed.
template <typename X, typename G>
struct GradientSums {
  struct State {
    V mean, scale, beta, sum, product;
  };
  const X* x;
  const G* gradient;
  X* kept;  // d, or null
  const Weights& w;
  Sums* sums;
  float slope;
  bool stream;

  template <bool kWhole>
  State begin(i64 column, i64 lanes) const {
    return {
        get<kWhole>(&w.mean[column], lanes), get<kWhole>(&w.scale[column], lanes), get<kWhole>(&w.beta[column], lanes),
        get<kWhole>(&sums->first[column], lanes), get<kWhole>(&sums->second[column], lanes)};
  }
  template <bool kWhole>
  void step(State& s, i64 i, i64 lanes) const {
    const V centred = get<kWhole>(x + i, lanes) - s.mean, g = get<kWhole>(gradient + i, lanes);
    const V d = centred * s.scale + s.beta > 0.0f ? g : slope * g;
    s.sum = s.sum + d;
    s.product = s.product + d * centred;
    if (kept) put<kWhole>(kept + i, d, lanes, stream);
  }
  template <bool kWhole>
  void end(const State& s, i64 column, i64 lanes) const {
    put<kWhole>(&sums->first[column], s.sum, lanes);
    put<kWhole>(&sums->second[column], s.product, lanes);
  }
};

template <typename X>
void make_sums(const NormAct& n, i64 begin, i64 end) {
  const NormTiling t(n);
  Weights weights(n, t);
  Gradient<X> gradient(n, t);
  Sums sums(t.period);
  for (i64 item = begin; item < end; ++item) {
    const Piece piece(t, item);
    weights.set(piece.group);
    sums.clear();
    for (i64 index = piece.first; index < piece.last; ++index) {
      const Run run = run_of(n, t, piece.group, index);
      const X* x = static_cast<const X*>(n.x) + run.place;
      X* kept = n.out ? static_cast<X*>(n.out) + run.place : nullptr;
      const bool stream = streams(n, t, kept);
      if (gradient.fours()) {
        sweep(GradientSums<X, float>{x, gradient.summed(run), kept, weights, &sums, n.slope, stream}, run.count, t.period);
      } else {
        sweep(GradientSums<X, X>{x, gradient.stored(run), kept, weights, &sums, n.slope, stream}, run.count, t.period);
      }
      sums.swept(run.count);
    }
    sums.fold(n.channels, n.partials + item * 2 * n.channels);
  }
  if (n.stream) order_stores();
}

// dx from d where kMasked, else from the gradient by the result.
template <typename X, typename G, bool kMasked>
struct Backward {
  struct State {
    V mean, scale, beta, mean_d, slope_x;
  };
  const X* x;
  const G* gradient;
  X* dx;
  const Weights& w;
  float slope;
  bool stream;

  template <bool kWhole>
  State begin(i64 column, i64 lanes) const {
    return {
        get<kWhole>(&w.mean[column], lanes), get<kWhole>(&w.scale[column], lanes), get<kWhole>(&w.beta[column], lanes),
        get<kWhole>(&w.mean_d[column], lanes), get<kWhole>(&w.slope_x[column], lanes)};
  }
  template <bool kWhole>
  void step(State& s, i64 i, i64 lanes) const {
    const V centred = get<kWhole>(x + i, lanes) - s.mean, g = get<kWhole>(gradient + i, lanes);
    const V d = kMasked || centred * s.scale + s.beta > 0.0f ? g : slope * g;
    put<kWhole>(dx + i, s.scale * ((d - s.mean_d) - centred * s.slope_x), lanes, stream);
  }
  template <bool kWhole>
  void end(const State&, i64, i64) const {}
};

template <typename X>
void make_backward(const NormAct& n, i64 begin, i64 end) {
  const NormTiling t(n);
  Weights weights(n, t);
  Gradient<X> gradient(n, t);
  for_each_run(n, t, begin, end, [&](i64 group, const Run& run) {
    weights.set(group);
    const X* x = static_cast<const X*>(n.x) + run.place;
    X* dx = static_cast<X*>(n.out) + run.place;
    const bool stream = streams(n, t, dx);
    if (n.masked) {
      sweep(Backward<X, X, true>{x, gradient.stored(run), dx, weights, n.slope, stream}, run.count, t.period);
    } else if (n.upsample) {
      sweep(Backward<X, float, false>{x, gradient.summed(run), dx, weights, n.slope, stream}, run.count, t.period);
    } else {
      sweep(Backward<X, X, false>{x, gradient.stored(run), dx, weights, n.slope, stream}, run.count, t.period);
    }
  });
  if (n.stream) order_stores();
}

using Kernel = void (*)(const NormAct&, i64, i64);
constexpr Kernel kMoments[] = {make_moments<float>, make_moments<bf16>, make_moments<f16>};
constexpr Kernel kForward[] = {make_forward<float>, make_forward<bf16>, make_forward<f16>};
constexpr Kernel kSums[] = {make_sums<float>, make_sums<bf16>, make_sums<f16>};
constexpr Kernel kBackward[] = {make_backward<float>, make_backward<bf16>, make_backward<f16>};

}  // namespace

void norm_act_moments(const NormAct& n, i64 begin, i64 end) {
  kMoments[static_cast<int>(n.dtype)](n, begin, end);
}

void norm_act(const NormAct& n, i64 begin, i64 end) {
  kForward[static_cast<int>(n.dtype)](n, begin, end);
}

void norm_act_sums(const NormAct& n, i64 begin, i64 end) {
  kSums[static_cast<int>(n.dtype)](n, begin, end);
}

void norm_act_backward(const NormAct& n, i64 begin, i64 end) {
  kBackward[static_cast<int>(n.dtype)](n, begin, end);
}

// Chan, Golub & LeVeque 1983: squares around the common mean are those around each piece's and those of the means around it.
void norm_act_finish_moments(const NormAct& n) {
  const NormTiling t(n);
  const i64 channels = n.channels, all = n.groups * channels;
  const double total = n.planes * n.height * n.width;
  std::vector<double> mean(channels), squares(channels);
  for (i64 group = 0; group < n.groups; ++group) {
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(squares.begin(), squares.end(), 0.0);
    // Calls add(pixels, means, squares) for the group's pieces.
    const auto visit = [&](const auto& add) {
      for (i64 item = group * t.pieces; item < (group + 1) * t.pieces; ++item) {
        const Piece piece(t, item);
        const double* partials = n.partials + item * 2 * channels;
        add(pixels_before(n, t, piece.last) - pixels_before(n, t, piece.first), partials, partials + channels);
      }
    };
    visit([&](double pixels, const double* means, const double*) {
      for (i64 c = 0; c < channels; ++c) mean[c] += pixels / total * means[c];
    });
    visit([&](double pixels, const double* means, const double* around) {
      for (i64 c = 0; c < channels; ++c) squares[c] += around[c] + pixels * (means[c] - mean[c]) * (means[c] - mean[c]);
    });
    for (i64 c = 0; c < channels; ++c) {
      n.results[group * channels + c] = static_cast<float>(mean[c]);
      n.results[all + group * channels + c] = static_cast<float>(squares[c] / total);
    }
  }
}

void norm_act_finish_sums(const NormAct& n) {
  const NormTiling t(n);
  const i64 channels = n.channels, all = n.groups * channels;
  std::vector<double> sums(2 * channels);
  for (i64 group = 0; group < n.groups; ++group) {
    const double* partials = n.partials + group * t.pieces * 2 * channels;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (i64 piece = 0; piece < t.pieces; ++piece)
      for (i64 i = 0; i < 2 * channels; ++i) sums[i] += partials[piece * 2 * channels + i];
    for (i64 c = 0; c < channels; ++c) {
      const i64 channel = group * channels + c;
      n.results[channel] = static_cast<float>(sums[c]);
      n.results[all + channel] = static_cast<float>(sums[channels + c] * Weights::inverse_deviation(n, channel));
    }
  }
}

}  // namespace advkd::ADVKD_ISA
