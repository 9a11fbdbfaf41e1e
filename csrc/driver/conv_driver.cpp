// Runs every kernel of the student's convolution, and whole students, against a plain double-precision loop; no Torch. For
// sanitizers, emulated processors and instruction counts:
//
//   conv_driver                every shape on the instruction set that ADVKD_ISA allows; exits with 1 if one fails
//   conv_driver count [NAME]   each kernel (whose name holds NAME) once on one thread, for callgrind (see counted.h)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/student_forward.h"
#include "driver/counted.h"

namespace {

using namespace advkd;

const Parallel kThreads = [](i64 workers, const std::function<void(i64)>& body) {
  std::vector<std::thread> threads;
  for (i64 worker = 1; worker < workers; ++worker) threads.emplace_back(body, worker);
  body(0);
  for (auto& thread : threads) thread.join();
};

float uniform(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
}

std::vector<float> random_floats(i64 count, float scale, std::uint32_t seed) {
  std::vector<float> x(count);
  for (float& value : x) value = scale * uniform(seed);
  return x;
}

float as_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

double read(const std::vector<char>& bytes, Storage storage, i64 i) {
  float x = 0;
  if (storage == Storage::float32) {
    std::memcpy(&x, bytes.data() + 4 * i, 4);
  } else {
    std::uint16_t half;
    std::memcpy(&half, bytes.data() + 2 * i, 2);
    const std::uint32_t bits = std::uint32_t{half} << 16;
    std::memcpy(&x, &bits, 4);
  }
  return x;
}

double activate(double x, const ConvLayer& layer) {
  if (layer.activation == Activation::leaky_relu) return x > 0 ? x : static_cast<double>(layer.slope) * x;
  return layer.activation == Activation::tanh ? std::tanh(x) : x;
}

// y = act(conv3x3(up(x)) + bias) as it is written; planar.
std::vector<double> naive(const ConvLayer& layer, const std::vector<double>& x, const std::vector<float>& w, const std::vector<float>& bias, i64 images) {
  const i64 s = layer.scale(), height = s * layer.height, width = s * layer.width;
  std::vector<double> y(images * layer.c_out * height * width);
  for (i64 n = 0; n < images; ++n)
    for (i64 o = 0; o < layer.c_out; ++o)
      for (i64 i = 0; i < height; ++i)
        for (i64 j = 0; j < width; ++j) {
          double sum = bias[o];
          for (i64 c = 0; c < layer.c_in; ++c)
            for (i64 a = -1; a <= 1; ++a)
              for (i64 b = -1; b <= 1; ++b)
                if (i + a >= 0 && i + a < height && j + b >= 0 && j + b < width)
                  sum += x[((n * layer.c_in + c) * layer.height + (i + a) / s) * layer.width + (j + b) / s] *
                      static_cast<double>(w[((o * layer.c_in + c) * 3 + a + 1) * 3 + b + 1]);
          y[((n * layer.c_out + o) * height + i) * width + j] = activate(sum, layer);
        }
  return y;
}

struct Layer {
  ConvLayer conv;
  i64 detail;
  std::vector<float> weight, bias;
  std::vector<char> packed;
};

Layer make_layer(const ConvKernels& kernels, const ConvLayer& conv, i64 detail, std::uint32_t seed) {
  const float scale = std::sqrt(1.0f / static_cast<float>(conv.c_in));
  Layer layer{conv, detail, random_floats(conv.c_out * conv.c_in * 9, scale, seed), random_floats(conv.c_out, 1, seed + 1), {}};
  layer.packed.resize(kernels.packed_bytes(conv));
  kernels.pack(conv, layer.weight.data(), layer.bias.data(), layer.packed.data());
  return layer;
}

int failures = 0;

// A coarse bound that catches what is wrong, not what is imprecise: numbers of order 1, float32's or bfloat16's rounding as the
// transforms enlarge it. The element-by-element bounds are in tests/ops/test_conv_block.py.
double tolerance(const ConvLayer& layer) {
  const double growth = layer.tile() == 6 ? 64 : layer.tile() == 4 ? 16 : 4;
  return layer.storage == Storage::float32 ? growth * 0x1p-24 * 16 : (layer.products() == Storage::float32 ? 1 : 2) * 0x1p-5;
}

void check(const char* what, const ConvLayer& layer, double error, double bound) {
  if (error <= bound) return;  // false for a NaN too
  ++failures;
  std::printf("FAILED %s: %lld -> %lld, %lld x %lld, up %d, activation %d, storage %d, algorithm %d: error %g, bound %g\n", what, layer.c_in, layer.c_out, layer.height, layer.width, layer.upsample, static_cast<int>(layer.activation), static_cast<int>(layer.storage), static_cast<int>(layer.algorithm), error, bound);
}

double largest_difference(const std::vector<char>& found, Storage storage, const std::vector<double>& wanted) {
  double largest = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::abs(read(found, storage, static_cast<i64>(i)) - wanted[i]);
    // An element that no kernel wrote is a NaN still.
    if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, error);
  }
  return largest;
}

