// The checks that host functions share.

#include "cuda/host/host.h"

#include <stdexcept>

namespace advkd::host {

i64 TensorView::numel() const {
  i64 n = 1;
  for (int side = 0; side < dims; ++side) n *= sizes[side];
  return n;
}

bool TensorView::is_contiguous() const {
  i64 expected = 1;
  bool dense = true;
  for (int side = dims - 1; side >= 0; --side) {
    if (sizes[side] == 0) return true;
    dense = dense && (sizes[side] == 1 || strides[side] == expected);
    expected *= sizes[side];
  }
  return dense;
}

// As torch defines it: what has one element in a direction has no stride there.
bool TensorView::is_channels_last() const {
  if (dims != 4) return false;
  i64 expected = 1;
  for (const int side : {1, 3, 2, 0}) {
    if (sizes[side] != 1 && strides[side] != expected) return false;
    expected *= sizes[side];
  }
  return true;
}

Part::Part(i64 number) : text(std::to_string(number)) {}
Part::Part(double number) : text(std::to_string(number)) {}

Part::Part(Shape shape) : text("(") {
  for (i64 side = 0; side < shape.dims; ++side) text += std::to_string(shape.sizes[side]) + (side + 1 < shape.dims ? ", " : "");
  text += shape.dims == 1 ? ",)" : ")";
}

Part::Part(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int32", "int64", "uint8"};
  text = dtype == DType::other ? "another dtype" : std::string("torch.") + kNames[static_cast<int>(dtype)];
}

Part::Part(const TensorView& t) : text(Part(t.dtype).text + " of shape " + Part(Shape{t.sizes, t.dims}).text) {}

void fail(std::initializer_list<Part> parts) {
  std::string message;
  for (const Part& part : parts) message += part.text;
  throw std::runtime_error(message);
}

bool aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return false;
  return true;
}

const char* computed(const char* name, const TensorView& t) {
  constexpr const char* kNames[] = {"f32", "bf16", "f16"};
  require(t.dtype <= DType::f16, name, " must be float32, bfloat16 or float16, got ", t.dtype);
  return kNames[static_cast<int>(t.dtype)];
}

DType product_storage(i64 product) {
  require(0 <= product && product < 4, "product must be 0 to 3, got ", product);
  return product == 0 ? DType::bf16 : product == 1 ? DType::f16 : DType::f32;
}

void require_activation(i64 activation) {
  require(0 <= activation && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
}

void require_tensor(
    const std::string& name,
    const TensorView& t,
    DType dtype,
    std::initializer_list<std::int64_t> shape,
    const TensorView& x,
    bool whole) {
  bool fits = t.dtype == dtype && t.dims == static_cast<i64>(shape.size());
  for (int side = 0; fits && side < t.dims; ++side) fits = t.size(side) == shape.begin()[side];
  const Shape wanted{shape.begin(), static_cast<i64>(shape.size())};
  require(fits, name, " must be ", dtype, " of shape ", wanted, ", got ", t);
  require(t.is_contiguous(), name, " must be contiguous, got strides ", Shape{t.strides, t.dims});
  require(t.device == x.device, name, " must be on x's device");
  require(!whole || aligned({t.data}), name, " must begin at a multiple of 16 bytes");
}

void require_flat(const char* name, const TensorView& t, DType dtype, i64 elements, const TensorView& x) {
  const bool fits = t.dtype == dtype && t.numel() == elements && t.is_contiguous();
  require(fits, name, " must be ", dtype, " with ", elements, " contiguous elements, got ", t);
  require(t.device == x.device, name, " must be on x's device");
}

void require_steps(const std::optional<TensorView>& steps, i64 samples, const TensorView& x) {
  if (steps) require_flat("steps", *steps, DType::i64, steps->numel() == 1 ? 1 : samples, x);
}

Samples samples_of(const char* name, const TensorView& x) {
  require(x.dims > 0, name, " must have samples, got a tensor without dimensions");
  const bool dense = x.is_contiguous();
  const Shape strides{x.strides, x.dims};
  require(dense || x.is_channels_last(), name, " must be contiguous or channels_last, got ", x, " with strides ", strides);
  return {x.size(0), x.size(0) ? x.numel() / x.size(0) : 0, !dense};
}

void require_laid_out(const char* name, const TensorView& t, const TensorView& x, const Samples& samples, i64 elements) {
  require(t.numel() == elements, name, " must have ", elements, " elements, got ", t);
  const bool laid_out = samples.last ? t.is_channels_last() : t.is_contiguous();
  require(laid_out, name, " must be ", samples.last ? "channels_last" : "contiguous", ", got strides ", Shape{t.strides, t.dims});
  require(t.device == x.device, name, " must be on the device of the others");
}

void require_like(const char* name, const TensorView& t, const TensorView& x, const Samples& samples, i64 elements) {
  require(t.dtype == x.dtype, name, " must be ", x.dtype, ", got ", t);
  require_laid_out(name, t, x, samples, elements);
}

void require_launch(i64 blocks, const char* name, const TensorView& x, i64 most) {
  require(blocks <= most, name, " is too large for one launch, got ", x);
}

}  // namespace advkd::host
