#include "cuda/norm_act.h"

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

constexpr i64 kBlocks = 1024;  // enough for every multiprocessor: with more work than that, threads take turns
constexpr i64 kMostTurns = 8;  // enough for what a thread does once

// `last`: channels last; `reduces`: whether each block leaves a partial result, so that fewer blocks are better.
void norm_plan(NormParameters& p, bool last, bool reduces) {
  const i64 groups = last ? p.channels / p.group : 1, turns = reduces ? kMostSide : kMostTurns;
  p.lanes = static_cast<int>(clamp(groups, kThreads));
  p.rows = kThreads / p.lanes;
  p.tiles = static_cast<int>(last ? cover(groups, p.lanes) : p.channels);
  const i64 positions = static_cast<i64>(p.samples) * p.height * p.columns;
  const i64 wanted = clamp(cover(positions, p.rows) * p.tiles / kBlocks, turns);
  p.parts = static_cast<int>(cover(positions, p.rows * wanted));
  const i64 step = static_cast<i64>(p.parts) * p.rows;
  p.column_step = static_cast<int>(step % p.columns);
  p.row_step = static_cast<int>(step / p.columns % p.height);
  p.sample_step = static_cast<int>(step / p.columns / p.height);
}

// The tensors of a piece of norm_act.
struct Tensors {
  const TensorView& x;
  const TensorView* weights = nullptr;
  const TensorView* statistics = nullptr;
  const TensorView* gradient = nullptr;
  const TensorView* means = nullptr;
  const TensorView* out = nullptr;
  const char* out_name = "out";
};

const float* checked(const char* name, const TensorView* t, const TensorView& x) {
  if (t == nullptr) return nullptr;
  require_flat(name, *t, DType::f32, 2 * x.size(1), x);
  return pointer<const float>(*t);
}

// Sizes, and the share of every thread. `gradient_side` and `out_side`: in sides of x.
NormParameters norm_parameters(
    const Tensors& t, const Samples& layout, bool upsample, int gradient_side, int out_side, bool reduces) {
  const TensorView& x = t.x;
  NormParameters p{};
  p.x = x.data;
  p.weights = checked("weights", t.weights, x);
  p.statistics = checked("statistics", t.statistics, x);
  p.means = checked("means", t.means, x);
  if (t.gradient) require_like("gradient", *t.gradient, x, layout, x.numel() * gradient_side * gradient_side);
  if (t.out) require_like(t.out_name, *t.out, x, layout, x.numel() * out_side * out_side);
  p.gradient = t.gradient ? t.gradient->data : nullptr;
  p.out = t.out ? t.out->data : nullptr;
  const i64 n = x.size(0), channels = x.size(1), h = x.size(2), w = x.size(3);
  p.width = layout.last || upsample ? w : h * w;
  const int wide = 16 / element_size(x.dtype);
  const bool vectors = aligned({p.x, p.gradient, p.out, p.weights, p.statistics, p.means});
  p.group = vectors && (layout.last ? channels : p.width) % wide == 0 ? wide : 1;
  const i64 samples = layout.last ? n * h : n, height = upsample && !layout.last ? h : 1;
  const i64 columns = layout.last ? w : p.width / p.group;
  const bool fits = samples <= kMostSide && height <= kMostSide && columns <= kMostSide && channels <= kMostSide;
  require(fits, "x must have at most 2^29 rows, columns and channels, got ", x);
  p.samples = static_cast<int>(samples);
  p.height = static_cast<int>(height);
  p.columns = static_cast<int>(columns);
  p.channels = static_cast<int>(channels);
  p.upsample = upsample;
  norm_plan(p, layout.last, reduces);
  return p;
}

Samples image_layout(const TensorView& x) {
  require(x.dims == 4, "x must have shape (N, C, H, W), got ", x);
  return samples_of("x", x);
}

Plan norm_launch(const std::string& kind, const NormParameters& p, const TensorView& x, const Samples& layout) {
  const std::string variant = computed("x", x);
  const i64 blocks = static_cast<i64>(p.tiles) * p.parts;
  require_launch(blocks, "x", x);
  const std::string kernel = "advkd_norm_" + kind + (layout.last ? "_last_" : "_planes_") + variant;
  return plan_of("norm_act", variant, p, {{kernel, blocks, kThreads}});
}

// A kernel that reduces, and the one that joins its blocks' results in `results`.
Plan norm_reduce(
    const std::string& kind,
    const char* name,
    const TensorView& results,
    NormParameters p,
    const TensorView& x,
    const Samples& layout) {
  require_flat(name, results, DType::f32, 2 * x.size(1), x);
  p.results = pointer<float>(results);
  Plan plan = norm_launch(kind, p, x, layout);
  plan.launches.push_back({"advkd_norm_finish_" + kind, p.channels, kThreads});
  plan.scratch = static_cast<i64>(p.parts) * 3 * p.channels;
  plan.scratch_offset = offsetof(NormParameters, partials);
  return plan;
}

}  // namespace

Plan norm_act_moments(const Device&, const TensorView& x, const TensorView& statistics) {
  const Samples layout = image_layout(x);
  if (x.numel() == 0) return {};
  return norm_reduce("moments", "statistics", statistics, norm_parameters({x}, layout, false, 1, 1, true), x, layout);
}

Plan norm_act(
    const Device&,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    double eps,
    double slope,
    bool upsample,
    const TensorView& out) {
  const Samples layout = image_layout(x);
  if (x.numel() == 0) return {};
  const Tensors tensors{x, &weights, &statistics, nullptr, nullptr, &out};
  NormParameters p = norm_parameters(tensors, layout, upsample, 1, upsample ? 2 : 1, false);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  return norm_launch("act", p, x, layout);
}

Plan norm_act_sums(
    const Device&,
    const TensorView& gradient,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    double eps,
    double slope,
    bool upsample,
    const std::optional<TensorView>& kept,
    const TensorView& sums) {
  const Samples layout = image_layout(x);
  if (x.numel() == 0) return {};
  const Tensors tensors{x, &weights, &statistics, &gradient, nullptr, kept ? &*kept : nullptr, "kept"};
  NormParameters p = norm_parameters(tensors, layout, upsample, upsample ? 2 : 1, 1, true);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  return norm_reduce("sums", "sums", sums, p, x, layout);
}

Plan norm_act_backward(
    const Device&,
    const TensorView& gradient,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    const TensorView& means,
    double eps,
    double slope,
    bool upsample,
    bool masked,
    const TensorView& dx) {
  const Samples layout = image_layout(x);
  if (x.numel() == 0) return {};
  const bool four = upsample && !masked;
  const Tensors tensors{x, &weights, &statistics, &gradient, &means, &dx, "dx"};
  NormParameters p = norm_parameters(tensors, layout, four, four ? 2 : 1, 1, false);
  p.eps = static_cast<float>(eps);
  p.slope = static_cast<float>(slope);
  p.masked = masked;
  return norm_launch("backward", p, x, layout);
}

}  // namespace advkd::host
