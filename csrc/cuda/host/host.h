// The host side of the CUDA kernels: from an op's arguments to the launches that do it. An op's host function checks its arguments,
// plans for a device and fills the kernels' parameters; what starts the kernels is elsewhere. No Torch and no CUDA here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "common/philox.h"

namespace advkd::host {

constexpr i64 kMostSide = i64{1} << 29;  // of tensors whose elements' places along a side are counted in 32 bits

// The first three are those that kernels compute with.
enum class DType { f32, bf16, f16, i32, i64, u8, other };

struct TensorView {
  void* data;
  const std::int64_t *sizes, *strides;
  int dims;
  DType dtype;
  int device;  // a number that tensors of one device share

  i64 size(int side) const { return sizes[side]; }
  i64 numel() const;
  bool is_contiguous() const;
  bool is_channels_last() const;
};

struct Device {
  int multiprocessors;
  int shared_limit;  // bytes of shared memory that a block may have
  int capability;    // compute capability, its major number
};

struct Launch {
  std::string kernel;
  i64 blocks;
  int threads;
  int shared = 0;  // bytes of dynamic shared memory
};

// Launches one after the other, none for an empty tensor. All take the same parameters, one struct by value.
struct Plan {
  std::string source, variant;  // csrc/cuda/<source>.cu, and those of its kernels' variants that are started
  std::vector<unsigned char> parameters;
  std::vector<Launch> launches;
  i64 scratch = 0;         // float32 elements that the kernels need, beside their arguments,
  i64 scratch_offset = 0;  // and the byte of the parameters where the pointer to them belongs
};

template <typename Parameters>
Plan plan_of(const char* source, const std::string& variant, const Parameters& p, std::vector<Launch> launches) {
  static_assert(std::is_trivially_copyable_v<Parameters>);
  Plan plan{source, variant, std::vector<unsigned char>(sizeof p), std::move(launches)};
  std::memcpy(plan.parameters.data(), &p, sizeof p);
  return plan;
}

// A shape as messages show it.
struct Shape {
  const std::int64_t* sizes;
  i64 dims;
};

// A part of a message, as text.
struct Part {
  std::string text;

  Part(const char* part) : text(part) {}
  Part(const std::string& part) : text(part) {}
  Part(i64 number);
  Part(std::int64_t number) : Part(static_cast<i64>(number)) {}
  Part(size_t number) : Part(static_cast<i64>(number)) {}
  Part(int number) : Part(static_cast<i64>(number)) {}
  Part(double number);
  Part(Shape shape);
  Part(DType dtype);
  Part(const TensorView& t);  // "torch.float32 of shape (2, 3)"
};

[[noreturn]] void fail(std::initializer_list<Part> parts);

// Throws the parts as one message unless `holds`.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail({Part(parts)...});
}

constexpr i64 kMostBlocks = (i64{1} << 31) - 1;

// How many pieces of `part` cover n.
template <typename T>
T cover(T n, std::type_identity_t<T> part) {
  return (n + part - 1) / part;
}

// n, but at least 1 and at most `most`.
template <typename T>
T clamp(T n, std::type_identity_t<T> most) {
  return n < 1 ? 1 : n < most ? n : most;
}

inline int element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// Whether vectors of 16 bytes are aligned at these addresses.
bool aligned(std::initializer_list<const void*> addresses);

// "f32", "bf16" or "f16", of a tensor that kernels compute with.
const char* computed(const char* name, const TensorView& t);

// How products are made, by index: the names of variants, and the storage of their factors.
constexpr const char* kProducts[] = {"bf16", "f16", "tf32", "f32"};
DType product_storage(i64 product);

void require_activation(i64 activation);

// A contiguous tensor of exactly this dtype and shape on the device of x; `whole`: read or written in vectors of 16 bytes.
void require_tensor(
    const std::string& name,
    const TensorView& t,
    DType dtype,
    std::initializer_list<std::int64_t> shape,
    const TensorView& x,
    bool whole);

// A contiguous tensor of so many elements of this dtype on the device of x.
void require_flat(const char* name, const TensorView& t, DType dtype, i64 elements, const TensorView& x);

// One step for all samples, or one for each.
void require_steps(const std::optional<TensorView>& steps, i64 samples, const TensorView& x);

// A dense tensor as samples of `length` elements in the order of memory.
struct Samples {
  i64 count, length;
  bool last;  // channels last; a tensor that is contiguous as well is not

  // Blocks of threads that take eight elements of a sample each, those of one byte of a mask.
  i64 bytes() const { return cover(length, 8); }
  i64 blocks(int threads) const { return cover(count * bytes(), threads); }
  // Whether vectors of 16 bytes are aligned in every sample of tensors that begin at these addresses.
  bool whole_vectors(const TensorView& x, std::initializer_list<const void*> addresses) const {
    return aligned(addresses) && length * element_size(x.dtype) % 16 == 0;
  }
};

Samples samples_of(const char* name, const TensorView& x);

// A tensor of x's device and layout with so many elements; one of x's dtype, too.
void require_laid_out(const char* name, const TensorView& t, const TensorView& x, const Samples& samples, i64 elements);
void require_like(const char* name, const TensorView& t, const TensorView& x, const Samples& samples, i64 elements);

void require_launch(i64 blocks, const char* name, const TensorView& x, i64 most = kMostBlocks);

template <typename T = const void>
T* pointer(const std::optional<TensorView>& t) {
  return t ? static_cast<T*>(t->data) : nullptr;
}

template <typename T>
T* pointer(const TensorView& t) {
  return static_cast<T*>(t.data);
}

}  // namespace advkd::host
