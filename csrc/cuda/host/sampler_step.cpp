#include "cuda/sampler_step.h"

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

// The kernels multiply instead of dividing: n / d is the upper half of the 128-bit product (n + 1) * step_inverse(d), exactly,
// as long as (n + 1) * d is at most 2^64.
u64 step_inverse(u64 d) {
  return ~u64{0} / d;
}

// Blocks that one launch may have. The flat kernel counts its warps, eight per block, in 32 bits.
i64 step_most_tiles(const StepParameters& p) {
  return p.pool ? (i64{1} << 31) - 1 : (i64{1} << 29) - 1;
}

// Work of the kernel beside a plain linear combination.
struct StepWork {
  bool draws, extended;
};

// Two vectors per thread where every warp of a sample is then full. With one, threads that draw normals have enough work, and
// those of extended steps, which load up to five tensors, enough in flight.
void step_plan_flat(StepParameters& p, int group, StepWork work) {
  const bool two = !work.draws && !work.extended && p.length % (2 * kStepLanes * group) == 0;
  p.vectors_each = p.vectors ? 1 + two : 0;
  const i64 groups = p.channels * cover(p.length, p.vectors ? group : 4);
  const i64 warps = cover(groups, p.vectors_each == 2 ? 2 * kStepLanes : kStepLanes);
  p.warps = static_cast<u32>(warps);
  p.inverse_warps = step_inverse(warps);
  p.inverse_channels = step_inverse(p.channels);
  p.tiles = cover(p.samples * warps, kStepThreads / kStepLanes);
}

// `group`: elements of a vector of 16 bytes (with `pool`, four). The other fields are filled before.
void step_plan(StepParameters& p, int group, StepWork work) {
  if (p.pool == 0) return step_plan_flat(p, group, work);
  const int outputs = p.width / p.pool;
  p.tile_channels = clamp(kStepThreads / cover(p.pool, group), p.channels);
  p.outputs = clamp(kStepThreads / p.tile_channels * group / p.pool, outputs);
  // A tile should start at a vector.
  if (p.outputs < outputs && p.outputs >= group) p.outputs -= p.outputs % group;
  p.lanes = clamp(cover(p.outputs * p.pool, group) * p.tile_channels, kStepThreads);
  p.rows = clamp(kStepThreads / p.lanes, p.pool);
  p.strips = kStepThreads / (p.lanes * p.rows);
  p.column_tiles = cover(outputs, p.outputs);
  p.channel_tiles = cover(p.channels, p.tile_channels);
  const i64 strips = p.samples * (p.length / p.width / p.pool);
  p.tiles = cover(strips, p.strips) * p.column_tiles * p.channel_tiles;
}

// Sizes, and the share of every thread. Memory order serves every layout, but drawn normals and pooled pixels belong to channels.
void set_sizes(StepParameters& p, const TensorView& x, const Samples& samples, i64 pool, StepWork work) {
  const i64 channels = samples.last && (pool || work.draws) ? x.size(1) : 1, width = pool ? x.size(x.dims - 1) : 0;
  constexpr i64 kMost = (i64{1} << 31) - 1;
  require(channels <= kMost && width <= kMost, "x must have at most 2^31 - 1 channels and columns, got ", x);
  const int group = pool || x.dtype == DType::f32 ? 4 : 8;
  p.samples = samples.count;
  p.channels = static_cast<int>(channels);
  p.length = samples.length / channels;
  p.width = static_cast<int>(width);
  p.pool = static_cast<int>(pool);
  const bool whole = aligned({p.x, p.m, p.table, p.previous_x0, p.history, p.noise, p.out, p.x0});
  p.vectors = whole && channels == 1 && (pool ? width : p.length) % group == 0;
  step_plan(p, group, work);
  require_launch(p.tiles, "x", x, step_most_tiles(p));
}

void require_pool(i64 pool, const TensorView& x) {
  const bool fits = pool == 0 || (pool > 0 && x.dims == 4 && x.size(2) % pool == 0 && x.size(3) % pool == 0);
  require(fits, "pool must be 0, or divide height and width of x, got ", pool, " for ", x);
}

}  // namespace

Plan sampler_step(
    const Device&,
    const TensorView& x,
    const TensorView& m,
    const TensorView& table,
    const std::optional<TensorView>& previous_x0,
    const std::optional<TensorView>& history,
    const std::optional<TensorView>& noise,
    const std::optional<TensorView>& indices,
    std::int64_t seed,
    std::int64_t step,
    const std::optional<TensorView>& steps,
    std::int64_t pool,
    const TensorView& out,
    const std::optional<TensorView>& x0,
    const std::optional<TensorView>& pooled,
    const std::optional<TensorView>& flags) {
  const Samples samples = samples_of("x", x);
  if (x.numel() == 0) return {};
  const std::string own = computed("x", x), model = computed("m", m);
  require_laid_out("m", m, x, samples, x.numel());
  const bool extended = table.dims == 2 && table.size(1) == 12;
  const i64 columns = extended ? 12 : 8, rows = table.numel() == columns ? 1 : samples.count;
  require_flat("table", table, DType::f32, rows * columns, x);
  require(extended || !history, "history needs a table of 12 columns, got ", table);
  if (previous_x0) require_like("previous_x0", *previous_x0, x, samples, x.numel());
  if (history) require_like("history", *history, x, samples, x.numel());
  if (noise) require_like("noise", *noise, x, samples, x.numel());
  if (indices) require_flat("indices", *indices, DType::i64, samples.count, x);
  require(!indices || samples.length <= i64{1} << 34, "x must have at most 2^34 elements per sample, got ", x);
  require_steps(steps, samples.count, x);
  require_pool(pool, x);
  require_like("out", out, x, samples, x.numel());
  if (x0) require_like("x0", *x0, x, samples, x.numel());
  require(!pool || pooled, "pooled must be given where pool is not 0");
  if (pooled) require_like("pooled", *pooled, x, samples, x.numel() / (pool * pool));
  if (flags) require_flat("flags", *flags, DType::i32, samples.count, x);
  const PhiloxParameters key = philox_parameters(seed, PhiloxStream::step, steps ? 0 : step, 0);
  StepParameters p{};
  p.x = x.data;
  p.m = m.data;
  p.table = pointer<const float>(table);
  p.previous_x0 = pointer(previous_x0);
  p.history = pointer(history);
  p.noise = pointer(noise);
  p.indices = pointer<const i64>(indices);
  p.steps = pointer<const i64>(steps);
  p.out = out.data;
  p.x0 = pointer<void>(x0);
  p.pooled = pointer<void>(pooled);
  p.flags = pointer<int>(flags);
  p.key0 = key.key0;
  p.key1 = key.key1;
  p.stream_step = key.stream_step;
  p.row_stride = table.numel() > columns ? static_cast<int>(columns) : 0;
  p.step_stride = steps && steps->numel() > 1;
  set_sizes(p, x, samples, pool, {indices.has_value(), extended});
  const std::string kernel = std::string("advkd_step_") + (pool ? "pool_" : "flat_") + (indices ? "draw_" : "tensor_");
  const std::string form = extended ? "extended" : "plain", name = kernel + own + "_" + model + "_" + form;
  return plan_of("sampler_step", own + ", " + model + ", " + form, p, {{name, p.tiles, kStepThreads}});
}

}  // namespace advkd::host
