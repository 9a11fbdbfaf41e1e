// Registration of the convolution's epilogue with a mask.

#include "cpu/conv_bias_act_mask.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

void conv_bias_act_mask(const Tensor& p, std::optional<Tensor> bias, double slope, Tensor out, Tensor mask) {
  if (p.numel() == 0) return;
  BiasActMask s{};
  s.pieces = pieces_of(p, kPiece);
  check_like(out, p);
  check_mask(mask, s.pieces);
  if (bias) {
    STD_TORCH_CHECK(p.dim() > 1, "p must be (N, C, ...)");
    s.channels = p.size(1);
    const bool fits = bias->dim() == 1 && bias->size(0) == s.channels && bias->scalar_type() == p.scalar_type();
    STD_TORCH_CHECK(fits && bias->is_contiguous(), "bias must be contiguous (C,) of p's dtype");
    s.plane = p.is_contiguous() ? s.pieces.count / s.channels : 1;
    s.pieces.piece = bias_piece(s.channels, s.plane);
    s.bias = bias->const_data_ptr();
  }
  s.pieces = joined(s.pieces);
  s.p = p.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.mask = static_cast<std::uint8_t*>(mask.mutable_data_ptr());
  s.slope = static_cast<float>(slope);
  s.dtype = dtype_of(p);
  launch(ADVKD_DISPATCH(conv_bias_act_mask), s);
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("conv_bias_act_mask(Tensor p, Tensor? bias, float slope, Tensor(a!) out, Tensor(b!) mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("conv_bias_act_mask", TORCH_BOX(&advkd::conv_bias_act_mask));
}