std::vector<char> poisoned(i64 bytes) {
  return std::vector<char>(bytes, static_cast<char>(0xFF));  // a NaN in either storage
}

void check_layer(const ConvKernels& kernels, const ConvLayer& conv, i64 images) {
  const Layer layer = make_layer(kernels, conv, 0, 1);
  std::vector<float> x = random_floats(images * conv.c_in * conv.height * conv.width, 1, 7);
  std::vector<double> exact(x.begin(), x.end());
  if (conv.storage == Storage::bfloat16)
    for (double& value : exact) value = as_bfloat16(static_cast<float>(value));
  const std::vector<double> wanted = naive(conv, exact, layer.weight, layer.bias, images);
  std::vector<char> first;
  for (const i64 threads : {1, 3}) {
    std::vector<char> found = poisoned(static_cast<i64>(wanted.size()) * element_bytes(conv.storage));
    conv_block_forward(kernels, conv, layer.packed.data(), x.data(), images, found.data(), threads, kThreads);
    check("value", conv, largest_difference(found, conv.storage, wanted), tolerance(conv));
    if (first.empty()) first = found;
    check("threads change bits", conv, found == first ? 0 : 1, 0);
  }
}

// A small student: two up-samplings, detail noise, an odd number of channels.
void check_student(const ConvKernels& kernels, Storage storage, Algorithm algorithm, i64 detail, i64 side) {
  const auto conv = [&](i64 c_in, i64 c_out, i64 at, bool up) {
    return ConvLayer{c_in, c_out, at, at, up, Activation::leaky_relu, 0.2f, storage, algorithm};
  };
  std::vector<Layer> layers;
  layers.push_back(make_layer(kernels, conv(5, 24, side, false), 0, 1));
  layers.push_back(make_layer(kernels, conv(24 + detail, 17, side, true), detail, 2));
  layers.push_back(make_layer(kernels, conv(17, 16, 2 * side, false), 0, 3));
  layers.push_back(make_layer(kernels, conv(16 + detail, 8, 2 * side, true), detail, 4));
  layers.push_back(make_layer(kernels, {8, 3, 4 * side, 4 * side, false, Activation::tanh, 0.2f, storage, Algorithm::dot}, 0, 5));
  std::vector<StudentLayer> student;
  i64 numel = 0;
  for (const Layer& layer : layers) {
    student.push_back({layer.conv, layer.packed.data(), layer.detail});
    numel += (numel == 0 ? layer.conv.c_in : layer.detail) * layer.conv.height * layer.conv.width;
  }
  const i64 images = 3;
  const std::vector<float> z = random_floats(images * numel, 1, 9);
  // The oracle is the same network in double precision, image by image.
  std::vector<double> wanted;
  for (i64 n = 0; n < images; ++n) {
    const float* part = z.data() + n * numel;
    std::vector<double> x(part, part + 5 * side * side);
    part += 5 * side * side;
    for (const Layer& layer : layers) {
      const i64 extra = layer.detail * layer.conv.height * layer.conv.width;
      x.insert(x.end(), part, part + extra);
      part += extra;
      x = naive(layer.conv, x, layer.weight, layer.bias, 1);
    }
    wanted.insert(wanted.end(), x.begin(), x.end());
  }
  std::vector<char> first;
  for (const i64 threads : {1, 3}) {
    // A heap that threads have used, which takes other instructions from run to run, must not meet a count.
    if (counter.active && threads > 1) break;
    // NaN wherever nothing was written yet; the address sanitizer guards the gaps between its regions.
    std::vector<char> workspace = poisoned(student_workspace_bytes(kernels, student, images, threads) + 64);
    char* start = workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 64) % 64;
    std::vector<char> found = poisoned(static_cast<i64>(wanted.size()) * element_bytes(storage));
    const auto forward = [&] { run_student(kernels, student, z.data(), images, found.data(), threads, kThreads, start); };
    if (counter.active) counter.run("student_forward", static_cast<i64>(wanted.size()), forward);
    else forward();
    check("student", layers[1].conv, largest_difference(found, storage, wanted), static_cast<double>(layers.size()) * tolerance(layers[1].conv));
    if (first.empty()) first = found;
    check("student's threads change bits", layers[1].conv, found == first ? 0 : 1, 0);
    // One image alone has the bits that it has among others.
    const i64 bytes = static_cast<i64>(found.size()) / images;
    std::vector<char> alone = poisoned(bytes);
    run_student(kernels, student, z.data() + 2 * numel, 1, alone.data(), threads, kThreads, start);
    check("student's batch changes bits", layers[1].conv, std::memcmp(alone.data(), found.data() + 2 * bytes, bytes) ? 1 : 0, 0);
  }
}

