// Registration of the product with a mask.

#include "cpu/mask_mul.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

void mask_mul(const Tensor& x, const Tensor& mask, double slope, Tensor out) {
  if (x.numel() == 0) return;
  MaskMul s{};
  s.pieces = pieces_of(x, kPiece);
  check_like(out, x);
  check_mask(mask, s.pieces);
  s.pieces = joined(s.pieces);
  s.x = x.const_data_ptr();
  s.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  s.out = out.mutable_data_ptr();
  s.slope = static_cast<float>(slope);
  s.dtype = dtype_of(x);
  launch(ADVKD_DISPATCH(mask_mul), s);
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("mask_mul(Tensor x, Tensor mask, float slope, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("mask_mul", TORCH_BOX(&advkd::mask_mul));
}
