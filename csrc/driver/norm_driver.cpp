// Runs a training step's batch norm, LeakyReLU and up-sampling against scalar double-precision formulas on exactly sized buffers;
// no Torch. For sanitizers, emulated processors and instruction counts:
//
//   norm_driver                every case on the instruction set that ADVKD_ISA allows; exits with 1 if one fails
//   norm_driver count [NAME]   each pass (whose name holds NAME) once on 2 x 32 x 12 x 12, whole, for callgrind (see counted.h)

#include <cstdio>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/norm_act.h"
#include "driver/counted.h"
#include "driver/stored.h"

namespace {

using namespace advkd;

constexpr float kSlope = 0.25f, kUnit = 0x1p-24f;
constexpr double kEps = 1e-3;
int cases = 0, failures = 0;

struct Shape {
  i64 samples, channels, height, width;
  bool last;  // NHWC
  i64 plane() const { return height * width; }
  i64 all() const { return samples * channels * plane(); }
  // The place in memory of a value, here and in the tensor of twice the sides.
  i64 place(i64 n, i64 c, i64 row, i64 column, i64 scale = 1) const {
    const i64 h = scale * height, w = scale * width;
    return last ? ((n * h + row) * w + column) * channels + c : ((n * channels + c) * h + row) * w + column;
  }
};

template <typename Body>
void for_each(const Shape& s, const Body& body) {
  for (i64 n = 0; n < s.samples; ++n)
    for (i64 c = 0; c < s.channels; ++c)
      for (i64 row = 0; row < s.height; ++row)
        for (i64 column = 0; column < s.width; ++column) body(n, c, row, column);
}

void expect(double found, double wanted, double tolerance, const char* what) {
  if (std::abs(found - wanted) <= tolerance) return;
  if (failures++ < 10) std::printf("case %d, %s: %g, expected %g\n", cases, what, found, wanted);
}

// The error that storing a number may add; half precision's subnormal numbers are multiples of 2^-24.
double storing(Dtype dtype, double value) {
  return rounding(dtype) * std::abs(value) + (dtype == Dtype::float16 ? 0x1p-25 : 0);
}

NormAct pass_over(const Shape& s, Stored& x, bool upsample) {
  NormAct n{};
  n.x = x.data();
  n.dtype = x.dtype;
  n.groups = s.last ? 1 : s.channels;
  n.planes = s.last ? 1 : s.samples;
  n.channels = s.last ? s.channels : 1;
  n.height = s.last ? s.samples * s.height : s.height;
  n.width = s.width;
  n.upsample = upsample;
  n.slope = kSlope;
  n.eps = kEps;
  if (!upsample) {
    n.width *= n.height;
    n.height = 1;
  }
  return n;
}

// In two parts, as two threads do; whole where it is counted.
template <typename Kernel>
void run(const char* name, Kernel kernel, const NormAct& n) {
  const i64 pieces = norm_act_pieces(n);
  if (counter.active) return counter.run(name, n.groups * n.planes * n.height * n.width * n.channels, [&] { kernel(n, 0, pieces); });
  kernel(n, 0, pieces / 2);
  kernel(n, pieces / 2, pieces);
}

template <typename Kernel, typename Finish>
std::vector<float> sum(const char* name, Kernel kernel, Finish finish, NormAct n) {
  std::vector<double> partials(norm_act_partials(n), NAN);
  std::vector<float> results(2 * n.groups * n.channels, NAN);
  n.partials = partials.data();
  n.results = results.data();
  run(name, kernel, n);
  finish(n);
  return results;
}

struct Problem {
  Problem(const Shape& shape, Dtype dtype, bool up)
      : s(shape), upsample(up), scale(up ? 2 : 1), x(Stored::random(dtype, s.all(), 1)),
        gradient(Stored::random(dtype, s.all() * scale * scale, 2)), gamma(s.channels), beta(s.channels) {
    for (i64 c = 0; c < s.channels; ++c) {
      gamma[c] = 0.5f * (c % 5) - 0.75f;
      beta[c] = 0.03f * (c % 3 + 1);
    }
  }

