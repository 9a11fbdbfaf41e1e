// The student's convolution, for one instruction set: how a layer is cut into tasks and run by one of three algorithms, and the
// borders between planar tensors and the kernels' activations. The algorithms have units of their own: conv_direct.cpp,
// conv_winograd.cpp and conv_dot.cpp, and conv_pack.cpp for their weights.

#include "cpu/conv_block.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv_units.h"

namespace advkd::ADVKD_ISA {

namespace {

ConvSchedule schedule(const ConvLayer& layer, i64 images, i64 threads) {
  if (layer.tile()) return winograd_schedule(layer, images, threads);
  return (layer.algorithm == Algorithm::dot ? dot_schedule : direct_schedule)(layer, images, threads);
}

void run(const ConvJob& job, const ConvSchedule& schedule, i64 task, void* scratch) {
  if (job.layer.algorithm == Algorithm::dot) return run_dot(job, schedule, task, scratch);
  const bool tiled = job.layer.tile(), single = job.layer.storage == Storage::float32;
  (tiled ? single ? winograd_float32 : winograd_bfloat16 : single ? direct_float32 : direct_bfloat16)(job, schedule, task, scratch);
}

// The borders of the engine.

template <typename S>
void import_image(const float* planar, i64 c, const Activations& out, i64 first, i64 image) {
  // Zeros up to the next vector: kernels read whole vectors of channels.
  const i64 end = std::min(round_up(first + c, 16), out.channels);
  for (i64 y = 0; y < out.height; ++y) {
    S* pixel = static_cast<S*>(out.data) + image * out.image() + (y + 1) * out.row() + out.channels;
    for (i64 x = 0; x < out.width; ++x, pixel += out.channels)
      for (i64 k = first; k < end; ++k)
        from_float(k < first + c ? planar[((k - first) * out.height + y) * out.width + x] : 0.0f, pixel[k]);
  }
}

void import_planar(const float* planar, i64 stride, i64 c, const Activations& out, Storage storage, i64 first, i64 image) {
  planar += image * stride;
  storage == Storage::float32 ? import_image<float>(planar, c, out, first, image) : import_image<bf16>(planar, c, out, first, image);
}

template <typename S>
void export_image(const Activations& in, i64 c, i64 image, S* planar) {
  planar += image * c * in.height * in.width;
  for (i64 k = 0; k < c; ++k)
    for (i64 y = 0; y < in.height; ++y) {
      const S* pixel = static_cast<const S*>(in.data) + image * in.image() + (y + 1) * in.row() + in.channels + k;
      for (i64 x = 0; x < in.width; ++x) *planar++ = pixel[x * in.channels];
    }
}

void export_planar(const Activations& in, Storage storage, i64 c, i64 image, void* planar) {
  storage == Storage::float32 ? export_image(in, c, image, static_cast<float*>(planar))
                              : export_image(in, c, image, static_cast<bf16*>(planar));
}

void clear_halo(const Activations& a, Storage storage, i64 image, i64 images) {
  const i64 bytes = element_bytes(storage), row = a.row() * bytes, pixel = a.channels * bytes;
  char* first = static_cast<char*>(a.data) + image * a.image() * bytes;
  // The right halo pixel of a row and the left one of the next are neighbours.
  std::memset(first, 0, row + pixel);
  for (i64 y = 1; y < a.height; ++y) std::memset(first + (y + 1) * row - pixel, 0, 2 * pixel);
  // Beyond the last image lie the pixels that a whole group of four may reach.
  std::memset(first + (a.height + 1) * row - pixel, 0, row + pixel + (image + 1 == images ? 4 * pixel : 0));
}

// The machine's own rate.

#if defined(__aarch64__)
#define ADVKD_IN_REGISTER(x) "+w"(x)
#elif defined(__AVX512F__)
#define ADVKD_IN_REGISTER(x) "+v"(x)
#elif defined(__x86_64__)
#define ADVKD_IN_REGISTER(x) "+x"(x)
#else
#define ADVKD_IN_REGISTER(x) "+m"(x)
#endif

template <typename P>
i64 multiply(i64 rounds) {
  using Op = Product<P>;
  alignas(64) P operands[32 * kLanes] = {};
  for (auto& x : operands) from_float(1e-3f, x);
  V sum[12] = {};
  const typename Op::Weight w = Op::weight(operands);
  const typename Op::Pixel x = Op::pixel(operands + 2);
  for (i64 i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      sum[j] = Op::add(sum[j], w, x);
      // Each sum must pass through a register here, so no addition is merged with the next.
      asm volatile("" : ADVKD_IN_REGISTER(sum[j]));
    }
  }
  return 12 * kLanes * Op::step;
}

i64 multiply(Storage storage, i64 rounds) {
  return storage == Storage::float32 ? multiply<float>(rounds) : multiply<bf16>(rounds);
}

}  // namespace

#define ADVKD_TEXT_(x) #x
#define ADVKD_TEXT(x) ADVKD_TEXT_(x)

const ConvKernels conv_kernels{
    ADVKD_TEXT(ADVKD_ISA) + 4, packed_bytes, pack, fits, schedule, run, import_planar, export_planar, clear_halo, multiply,
};

}  // namespace advkd::ADVKD_ISA
