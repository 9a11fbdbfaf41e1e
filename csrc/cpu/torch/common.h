// Parts that the registration units share: torch's stable ABI, and the checks of launchers' tensors. Launchers check layout
// and launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pieces.h"
#include "cpu/threads.h"

namespace advkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `who`: the error's first words.
inline Dtype dtype_of(const Tensor& t, const char* who = "the kernels take") {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, who, " float32, bfloat16 and float16");
}

// As torch sees it: the stride of a side of one says nothing.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  i64 stride = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) > 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

inline bool is_contiguous(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype && t.is_contiguous();
}

inline const void* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// Results larger than the caches are stored past them.
inline bool passes_caches(const Tensor& t) {
  constexpr i64 kCached = i64{4} << 20;
  return t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 2) > kCached;
}

// The samples of a dense tensor, in the order of memory.
inline Pieces pieces_of(const Tensor& t, i64 piece) {
  STD_TORCH_CHECK(t.is_contiguous() || is_channels_last(t), "tensors must be contiguous or channels_last");
  return {t.size(0), t.numel() / t.size(0), piece};
}

inline void check_layout(const Tensor& t, const Tensor& other, i64 times = 1) {
  STD_TORCH_CHECK(
      t.dim() == other.dim() && t.numel() == times * other.numel() &&
          (other.is_contiguous() ? t.is_contiguous() : is_channels_last(t)),
      "tensors must have one shape and layout");
}

inline void check_like(const Tensor& t, const Tensor& other, i64 times = 1) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), "tensors must have one dtype");
  check_layout(t, other, times);
}

// Samples that fill their masks' bytes follow each other in the mask as they do in memory: they are one.
inline Pieces joined(Pieces p) {
  return p.count % 8 ? p : Pieces{1, p.samples * p.count, p.piece};
}

inline void check_mask(const Tensor& mask, const Pieces& p) {
  const bool fits = mask.dim() == 2 && mask.size(0) == p.samples && mask.size(1) == (p.count + 7) / 8;
  const bool bytes = is_contiguous(mask, ScalarType::Byte);
  STD_TORCH_CHECK(fits && bytes, "mask must be contiguous uint8 (N, bytes)");
}

template <typename Kernel, typename Job>
inline void launch(Kernel kernel, const Job& job) {
  spread(job.pieces.total(), job.pieces.grain(), [&](i64 begin, i64 end) { kernel(job, begin, end); });
}

}  // namespace advkd
