// From torch's boxed arguments to a host function's, by its signature alone: the one conversion for all ops of both objects.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <tuple>
#include <utility>

#include "cuda/host/ops.h"

namespace advkd::host {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Byte: return DType::u8;
    default: return DType::other;
  }
}

// A parameter of a host function: what holds such an argument while the function runs, and its view. Not inlined: there are many.
template <typename T>
struct Argument {
  using Held = T;
  static const T& view(const T& held) { return held; }
};

template <>
struct Argument<TensorView> {
  using Held = Tensor;
  [[gnu::noinline]] static TensorView view(const Tensor& t) {
    std::int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    const int device = 256 * type + t.get_device_index();
    return {t.data_ptr(), t.sizes().data(), t.strides().data(), static_cast<int>(t.dim()), dtype_of(t), device};
  }
};

template <>
struct Argument<std::optional<TensorView>> {
  using Held = std::optional<Tensor>;
  [[gnu::noinline]] static std::optional<TensorView> view(const Held& t) {
    return t ? std::optional(Argument<TensorView>::view(*t)) : std::nullopt;
  }
};

template <>
struct Argument<std::vector<TensorView>> {
  using Held = std::vector<Tensor>;
  static std::vector<TensorView> view(const Held& all) {
    std::vector<TensorView> views;
    for (const Tensor& t : all) views.push_back(Argument<TensorView>::view(t));
    return views;
  }
};

template <typename T>
[[gnu::noinline]] T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

template <typename Function>
struct Signature;

template <typename... Parameters>
struct Signature<Plan (*)(const Device&, Parameters...)> {
  static constexpr size_t kCount = sizeof...(Parameters);
  using Held = std::tuple<typename Argument<std::remove_cvref_t<Parameters>>::Held...>;
  using Function = Plan (*)(const Device&, Parameters...);

  // Takes the arguments off torch's stack.
  static Held take(StableIValue* stack) { return take(stack, std::index_sequence_for<Parameters...>{}); }

  static Plan plan(Function function, const Device& device, const Held& held) {
    return std::apply(
        [&](const auto&... all) { return function(device, Argument<std::remove_cvref_t<Parameters>>::view(all)...); }, held);
  }

 private:
  template <size_t... kPlaces>
  static Held take(StableIValue* stack, std::index_sequence<kPlaces...>) {
    return Held{host::take<std::tuple_element_t<kPlaces, Held>>(stack[kPlaces])...};
  }
};

// The schema and the host function of an op are written apart: their numbers of arguments and of results must agree.
template <typename Function>
void require_counts(const char* name, std::uint64_t arguments, std::uint64_t outputs, std::uint64_t more, std::uint64_t results) {
  if (arguments != Signature<Function>::kCount + more || outputs != results)
    throw std::runtime_error(std::string(name) + ": its schema has other arguments than its host function");
}

// An op's plan; an error's message begins with its name.
template <typename Function>
Plan plan_op(const char* name, Function function, const Device& device, const typename Signature<Function>::Held& held) {
  try {
    return Signature<Function>::plan(function, device, held);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

}  // namespace advkd::host
