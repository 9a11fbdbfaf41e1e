#include "cuda/philox.h"

#include <algorithm>

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

constexpr int kDrawThreads = 256;

Plan draw(
    const char* kernel,
    const TensorView& indices,
    std::int64_t seed,
    std::int64_t stream,
    std::int64_t step,
    const TensorView& out,
    DType dtype) {
  const i64 samples = indices.numel();
  require_flat("indices", indices, DType::i64, samples, indices);
  const bool fits = out.dims > 0 && out.size(0) == samples && out.dtype == dtype;
  require(fits, "out must be ", dtype, " with ", samples, " samples, one for each index, got ", out);
  require_flat("out", out, dtype, out.numel(), indices);
  if (out.numel() == 0) return {};
  const i64 count = out.numel() / samples;
  require(count <= i64{1} << 34, "out must have at most 2^34 elements per sample, got ", out);
  DrawParameters p{};
  p.indices = pointer<const i64>(indices);
  p.out = out.data;
  p.samples = samples;
  p.draw = philox_parameters(seed, stream, step, count);
  const i64 blocks = std::min<i64>(cover(samples * cover(count, 4), kDrawThreads), 1 << 20);
  return plan_of("philox", "", p, {{kernel, blocks, kDrawThreads}});
}

}  // namespace

Plan philox_words(
    const Device&,
    const TensorView& indices,
    std::int64_t seed,
    std::int64_t stream,
    std::int64_t step,
    const TensorView& out) {
  return draw("advkd_philox_words", indices, seed, stream, step, out, DType::i64);
}

Plan philox_normal(
    const Device&,
    const TensorView& indices,
    std::int64_t seed,
    std::int64_t stream,
    std::int64_t step,
    const TensorView& out) {
  return draw("advkd_philox_normal", indices, seed, stream, step, out, DType::f32);
}

}  // namespace advkd::host
