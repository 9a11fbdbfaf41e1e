// The student's convolution on the CPU: y = act(conv3x3(up(x)) + bias), one instance of the kernels per instruction set.
//
// Activations lie as (image, row, column, channel) with a halo of one zero pixel around every image, so that no kernel but
// Winograd's last tiles knows borders, and layers follow each other without any re-laying. Channels are padded to 16; padded
// channels hold zeros up to the next vector and are never read beyond it.
#pragma once

#include <cstdint>

namespace advkd {

using i64 = long long;

enum class Activation : int { none, leaky_relu, tanh };
enum class Storage : int { float32, bfloat16 };

// How a layer is computed. `dot` sums over vectors of input channels and suits 1 to 4 output channels; the others broadcast
// pixels against vectors of output channels: directly, or by Winograd's F(m x m, 3x3). Up-sampling layers always compute four
// phases on the low-resolution input; F(m x m) then skips the products that the phases' zero taps make zero.
enum class Algorithm : int { dot, direct, winograd2, winograd4, winograd6 };
constexpr int kAlgorithms = 5;

struct ConvLayer {
  i64 c_in, c_out, height, width;  // of the input, before up-sampling
  bool upsample;
  Activation activation;
  float slope;
  Storage storage;
  Algorithm algorithm;

  i64 scale() const { return upsample ? 2 : 1; }
  // Side of Winograd's output tiles, 0 for the others.
  int tile() const {
    return algorithm < Algorithm::winograd2 ? 0 : 2 * (1 + static_cast<int>(algorithm) - static_cast<int>(Algorithm::winograd2));
  }
  // The type of the multiplied numbers; sums are always float32. The transforms of F(4x4) and F(6x6) would enlarge bfloat16's
  // rounding five times and more, those of F(2x2) do so by half.
  Storage products() const {
    const bool narrow = algorithm == Algorithm::direct || algorithm == Algorithm::winograd2;
    return narrow ? storage : Storage::float32;
  }
};

inline i64 round_up(i64 x, i64 multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

inline i64 element_bytes(Storage storage) {
  return storage == Storage::float32 ? 4 : 2;
}

// A batch of images in memory; `data` is the first halo pixel of the first image.
struct Activations {
  void* data;
  i64 channels, height, width;  // channels: elements from pixel to pixel

  i64 row() const { return (width + 2) * channels; }
  i64 image() const { return (height + 2) * row(); }
  // A kernel reads whole groups of four pixels: up to three pixels beyond the last one.
  static i64 elements(i64 images, i64 channels, i64 height, i64 width) {
    return (images * (height + 2) * (width + 2) + 4) * channels;
  }
};

// Multiply-adds of one image as this algorithm does them, transforms left out.
inline i64 products_per_image(const ConvLayer& layer) {
  const i64 pairs = layer.c_in * layer.c_out, pixels = layer.height * layer.width, phases = layer.upsample ? 4 : 1;
  if (const i64 m = layer.tile()) {
    const i64 points = layer.upsample ? (m + 1) * (m + 1) : (m + 2) * (m + 2);
    return pairs * phases * points * ((layer.height + m - 1) / m) * ((layer.width + m - 1) / m);
  }
  return pairs * phases * pixels * (layer.upsample ? 4 : 9);
}

// Multiply-adds of one image on the up-sampled tensor, as the layer is defined.
inline i64 direct_products_per_image(const ConvLayer& layer) {
  return layer.c_in * layer.c_out * layer.height * layer.width * 9 * layer.scale() * layer.scale();
}

// The form of packed weights, with which they begin: weights packed for another instruction set can have the same size.
struct PackedHeader {
  i64 lanes, c_in, c_out, upsample, storage, algorithm, version, unused;
  bool operator==(const PackedHeader&) const = default;
};
static_assert(sizeof(PackedHeader) == 64);

struct ConvJob {
  ConvLayer layer;
  const void* packed;
  Activations in;
  Activations out;  // unused by `dot`
  void* planar;     // `dot` writes (image, channel, row, column) here
  i64 images;
};

// How a job is cut into tasks; blocks of units (groups of four pixels, or tiles) times chunks of output channels. No sum is
// ever cut, so the cut does not change a bit.
struct ConvSchedule {
  i64 units, block, blocks, chunks, scratch_bytes;
  i64 tasks() const { return blocks * chunks; }
};

using ConvScheduler = ConvSchedule(const ConvLayer&, i64 images, i64 threads);
using ConvRun = void(const ConvJob&, const ConvSchedule&, i64 task, void* scratch);

struct ConvKernels {
  const char* name;
  i64 (*packed_bytes)(const ConvLayer&);
  void (*pack)(const ConvLayer&, const float* weight, const float* bias, void* packed);
  bool (*fits)(const ConvLayer&, const void* packed);
  ConvScheduler* schedule;
  ConvRun* run;
  // Channels `first` .. of padded activations from planar float32 rows, `stride` elements from image to image.
  void (*import_planar)(const float* planar, i64 stride, i64 c, const Activations& out, Storage, i64 first, i64 image);
  void (*export_planar)(const Activations& in, Storage, i64 c, i64 image, void* planar);
  void (*clear_halo)(const Activations&, Storage, i64 image, i64 images);
  // So many rounds of products in registers; returns the multiply-adds of a round.
  i64 (*multiply)(Storage, i64 rounds);
};

#define ADVKD_DECLARE(isa)        \
  namespace isa {                 \
  extern const ConvKernels conv_kernels; \
  }
ADVKD_DECLARE(isa_baseline)
ADVKD_DECLARE(isa_avx2)
ADVKD_DECLARE(isa_avx512)
ADVKD_DECLARE(isa_avx512bf16)
#undef ADVKD_DECLARE

}  // namespace advkd
