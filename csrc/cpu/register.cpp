// Registration of the CPU kernels with torch, through its stable ABI. Launchers check layout, allocate, launch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/philox.h"

namespace advkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Element, typename Kernel>
void launch(const Tensor& indices, const PhiloxParameters& p, Kernel kernel, Tensor& out) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous(), "indices must be contiguous int64");
  STD_TORCH_CHECK(p.count <= i64{1} << 34, "a sample has at most 2^34 elements");
  const i64 tiles = (p.count + 4 * kPhiloxTile - 1) / (4 * kPhiloxTile);
  const auto* index = static_cast<const std::int64_t*>(indices.const_data_ptr());
  auto* data = static_cast<Element*>(out.mutable_data_ptr());
  constexpr i64 kTilesPerTask = 32;
  torch::stable::parallel_for(0, indices.numel() * tiles, kTilesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const i64 sample = item / tiles;
      kernel(static_cast<std::uint64_t>(index[sample]), item % tiles, p, data + sample * p.count);
    }
  });
}

Tensor philox_words(const Tensor& indices, int64_t seed, int64_t count, int64_t stream, int64_t step) {
  const std::vector<int64_t> shape{indices.numel(), count};
  Tensor out = torch::stable::new_empty(indices, shape, ScalarType::Long);
  launch<std::int64_t>(indices, philox_parameters(seed, stream, step, count), ADVKD_DISPATCH(philox_words), out);
  return out;
}

Tensor philox_normal(
    const Tensor& indices,
    int64_t seed,
    torch::headeronly::IntHeaderOnlyArrayRef shape,
    int64_t stream,
    int64_t step) {
  std::vector<int64_t> full{indices.numel()};
  i64 count = 1;
  for (const int64_t side : shape) {
    full.push_back(side);
    count *= side;
  }
  Tensor out = torch::stable::new_empty(indices, full, ScalarType::Float);
  launch<float>(indices, philox_parameters(seed, stream, step, count), ADVKD_DISPATCH(philox_normal), out);
  return out;
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cpu, m) {
  m.def("philox_words(Tensor indices, int seed, int count, int stream, int step) -> Tensor");
  m.def("philox_normal(Tensor indices, int seed, int[] shape, int stream, int step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&advkd::philox_words));
  m.impl("philox_normal", TORCH_BOX(&advkd::philox_normal));
}
