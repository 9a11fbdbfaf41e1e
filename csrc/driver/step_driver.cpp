// Runs the sampler step against a plain double-precision loop on exactly sized buffers; no Torch. For sanitizers, emulated
// processors and instruction counts (those of Philox's kernels too):
//
//   step_driver                every case on the instruction set that ADVKD_ISA allows; exits with 1 if one fails
//   step_driver count [NAME]   each kernel (whose name holds NAME) once, whole, for callgrind (see counted.h)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/philox.h"
#include "cpu/sampler_step.h"
#include "driver/counted.h"
#include "driver/stored.h"

namespace {

using namespace advkd;

int cases = 0, failures = 0;

struct Shape {
  i64 samples, channels, height, width, pool;
  bool last = false;  // channels_last
  i64 count() const { return channels * height * width; }
  // The place in memory of element e in NCHW order.
  i64 place(i64 e) const { return last ? e % (height * width) * channels + e / (height * width) : e; }
};

// Outputs begin at a vector of any instruction set, so that they can pass the caches.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const Aligned&) const { return true; }
};
using Bytes = std::vector<char, Aligned<char>>;

double read(const Bytes& bytes, Dtype dtype, i64 i) {
  if (dtype == Dtype::float32) {
    float x;
    std::memcpy(&x, bytes.data() + 4 * i, 4);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes.data() + 2 * i, 2);
  return half_value(bits, dtype == Dtype::bfloat16 ? 8 : 5);
}

// Numbers in [-2, 2) that every dtype holds exactly.
Bytes random_bytes(Dtype dtype, i64 count, u32 state) {
  Bytes bytes(count * element_bytes(dtype));
  for (i64 i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<int>(state >> 26) - 32) / 16;
    u32 bits;
    std::memcpy(&bits, &x, 4);
    const u32 exponent = (bits >> 23 & 0xFF) - 127 + 15, mantissa = bits >> 13 & 0x3FF;
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype == Dtype::float16) half = static_cast<std::uint16_t>(x == 0 ? 0 : (bits >> 16 & 0x8000) | exponent << 10 | mantissa);
    std::memcpy(bytes.data() + element_bytes(dtype) * i, dtype == Dtype::float32 ? static_cast<void*>(&bits) : &half, element_bytes(dtype));
  }
  return bytes;
}

double normal(u64 index, i64 element, PhiloxParameters p, i64 step) {
  u32 c[4] = {static_cast<u32>(element / 4), static_cast<u32>(index), static_cast<u32>(index >> 32), p.stream_step | static_cast<u32>(step)};
  philox_rounds(c, p.key0, p.key1);
  const u32* pair = c + (element % 4 < 2 ? 0 : 2);
  const double radius = std::sqrt(-2 * std::log(((pair[0] >> 8) + 1) * 0x1p-24));
  const double angle = 6.28318530717958647f * static_cast<float>((pair[1] >> 8) * 0x1p-24);
  return radius * (element % 2 ? std::sin(angle) : std::cos(angle));
}

void expect(double found, double wanted, double tolerance, const char* what) {
  if (std::abs(found - wanted) <= tolerance) return;
  if (failures++ < 10) std::printf("case %d, %s: %g, expected %g\n", cases, what, found, wanted);
}

// In two parts, as two threads do; whole where it is counted.
void run(const SamplerStep& s) {
  const SamplerStepKernel kernel = ADVKD_DISPATCH(sampler_step);
  const i64 pieces = s.samples * step_pieces_per_sample(s);
  if (counter.active) return counter.run("sampler_step", s.samples * s.planes * s.height * s.width, [&] { kernel(s, 0, pieces); });
  kernel(s, 0, pieces / 2);
  kernel(s, pieces / 2, pieces);
}

