#include "cuda/interpolate.h"

#include "cuda/block.h"
#include "cuda/host/ops.h"

namespace advkd::host {

Plan interpolate(
    const Device&,
    const TensorView& real,
    const TensorView& fake,
    const std::optional<TensorView>& a,
    const std::optional<TensorView>& indices,
    std::int64_t seed,
    std::int64_t step,
    const std::optional<TensorView>& steps,
    const TensorView& out) {
  const Samples samples = samples_of("real", real);
  if (real.numel() == 0) return {};
  const std::string variant = computed("real", real);
  InterpolateParameters p{};
  p.merge = out.dims > 0 && out.size(0) != samples.count;
  require_like("fake", fake, real, samples, real.numel());
  require_like("out", out, real, samples, (p.merge ? 3 : 1) * real.numel());
  require(a || indices, "one of a and indices must be given");
  if (a) require_flat("a", *a, DType::f32, samples.count, real);
  if (indices) require_flat("indices", *indices, DType::i64, samples.count, real);
  require_steps(steps, samples.count, real);
  const i64 blocks = samples.blocks(kThreads);
  require_launch(blocks, "real", real);
  p.real = real.data;
  p.fake = fake.data;
  p.a = pointer<const float>(a);
  p.indices = pointer<const i64>(indices);
  p.steps = pointer<const i64>(steps);
  p.out = out.data;
  p.samples = samples.count;
  p.length = samples.length;
  const PhiloxParameters key = philox_parameters(seed, PhiloxStream::interpolation, steps ? 0 : step, 0);
  p.key0 = key.key0;
  p.key1 = key.key1;
  p.stream_step = key.stream_step;
  p.step_stride = steps && steps->numel() > 1;
  p.vectors = samples.whole_vectors(real, {p.real, p.fake, p.out});
  return plan_of("interpolate", variant, p, {{"advkd_interpolate_" + variant, blocks, kThreads}});
}

}  // namespace advkd::host
