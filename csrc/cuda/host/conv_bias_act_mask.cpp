#include "cuda/conv_bias_act_mask.h"

#include "cuda/block.h"
#include "cuda/host/ops.h"

namespace advkd::host {

Plan conv_bias_act_mask(
    const Device&,
    const TensorView& x,
    const std::optional<TensorView>& bias,
    double slope,
    const TensorView& out,
    const TensorView& mask) {
  const Samples samples = samples_of("p", x);
  if (x.numel() == 0) return {};
  const std::string variant = computed("p", x);
  ConvBiasActMaskParameters p{};
  p.channels = x.dims > 1 ? x.size(1) : 1;
  require_like("out", out, x, samples, x.numel());
  require_flat("mask", mask, DType::u8, samples.count * samples.bytes(), x);
  if (bias) require_flat("bias", *bias, x.dtype, p.channels, x);
  const i64 blocks = samples.blocks(kThreads);
  require_launch(blocks, "p", x);
  p.p = x.data;
  p.bias = pointer(bias);
  p.out = out.data;
  p.mask = pointer<unsigned char>(mask);
  p.samples = samples.count;
  p.length = samples.length;
  p.inner = samples.last ? 1 : samples.length / p.channels;
  p.slope = static_cast<float>(slope);
  p.vectors = samples.whole_vectors(x, {p.p, p.out});
  p.bias_vectors = p.inner == 1 && p.channels % 8 == 0 && aligned({p.bias});
  return plan_of("conv_bias_act_mask", variant, p, {{"advkd_conv_bias_act_mask_" + variant, blocks, kThreads}});
}

}  // namespace advkd::host