// Noise: 0 none, 1 a tensor, 2 drawn with one step number, 3 drawn with one per sample.
void check(const Shape& shape, Dtype dtype, Dtype model_dtype, int noise, bool stream, bool extended) {
  ++cases;
  const i64 count = shape.count(), all = shape.samples * count;
  const auto x = random_bytes(dtype, all, 1), m = random_bytes(model_dtype, all, 2), z = random_bytes(dtype, all, 4);
  const auto previous = random_bytes(dtype, all, 3), history = random_bytes(dtype, all, 5);
  Bytes out(all * element_bytes(dtype), -1), x0(all * element_bytes(dtype), -1);
  Bytes pooled(shape.pool ? all / (shape.pool * shape.pool) * element_bytes(dtype) : 0, -1);
  std::vector<std::int32_t> flags(shape.samples);
  std::vector<std::int64_t> indices(shape.samples), steps(shape.samples);
  std::vector<ExtendedStepRow> rows(shape.samples);
  for (i64 n = 0; n < shape.samples; ++n) {
    indices[n] = (n << 33) + 5;
    steps[n] = 7 + n;
    rows[n] = {{1.25f, -0.5f, 1.5f, 0.75f + n, 0.25f, 0.125f, -0.5f, 0.375f}, 0, 1, 0, 0};
    if (extended) rows[n] = {rows[n], -0.25f, 0.5f - n, 0.375f, 0.75f};
  }
  const std::vector<StepRow> plain(rows.begin(), rows.end());
  SamplerStep s{};
  s.x = x.data();
  s.model_output = m.data();
  s.previous_x0 = previous.data();
  s.history = extended ? history.data() : nullptr;
  s.noise = noise == 1 ? z.data() : nullptr;
  s.out = out.data();
  s.x0 = x0.data();
  s.pooled = shape.pool ? pooled.data() : nullptr;
  s.flags = flags.data();
  s.rows = extended ? static_cast<const void*>(rows.data()) : plain.data();
  s.row_count = shape.samples;
  s.indices = noise > 1 ? indices.data() : nullptr;
  s.steps = noise > 2 ? steps.data() : nullptr;
  s.step_count = shape.samples;
  s.philox = philox_parameters(-3, 1, noise > 2 ? 0 : 9, 0);
  s.samples = shape.samples;
  s.planes = shape.last ? 1 : shape.channels;
  s.height = shape.height;
  s.width = shape.width * (shape.last ? shape.channels : 1);
  s.channels = shape.last ? shape.channels : 1;
  s.pool = shape.pool;
  s.kernel = step_kernel(dtype, model_dtype, extended);
  s.stream = stream;
  run(s);

  const i64 r = std::max<i64>(shape.pool, 1), small_width = shape.width / r, small = count / (r * r);
  std::vector<double> sums(shape.samples * small);
  for (i64 n = 0; n < shape.samples; ++n)
    for (i64 e = 0; e < count; ++e) {
      const i64 i = n * count + shape.place(e);
      const ExtendedStepRow& c = rows[n];
      const double state = read(x, dtype, i), output = read(m, model_dtype, i);
      const double clean = std::clamp<double>(c.k_x * state + c.k_m * output, -c.clip, c.clip);
      double next = c.c_0 * clean + c.c_x * state + c.c_m * output + c.c_h * read(previous, dtype, i) + c.c_g * read(history, dtype, i);
      if (noise == 1) next += c.c_z * read(z, dtype, i);
      if (noise > 1) next += c.c_z * normal(indices[n], e, s.philox, noise > 2 ? steps[n] : 0);
      const double scale = std::abs(next) + 1;
      expect(read(out, dtype, i), next, rounding(dtype) * scale + 3e-6, "next state");
      const double stored = c.s_0 * clean + c.s_x * state + c.s_m * output;
      expect(read(x0, dtype, i), stored, rounding(dtype) * (std::abs(stored) + 1) + 1e-6, "stored");
      const i64 channel = e / (shape.height * shape.width), row = e / shape.width % shape.height, column = e % shape.width;
      sums[n * small + (channel * (shape.height / r) + row / r) * small_width + column / r] += next / (r * r);
    }
  const Shape reduced{shape.samples, shape.channels, shape.height / r, small_width, 0, shape.last};
  for (i64 n = 0; shape.pool && n < shape.samples; ++n)
    for (i64 e = 0; e < small; ++e)
      expect(read(pooled, dtype, n * small + reduced.place(e)), sums[n * small + e], rounding(dtype) * 4 + 3e-6, "pooled");
}