  NormAct pass(const std::vector<float>& statistics, bool with_rows) {
    NormAct n = pass_over(s, x, with_rows);
    n.gamma = gamma.data();
    n.beta = beta.data();
    n.mean = statistics.data();
    n.variance = n.mean + s.channels;
    return n;
  }

  const Shape s;
  const bool upsample;
  const i64 scale;
  Stored x, gradient;
  std::vector<float> gamma, beta;
};

std::vector<float> check_moments(Problem& p) {
  const Shape& s = p.s;
  const NormAct n = pass_over(s, p.x, false);
  const std::vector<float> found = sum("norm_act_moments", ADVKD_DISPATCH(norm_act_moments), ADVKD_DISPATCH(norm_act_finish_moments), n);
  std::vector<double> mean(s.channels), variance(s.channels);
  const double count = s.samples * s.plane();
  for_each(s, [&](i64 i, i64 c, i64 row, i64 column) { mean[c] += p.x[s.place(i, c, row, column)] / count; });
  for_each(s, [&](i64 i, i64 c, i64 row, i64 column) {
    const double centred = p.x[s.place(i, c, row, column)] - mean[c];
    variance[c] += centred * centred / count;
  });
  // Values are below 2 and their squares below 4.
  for (i64 c = 0; c < s.channels; ++c) {
    expect(found[c], mean[c], 64 * kUnit * 2, "mean");
    expect(found[s.channels + c], variance[c], 64 * kUnit * 4, "variance");
  }
  return found;
}

// The value before LeakyReLU, and what is multiplied by gamma in it.
struct Before {
  double normalized, value;
};

Before before(const Problem& p, const std::vector<float>& statistics, i64 i, i64 c, i64 row, i64 column) {
  const double centred = p.x[p.s.place(i, c, row, column)] - statistics[c];
  const double normalized = centred / std::sqrt(statistics[p.s.channels + c] + kEps);
  return {normalized, p.gamma[c] * normalized + p.beta[c]};
}

void check_forward(Problem& p, const std::vector<float>& statistics, bool stream) {
  Stored y(p.x.dtype, p.s.all() * p.scale * p.scale);
  NormAct n = p.pass(statistics, p.upsample);
  n.out = y.data();
  n.stream = stream;
  run("norm_act", ADVKD_DISPATCH(norm_act), n);
  for_each(p.s, [&](i64 i, i64 c, i64 row, i64 column) {
    const Before b = before(p, statistics, i, c, row, column);
    const double wanted = b.value > 0 ? b.value : kSlope * b.value;
    const double size = std::abs(p.gamma[c] * b.normalized) + std::abs(p.beta[c]);
    for (i64 copy = 0; copy < p.scale * p.scale; ++copy) {
      const double found = y[p.s.place(i, c, p.scale * row + copy / 2, p.scale * column + copy % 2, p.scale)];
      expect(found, wanted, 16 * kUnit * size + storing(p.x.dtype, wanted), "y");
    }
  });
}

void check_backward(Problem& p, const std::vector<float>& statistics, bool keep, bool stream) {
  const Shape& s = p.s;
  Stored kept(p.x.dtype, s.all());
  NormAct n = p.pass(statistics, p.upsample);
  n.gradient = p.gradient.data();
  n.out = keep ? kept.data() : nullptr;
  n.stream = keep && stream;
  const char* name = keep ? "norm_act_sums, keeping d" : "norm_act_sums";
  const std::vector<float> sums = sum(name, ADVKD_DISPATCH(norm_act_sums), ADVKD_DISPATCH(norm_act_finish_sums), n);
  std::vector<float> means(2 * s.channels);
  for (i64 c = 0; c < 2 * s.channels; ++c) means[c] = 0.125f * (c % 7) - 0.25f;
  // From d in place where that was kept, else from the gradient.
  Stored dx = keep ? kept : Stored(p.x.dtype, s.all());
  NormAct m = p.pass(statistics, p.upsample && !keep);
  m.mean_d = means.data();
  m.mean_dx = m.mean_d + s.channels;
  m.masked = keep;
  m.gradient = keep ? dx.data() : p.gradient.data();
  m.out = dx.data();
  m.stream = !keep && stream;
  run(keep ? "norm_act_backward, from d" : "norm_act_backward", ADVKD_DISPATCH(norm_act_backward), m);

  std::vector<double> wanted(2 * s.channels), size(2 * s.channels);
  for_each(s, [&](i64 i, i64 c, i64 row, i64 column) {
    const Before b = before(p, statistics, i, c, row, column);
    double d = 0;
    for (i64 copy = 0; copy < p.scale * p.scale; ++copy)
      d += p.gradient[s.place(i, c, p.scale * row + copy / 2, p.scale * column + copy % 2, p.scale)];
    if (b.value <= 0) d *= kSlope;
    wanted[c] += d;
    wanted[s.channels + c] += d * b.normalized;
    size[c] += std::abs(d);
    size[s.channels + c] += std::abs(d * b.normalized);
    const i64 place = s.place(i, c, row, column);
    if (keep) expect(kept[place], d, storing(p.x.dtype, d), "d");
    if (keep) d = kept[place];
    const double factor = p.gamma[c] / std::sqrt(statistics[s.channels + c] + kEps);
    const double right = factor * (d - means[c] - b.normalized * means[s.channels + c]);
    const double terms = std::abs(factor) * (std::abs(d) + std::abs(means[c]) + std::abs(b.normalized * means[s.channels + c]));
    expect(dx[place], right, 16 * kUnit * terms + storing(p.x.dtype, right), "dx");
  });
  for (i64 c = 0; c < 2 * s.channels; ++c) expect(sums[c], wanted[c], 64 * kUnit * size[c], c < s.channels ? "dbeta" : "dgamma");
}

void check(const Shape& shape, Dtype dtype, bool upsample, bool stream) {
  ++cases;
  Problem p(shape, dtype, upsample);
  const std::vector<float> statistics = check_moments(p);
  check_forward(p, statistics, stream);
  for (const bool keep : {false, true}) check_backward(p, statistics, keep, stream);
}

int check_everything() {
  // Less than a vector; odd sides; whole vectors; planes of several runs, long rows; channels that are not repeated side by side,
  // many of them with few pixels, and a pixel of more elements than a run; several pieces of work.
  const Shape shapes[] = {{1, 1, 1, 2, false},   {2, 3, 5, 7, false},    {2, 64, 4, 8, false},   {3, 2, 40, 33, false},
                          {1, 1, 2, 2300, false}, {3, 130, 3, 5, false}, {2, 1100, 1, 3, false}, {5, 24, 20, 33, false}};
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (Shape shape : shapes)
    for (const bool last : {false, true})
      for (const bool upsample : {false, true})
        for (const Dtype dtype : dtypes) {
          shape.last = last;
          check(shape, dtype, upsample, cases % 2);
        }
  std::printf("%s: %d cases, %d failures\n", kIsaNames[static_cast<int>(current_isa())], cases, failures);
  return failures;
}

int count_everything() {
  const Shape shape{2, 32, 12, 12, true};
  const auto count = [](const char* variant, const Shape& s, Dtype dtype, bool upsample) {
    counter.variant = variant;
    check(s, dtype, upsample, false);
  };
  count("NHWC, float32", shape, Dtype::float32, false);
  count("NHWC, bfloat16", shape, Dtype::bfloat16, false);
  count("NHWC, float32, up-sampling", shape, Dtype::float32, true);
  count("NCHW, float32, up-sampling", {2, 32, 12, 12, false}, Dtype::float32, true);
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  return (starts_counting(argc, argv) ? count_everything() : check_everything()) ? 1 : 0;
}