constexpr Algorithm kBroadcast[] = {Algorithm::direct, Algorithm::winograd2, Algorithm::winograd4, Algorithm::winograd6};

int check_everything(const ConvKernels& kernels) {
  struct Shape {
    i64 images, c_in, c_out, height, width;
  };
  // All border; no multiple of a vector or a tile; the student's start; several panels and blocks; image after image.
  const Shape shapes[] = {{1, 1, 1, 1, 1}, {2, 3, 5, 3, 5}, {2, 48, 16, 4, 4}, {1, 7, 3, 9, 6}, {1, 33, 50, 13, 17}, {2, 16, 112, 8, 8}, {5, 24, 24, 7, 12}};
  int count = 0;
  for (const Shape& shape : shapes)
    for (const Storage storage : {Storage::float32, Storage::bfloat16})
      for (const Activation activation : {Activation::none, Activation::leaky_relu, Activation::tanh}) {
        ConvLayer layer{shape.c_in, shape.c_out, shape.height, shape.width, false, activation, 0.1f, storage, Algorithm::dot};
        for (i64 c_out = 1; c_out <= 4; ++c_out, ++count) {
          ConvLayer head = layer;
          head.c_out = c_out;
          check_layer(kernels, head, shape.images);
        }
        for (const Algorithm algorithm : kBroadcast)
          for (const bool upsample : {false, true}) {
            layer.algorithm = algorithm;
            layer.upsample = upsample;
            check_layer(kernels, layer, shape.images);
            ++count;
          }
      }
  for (const Storage storage : {Storage::float32, Storage::bfloat16})
    for (const Algorithm algorithm : kBroadcast)
      for (const i64 detail : {0, 3}) {
        check_student(kernels, storage, algorithm, detail, 4);
        ++count;
      }
  // From 64 x 64 on images are computed one by one.
  check_student(kernels, Storage::float32, Algorithm::winograd4, 3, 16);
  check_student(kernels, Storage::bfloat16, Algorithm::winograd2, 0, 16);
  if (!(product_rate(kernels, Storage::float32, 1e-3) > 0 && product_rate(kernels, Storage::bfloat16, 1e-3) > 0)) ++failures;
  std::printf("%s: %d cases, %d failures\n", kernels.name, count + 2, failures);
  return failures;
}

