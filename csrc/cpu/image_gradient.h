// Gradient of a convolution by an input of few channels, on the CPU; one instance per instruction set, chosen at run time.
#pragma once

#include "common/philox.h"

namespace advkd {

constexpr int kImageChannels = 4;

// NHWC throughout; the weights are packed as (kernel row, kernel column, image channel, feature).
struct ImageGradient {
  const float* d;        // (images, rows, columns, features): the gradient by the convolution's result
  const float* weights;
  float* out;            // (images, height, width, channels)
  i64 images, height, width, rows, columns, features;
  int channels;          // at most kImageChannels
  i64 kernel[2], stride[2], padding[2], dilation[2];
};

// Make rows begin .. end - 1 of all images' rows.
using ImageGradientKernel = void (*)(const ImageGradient&, i64 begin, i64 end);

namespace isa_baseline {
void image_gradient(const ImageGradient&, i64, i64);
}
namespace isa_avx2 {
void image_gradient(const ImageGradient&, i64, i64);
}
namespace isa_avx512 {
void image_gradient(const ImageGradient&, i64, i64);
}

}  // namespace advkd
