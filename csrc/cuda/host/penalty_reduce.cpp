#include "cuda/penalty_reduce.h"

#include "cuda/block.h"
#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

constexpr int kTurns = 8;  // groups of eight elements per thread, more only where a block could not sum so many parts

// Blocks per sample: of its length alone, so that a sample's sum is the same in every batch.
int parts_of(i64 length) {
  return static_cast<int>(clamp(cover(length, kThreads * 8 * kTurns), kThreads));
}

}  // namespace

Plan penalty_reduce(
    const Device&,
    const TensorView& g,
    double target,
    double weight,
    std::int64_t mode,
    const TensorView& out,
    const TensorView& penalties) {
  const Samples samples = samples_of("g", g);
  if (g.numel() == 0) return {};
  const std::string variant = computed("g", g);
  require(0 <= mode && mode <= 2, "mode must be 0, 1 or 2, got ", mode);
  require_like("out", out, g, samples, g.numel());
  require_flat("penalties", penalties, DType::f32, samples.count, g);
  PenaltyParameters p{};
  p.g = g.data;
  p.out = out.data;
  p.penalties = pointer<float>(penalties);
  p.samples = samples.count;
  p.length = samples.length;
  p.target = static_cast<float>(target);
  p.share = static_cast<float>(weight / static_cast<double>(samples.count));
  p.mode = static_cast<int>(mode);
  p.parts = parts_of(samples.length);
  p.vectors = samples.whole_vectors(g, {p.g, p.out});
  const i64 blocks = samples.count * p.parts;
  require_launch(blocks, "g", g);
  const std::vector<Launch> launches{
      {"advkd_penalty_sums_" + variant, blocks, kThreads}, {"advkd_penalty_apply_" + variant, blocks, kThreads}};
  Plan plan = plan_of("penalty_reduce", variant, p, launches);
  plan.scratch = blocks;
  plan.scratch_offset = offsetof(PenaltyParameters, partials);
  return plan;
}

}  // namespace advkd::host