// x_next = x for every half there is: what is read is written, subnormal numbers and infinities too, and flags see the latter.
void check_all_halves(Dtype dtype) {
  ++cases;
  Bytes x(2 << 16), out(2 << 16);
  for (u32 bits = 0; bits < 1 << 16; ++bits) std::memcpy(x.data() + 2 * bits, &bits, 2);
  const StepRow row{0, 0, INFINITY, 0, 1, 0, 0, 0};
  std::vector<std::int32_t> flags(1 << 16);
  Bytes zero(2 << 16);
  SamplerStep s{};
  s.x = x.data();
  s.model_output = zero.data();
  s.out = out.data();
  s.flags = flags.data();
  s.rows = &row;
  s.row_count = 1;
  s.samples = 1 << 16;
  s.planes = s.height = s.width = s.channels = 1;
  s.kernel = step_kernel(dtype, dtype, false);
  ADVKD_DISPATCH(sampler_step)(s, 0, s.samples * step_pieces_per_sample(s));
  for (i64 i = 0; i < 1 << 16; ++i) {
    const double wanted = read(x, dtype, i), found = read(out, dtype, i);
    // k_x x is NaN where x is infinite, and so is the sum.
    const bool right = std::isfinite(wanted) ? wanted == found && !flags[i] : std::isnan(found) && flags[i];
    if (!right) expect(found, wanted, 0, "half");
  }
}

int check_everything() {
  // Less than a vector; odd sides; several pieces; rows of more than a vector; pools of one, two, odd, composite and all.
  const Shape shapes[] = {{1, 1, 1, 1, 0}, {2, 3, 5, 7, 0}, {2, 3, 40, 33, 0}, {1, 5, 64, 64, 0},   {2, 2, 4, 6, 1},
                          {2, 3, 8, 34, 2}, {1, 1, 32, 32, 32}, {2, 3, 9, 6, 3}, {1, 2, 12, 90, 6}, {1, 3, 8, 80, 4}};
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (Shape shape : shapes)
    for (const bool last : {false, true})
      for (int noise = 0; noise < 4; ++noise)
        for (const bool stream : {false, true})
          for (const bool extended : {false, true}) {
            shape.last = last;
            check(shape, dtypes[cases % 3], dtypes[cases / 3 % 3], noise, stream, extended);
          }
  check_all_halves(Dtype::bfloat16);
  check_all_halves(Dtype::float16);
  std::printf("%s: %d cases, %d failures\n", kIsaNames[static_cast<int>(current_isa())], cases, failures);
  return failures;
}

void count_philox() {
  constexpr i64 kCount = 4096, kTiles = kCount / (4 * kPhiloxTile);
  constexpr u64 kIndex = (u64{1} << 33) + 5;
  const PhiloxParameters p = philox_parameters(-3, 1, 9, kCount);
  std::vector<std::int64_t> words(kCount);
  std::vector<float> normals(kCount);
  const auto all_tiles = [&](auto kernel, auto* out) {
    return [=] {
      for (i64 tile = 0; tile < kTiles; ++tile) kernel(kIndex, tile, p, out);
    };
  };
  counter.variant = "int64";
  counter.run("philox_words", kCount, all_tiles(ADVKD_DISPATCH(philox_words), words.data()));
  counter.variant = "float32";
  counter.run("philox_normal", kCount, all_tiles(ADVKD_DISPATCH(philox_normal), normals.data()));
  for (i64 e = 0; e < kCount; ++e) {
    u32 c[4] = {static_cast<u32>(e / 4), static_cast<u32>(kIndex), static_cast<u32>(kIndex >> 32), p.stream_step};
    philox_rounds(c, p.key0, p.key1);
    expect(static_cast<double>(words[e]), c[e % 4], 0, "word");
    expect(normals[e], normal(kIndex, e, p, 0), 3e-6, "normal");
  }
}

int count_everything() {
  bool extended = false;
  const auto count = [&](const char* variant, int noise, Dtype dtype = Dtype::float32, i64 pool = 0, bool last = false) {
    counter.variant = variant;
    check({2, 3, 32, 32, pool, last}, dtype, dtype, noise, false, extended);
  };
  count("float32", 0);
  count("float32, noise given", 1);
  count("float32, noise drawn", 2);
  count("bfloat16, noise drawn", 2, Dtype::bfloat16);
  count("float16, noise drawn", 2, Dtype::float16);
  count("float32, NHWC, noise drawn", 2, Dtype::float32, 0, true);
  count("float32, pooled by 4", 0, Dtype::float32, 4);
  count("float32, NHWC, pooled by 4", 0, Dtype::float32, 4, true);
  extended = true;
  count("float32, extended", 0);
  count("bfloat16, extended", 0, Dtype::bfloat16);
  count_philox();
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  return (starts_counting(argc, argv) ? count_everything() : check_everything()) ? 1 : 0;
}
