// Registration of the image's gradient.

#include "cpu/image_gradient.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

void set_pair(i64 (&pair)[2], const std::vector<int64_t>& values, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, "stride, padding and dilation must be pairs");
  pair[0] = values[0];
  pair[1] = values[1];
}

// d and out are NHWC in memory, which their callers permute; weights (kernel row, kernel column, channel, feature).
void image_gradient(
    const Tensor& d,
    const Tensor& weights,
    std::vector<int64_t> stride,
    std::vector<int64_t> padding,
    std::vector<int64_t> dilation,
    Tensor out) {
  for (const Tensor* t : {&d, &weights, static_cast<const Tensor*>(&out)})
    STD_TORCH_CHECK(t->dim() == 4 && is_contiguous(*t, ScalarType::Float), "tensors must be contiguous float32");
  ImageGradient s{};
  s.d = static_cast<const float*>(d.const_data_ptr());
  s.weights = static_cast<const float*>(weights.const_data_ptr());
  s.out = static_cast<float*>(out.mutable_data_ptr());
  s.images = d.size(0), s.rows = d.size(1), s.columns = d.size(2), s.features = d.size(3);
  s.height = out.size(1), s.width = out.size(2), s.channels = static_cast<int>(out.size(3));
  STD_TORCH_CHECK(out.size(0) == s.images && out.size(3) >= 1 && out.size(3) <= kImageChannels, "an image has one to four channels");
  STD_TORCH_CHECK(weights.size(2) == out.size(3) && weights.size(3) == s.features, "weights must be (rows, columns, channels, features)");
  s.kernel[0] = weights.size(0), s.kernel[1] = weights.size(1);
  STD_TORCH_CHECK(s.kernel[0] * s.kernel[1] <= 64, "a kernel has at most 64 taps");
  set_pair(s.stride, stride, 1);
  set_pair(s.padding, padding, 0);
  set_pair(s.dilation, dilation, 1);
  const ImageGradientKernel kernel = ADVKD_DISPATCH(image_gradient);
  spread(s.images * s.height, 8, [&](i64 begin, i64 end) { kernel(s, begin, end); });
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("image_gradient(Tensor d, Tensor weights, int[] stride, int[] padding, int[] dilation, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("image_gradient", TORCH_BOX(&advkd::image_gradient));
}
