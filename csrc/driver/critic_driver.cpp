// Runs the kernels of a critic's update against plain double-precision loops on exactly sized buffers; no Torch. For sanitizers,
// emulated processors and instruction counts:
//
//   critic_driver                every case on the instruction set that ADVKD_ISA allows; exits with 1 if one fails
//   critic_driver count [NAME]   each kernel (whose name holds NAME) once, whole, for callgrind (see counted.h)

#include <cstdio>
#include <string>

#include "cpu/conv_bias_act_mask.h"
#include "cpu/dispatch.h"
#include "cpu/image_gradient.h"
#include "cpu/interpolate.h"
#include "cpu/mask_mul.h"
#include "cpu/penalty_reduce.h"
#include "driver/counted.h"
#include "driver/stored.h"

namespace {

using namespace advkd;

constexpr float kSlope = 0.25f;
int cases = 0, failures = 0;

struct Shape {
  i64 samples, channels, plane;
  i64 count() const { return channels * plane; }
  i64 all() const { return samples * count(); }
  i64 mask_row() const { return (count() + 7) / 8; }
};

void expect(double found, double wanted, double tolerance, const char* what) {
  if (std::abs(found - wanted) <= tolerance) return;
  if (failures++ < 10) std::printf("case %d, %s: %g, expected %g\n", cases, what, found, wanted);
}

// In two parts, as two threads do; whole where it is counted.
template <typename Kernel, typename Job>
void run(const char* name, Kernel kernel, const Job& job) {
  const i64 elements = job.pieces.samples * job.pieces.count;
  if (counter.active) return counter.run(name, elements, [&] { kernel(job, 0, job.pieces.total()); });
  kernel(job, 0, job.pieces.total() / 2);
  kernel(job, job.pieces.total() / 2, job.pieces.total());
}

bool bit(const std::vector<std::uint8_t>& mask, const Shape& shape, i64 sample, i64 element) {
  return mask[sample * shape.mask_row() + element / 8] >> element % 8 & 1;
}

void check_bias_act_mask(const Shape& shape, Dtype dtype, bool with_bias, bool last, bool in_place) {
  ++cases;
  Stored p = Stored::random(dtype, shape.all(), 1), bias = Stored::random(dtype, shape.channels, 2), out(dtype, shape.all());
  if (in_place) out = p;
  std::vector<std::uint8_t> mask(shape.samples * shape.mask_row(), 0xFF);
  BiasActMask s{};
  s.p = in_place ? out.data() : p.data();
  s.bias = with_bias ? bias.data() : nullptr;
  s.out = out.data();
  s.mask = mask.data();
  s.slope = kSlope;
  s.channels = shape.channels;
  s.plane = last ? 1 : shape.plane;
  s.pieces = {shape.samples, shape.count(), with_bias ? bias_piece(s.channels, s.plane) : kPiece};
  s.dtype = dtype;
  run("conv_bias_act_mask", ADVKD_DISPATCH(conv_bias_act_mask), s);
  for (i64 n = 0; n < shape.samples; ++n)
    for (i64 e = 0; e < 8 * shape.mask_row(); ++e) {
      const bool inside = e < shape.count();
      const i64 i = n * shape.count() + e, channel = last ? e % shape.channels : e / shape.plane;
      const double y = inside ? p[i] + (with_bias ? bias[channel] : 0) : 0;
      expect(bit(mask, shape, n, e), y > 0, 0, "bit");
      if (inside) expect(out[i], y > 0 ? y : kSlope * y, 0, "activation");
    }
}

void check_mask_mul(const Shape& shape, Dtype dtype, bool in_place) {
  ++cases;
  Stored x = Stored::random(dtype, shape.all(), 3), out(dtype, shape.all());
  if (in_place) out = x;
  std::vector<std::uint8_t> mask(shape.samples * shape.mask_row());
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<std::uint8_t>(i * 2654435761u >> 13);
  MaskMul s{in_place ? out.data() : x.data(), mask.data(), out.data(), kSlope, {shape.samples, shape.count(), kPiece}, dtype};
  run("mask_mul", ADVKD_DISPATCH(mask_mul), s);
  for (i64 n = 0; n < shape.samples; ++n)
    for (i64 e = 0; e < shape.count(); ++e) {
      const i64 i = n * shape.count() + e;
      expect(out[i], bit(mask, shape, n, e) ? x[i] : kSlope * x[i], 0, "masked product");
    }
}

void check_penalty(const Shape& shape, Dtype dtype, PenaltyMode mode, bool in_place) {
  ++cases;
  Stored g = Stored::random(dtype, shape.all(), 4), out(dtype, shape.all());
  // The last of several samples is zero.
  const i64 zero = shape.samples > 1 ? shape.samples - 1 : shape.samples;
  std::memset(g.bytes.data() + zero * shape.count() * element_bytes(dtype), 0, (shape.samples - zero) * shape.count() * element_bytes(dtype));
  if (in_place) out = g;
  std::vector<float> penalties(shape.samples, NAN), factors(shape.samples, NAN);
  PenaltyReduce s{};
  s.pieces = {shape.samples, shape.count(), kPenaltyPiece};
  std::vector<double> sums(s.pieces.total(), NAN);
  s.g = in_place ? out.data() : g.data();
  s.out = out.data();
  s.penalties = penalties.data();
  s.sums = sums.data();
  s.factors = factors.data();
  s.target = 3;
  s.weight = 10;
  s.mode = mode;
  s.dtype = dtype;
  run("penalty_sums", ADVKD_DISPATCH(penalty_sums), s);
  for (i64 n = 0; n < shape.samples; ++n) finish_sample(s, n);
  run("penalty_scale", ADVKD_DISPATCH(penalty_scale), s);
  const double share = s.weight / static_cast<double>(shape.samples);
  for (i64 n = 0; n < shape.samples; ++n) {
    double sum = 0;
    for (i64 i = n * shape.count(); i < (n + 1) * shape.count(); ++i) sum += g[i] * g[i];
    const double norm = std::sqrt(sum);
    double excess = norm - s.target, factor = norm == 0 ? 0 : 2 * share * excess / norm, penalty = share * excess * excess;
    if (mode == PenaltyMode::one_sided && excess < 0) factor = penalty = 0;
    if (mode == PenaltyMode::r1) penalty = share / 2 * sum, factor = share;
    // Squares of these numbers are exact and so are their sums: what is rounded is the result.
    expect(penalties[n], penalty, 0x1p-24 * penalty, "penalty");
    for (i64 i = n * shape.count(); i < (n + 1) * shape.count(); ++i)
      expect(out[i], factor * g[i], (rounding(dtype) + 0x1p-22) * std::abs(factor * g[i]), "derivative");
  }
}

// Weights: 0 given, 1 drawn with one step number, 2 with a tensor of one, 3 with one per sample.
void check_interpolate(const Shape& shape, Dtype dtype, int weights, bool merge) {
  ++cases;
  Stored real = Stored::random(dtype, shape.all(), 5), fake = Stored::random(dtype, shape.all(), 6);
  Stored out(dtype, (merge ? 3 : 1) * shape.all());
  std::vector<float> a(shape.samples);
  std::vector<std::int64_t> indices(shape.samples), steps(weights == 2 ? 1 : shape.samples);
  for (i64 n = 0; n < shape.samples; ++n) {
    indices[n] = (n << 33) + 5;
    steps[std::min<i64>(n, steps.size() - 1)] = 7 + n;
  }
  Interpolate s{};
  s.real = real.data();
  s.fake = fake.data();
  s.a = weights ? nullptr : a.data();
  s.indices = weights ? indices.data() : nullptr;
  s.steps = weights > 1 ? steps.data() : nullptr;
  s.step_count = steps.size();
  s.philox = philox_parameters(-3, PhiloxStream::interpolation, weights > 1 ? 0 : 9, 0);
  s.out = out.data();
  s.merge = merge;
  s.pieces = {shape.samples, shape.count(), kPiece};
  s.dtype = dtype;
  for (i64 n = 0; n < shape.samples; ++n) {
    const i64 step = weights == 1 ? 9 : steps[weights == 2 ? 0 : n];
    const u32 stream = static_cast<u32>(PhiloxStream::interpolation) << 24;
    u32 c[4] = {0, static_cast<u32>(indices[n]), static_cast<u32>(indices[n] >> 32), stream | static_cast<u32>(step)};
    philox_rounds(c, s.philox.key0, s.philox.key1);
    a[n] = static_cast<float>((c[0] >> 8) * 0x1p-24);
  }
  run("interpolate", ADVKD_DISPATCH(interpolate), s);
  for (i64 i = 0; i < shape.all(); ++i) {
    const double weight = a[i / shape.count()], wanted = weight * real[i] + (1 - weight) * fake[i];
    expect(out[i + (merge ? 2 : 0) * shape.all()], wanted, rounding(dtype) * std::abs(wanted) + 0x1p-22, "point");
    if (merge) expect(out[i], real[i], 0, "real");
    if (merge) expect(out[i + shape.all()], fake[i], 0, "generated");
  }
}

int check_everything() {
  // One element; less than a byte; odd planes; one group; two channels per vector; planes of whole groups; a row that ends within
  // a byte; several pieces; more channels than a piece has elements; a sample of several sums.
  const Shape shapes[] = {{1, 1, 1},    {3, 1, 7},     {3, 3, 35},   {1, 1, 64},    {5, 16, 8}, {2, 5, 128},
                          {2, 9, 1089}, {1, 3, 4096}, {2, 2500, 3}, {2, 1, 40001}};
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (const Shape& shape : shapes)
    for (const Dtype dtype : dtypes)
      for (const bool flag : {false, true}) {
        check_bias_act_mask(shape, dtype, false, false, flag);
        check_bias_act_mask(shape, dtype, true, false, flag);
        check_bias_act_mask(shape, dtype, true, true, flag);
        check_mask_mul(shape, dtype, flag);
        for (int mode = 0; mode < 3; ++mode) check_penalty(shape, dtype, static_cast<PenaltyMode>(mode), flag);
        for (int weights = 0; weights < 4; ++weights) check_interpolate(shape, dtype, weights, flag);
      }
  std::printf("%s: %d cases, %d failures\n", kIsaNames[static_cast<int>(current_isa())], cases, failures);
  return failures;
}

// The transposed convolution, 4 x 4 with stride 2, down to 16 x 16 images of three channels.
void count_image_gradient(i64 features) {
  constexpr i64 kImages = 2, kSide = 16, kRows = 8, kChannels = 3, kKernel = 4, kStride = 2, kPadding = 1;
  Stored d = Stored::random(Dtype::float32, kImages * kRows * kRows * features, 7);
  Stored weights = Stored::random(Dtype::float32, kKernel * kKernel * kChannels * features, 8);
  Stored out(Dtype::float32, kImages * kSide * kSide * kChannels);
  const auto floats = [](Stored& s) { return static_cast<float*>(s.data()); };
  const ImageGradient s{floats(d), floats(weights), floats(out), kImages, kSide, kSide, kRows, kRows, features,
                        kChannels, {kKernel, kKernel}, {kStride, kStride}, {kPadding, kPadding}, {1, 1}};
  std::vector<double> wanted(kImages * kSide * kSide * kChannels);
  for (i64 row = 0; row < kImages * kRows; ++row)
    for (i64 column = 0; column < kRows; ++column)
      for (i64 tap = 0; tap < kKernel * kKernel; ++tap) {
        const i64 y = kStride * (row % kRows) + tap / kKernel - kPadding, x = kStride * column + tap % kKernel - kPadding;
        if (y < 0 || y >= kSide || x < 0 || x >= kSide) continue;
        for (i64 k = 0; k < kChannels * features; ++k)
          wanted[((row / kRows * kSide + y) * kSide + x) * kChannels + k / features] +=
              d[(row * kRows + column) * features + k % features] * weights[tap * kChannels * features + k];
      }
  const ImageGradientKernel kernel = ADVKD_DISPATCH(image_gradient);
  counter.run("image_gradient", static_cast<i64>(wanted.size()), [&] { kernel(s, 0, kImages * kSide); });
  // Sums of multiples of 2^-8 below 2^16: exact.
  for (size_t i = 0; i < wanted.size(); ++i) expect(out[static_cast<i64>(i)], wanted[i], 0, "image gradient");
}

int count_everything() {
  const Shape shape{2, 32, 256};
  const auto variant = [](const std::string& text) { counter.variant = text; };
  const std::string names[] = {"float32", "bfloat16", "float16"};
  for (int i = 0; i < 3; ++i) {
    const Dtype dtype = static_cast<Dtype>(i);
    variant("NCHW, " + names[i]), check_bias_act_mask(shape, dtype, true, false, false);
    variant("NHWC, " + names[i]), check_bias_act_mask(shape, dtype, true, true, false);
    variant(names[i]), check_mask_mul(shape, dtype, false);
    check_penalty(shape, dtype, PenaltyMode::two_sided, false);
    check_interpolate(shape, dtype, 0, false);
  }
  variant("float32, no bias"), check_bias_act_mask(shape, Dtype::float32, false, false, false);
  variant("float32, weights drawn, three parts"), check_interpolate(shape, Dtype::float32, 3, true);
  variant("float32, 64 features"), count_image_gradient(64);
  variant("float32, 35 features"), count_image_gradient(35);
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  return (starts_counting(argc, argv) ? count_everything() : check_everything()) ? 1 : 0;
}