// One image in memory as kernels want it.
struct Image {
  Image(i64 c, i64 height, i64 width, Storage storage)
      : channels(round_up(c, 16)), memory(element_bytes(storage) * Activations::elements(1, channels, height, width)),
        activations{memory.data(), channels, height, width} {}
  const i64 channels;
  const Workspace memory;
  const Activations activations;
};

// Packing, and a layer between activations as students lay them.
void count_layer(const ConvKernels& kernels, const ConvLayer& conv) {
  const i64 s = conv.scale(), height = s * conv.height, width = s * conv.width, results = conv.c_out * height * width;
  Layer layer = make_layer(kernels, conv, 0, 1);
  counter.run("conv_pack", 9 * conv.c_in * conv.c_out, [&] { kernels.pack(conv, layer.weight.data(), layer.bias.data(), layer.packed.data()); });
  const std::vector<float> x = random_floats(conv.c_in * conv.height * conv.width, 1, 7);
  std::vector<char> planar = poisoned(results * element_bytes(conv.storage));
  const Image in(conv.c_in, conv.height, conv.width, conv.storage), out(conv.c_out, height, width, conv.storage);
  kernels.clear_halo(in.activations, conv.storage, 0, 1);
  kernels.import_planar(x.data(), 0, conv.c_in, in.activations, conv.storage, 0, 0);
  const ConvSchedule schedule = kernels.schedule(conv, 1, 1);
  const Workspace scratch(schedule.scratch_bytes);
  const ConvJob job{conv, layer.packed.data(), in.activations, out.activations, planar.data(), 1};
  counter.run("conv_block", results, [&] {
    if (conv.algorithm != Algorithm::dot) kernels.clear_halo(out.activations, conv.storage, 0, 1);
    for (i64 task = 0; task < schedule.tasks(); ++task) kernels.run(job, schedule, task, scratch.data());
  });
}

// The way from and to planar tensors.
void count_borders(const ConvKernels& kernels, Storage storage) {
  constexpr i64 kChannels = 32, kSide = 12, kCount = kChannels * kSide * kSide;
  const std::vector<float> x = random_floats(kCount, 1, 7);
  std::vector<char> planar = poisoned(kCount * element_bytes(storage));
  const Image image(kChannels, kSide, kSide, storage);
  counter.run("conv_block, from planar", kCount, [&] { kernels.import_planar(x.data(), 0, kChannels, image.activations, storage, 0, 0); });
  counter.run("conv_block, to planar", kCount, [&] { kernels.export_planar(image.activations, storage, kChannels, 0, planar.data()); });
}

int count_everything(const ConvKernels& kernels) {
  const char* const algorithms[] = {"dot", "direct", "winograd2", "winograd4", "winograd6"};
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    const std::string dtype = storage == Storage::float32 ? "float32" : "bfloat16";
    counter.variant = dtype;
    count_borders(kernels, storage);
    ConvLayer layer{32, 3, 12, 12, false, Activation::tanh, 0.2f, storage, Algorithm::dot};
    counter.variant = "dot, " + dtype;
    count_layer(kernels, layer);
    layer.c_out = 32;
    layer.activation = Activation::leaky_relu;
    for (const Algorithm algorithm : kBroadcast)
      for (const bool upsample : {false, true}) {
        layer.algorithm = algorithm;
        layer.upsample = upsample;
        counter.variant = algorithms[static_cast<int>(algorithm)] + (", " + dtype) + (upsample ? ", up-sampling" : "");
        count_layer(kernels, layer);
      }
    const bool narrow = storage == Storage::bfloat16;
    counter.variant = narrow ? "winograd2, " + dtype : "winograd4, " + dtype;
    check_student(kernels, storage, narrow ? Algorithm::winograd2 : Algorithm::winograd4, 3, 4);
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const ConvKernels& kernels = conv_kernels_of(current_isa());
  return (starts_counting(argc, argv) ? count_everything(kernels) : check_everything(kernels)) ? 1 : 0;
}
