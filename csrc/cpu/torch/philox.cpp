// Registration of Philox words and normals.

#include "cpu/philox.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

// Fills out, (N, ...), whose element (i, j) is number j of the sample with index i.
template <typename Element, typename Kernel>
void fill(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, Kernel kernel, ScalarType dtype, Tensor& out) {
  STD_TORCH_CHECK(is_contiguous(indices, ScalarType::Long), "indices must be contiguous int64");
  const i64 samples = indices.numel();
  STD_TORCH_CHECK(
      is_contiguous(out, dtype) && out.dim() > 0 && out.size(0) == samples, "out must be contiguous, with one row per index");
  if (out.numel() == 0) return;
  const PhiloxParameters p = philox_parameters(seed, stream, step, out.numel() / samples);
  STD_TORCH_CHECK(p.count <= i64{1} << 34, "a sample has at most 2^34 elements");
  const i64 tiles = (p.count + 4 * kPhiloxTile - 1) / (4 * kPhiloxTile);
  const auto* index = static_cast<const std::int64_t*>(indices.const_data_ptr());
  auto* data = static_cast<Element*>(out.mutable_data_ptr());
  constexpr i64 kTilesPerTask = 32;
  spread(samples * tiles, kTilesPerTask, [&](i64 begin, i64 end) {
    for (i64 item = begin; item < end; ++item) {
      const i64 sample = item / tiles;
      kernel(static_cast<std::uint64_t>(index[sample]), item % tiles, p, data + sample * p.count);
    }
  });
}

void philox_words(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, Tensor out) {
  fill<std::int64_t>(indices, seed, stream, step, ADVKD_DISPATCH(philox_words), ScalarType::Long, out);
}

void philox_normal(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, Tensor out) {
  fill<float>(indices, seed, stream, step, ADVKD_DISPATCH(philox_normal), ScalarType::Float, out);
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("philox_words(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()");
  m.def("philox_normal(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&advkd::philox_words));
  m.impl("philox_normal", TORCH_BOX(&advkd::philox_normal));
}
