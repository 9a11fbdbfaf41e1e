#include "cuda/mask_mul.h"

#include "cuda/block.h"
#include "cuda/host/ops.h"

namespace advkd::host {

Plan mask_mul(const Device&, const TensorView& x, const TensorView& mask, double slope, const TensorView& out) {
  const Samples samples = samples_of("x", x);
  if (x.numel() == 0) return {};
  const std::string variant = computed("x", x);
  require_like("out", out, x, samples, x.numel());
  require_flat("mask", mask, DType::u8, samples.count * samples.bytes(), x);
  const i64 blocks = samples.blocks(kThreads);
  require_launch(blocks, "x", x);
  MaskMulParameters p{};
  p.x = x.data;
  p.mask = pointer<const unsigned char>(mask);
  p.out = out.data;
  p.samples = samples.count;
  p.length = samples.length;
  p.slope = static_cast<float>(slope);
  p.vectors = samples.whole_vectors(x, {p.x, p.out});
  return plan_of("mask_mul", variant, p, {{"advkd_mask_mul_" + variant, blocks, kThreads}});
}

}  // namespace advkd::host
