// Registration of the student: its convolutions one by one, the whole forward pass, and what plans measure.

#include <algorithm>
#include <memory>

#include "cpu/student_forward.h"
#include "cpu/torch/common.h"

namespace advkd {
namespace {

const ConvKernels& conv_kernels() {
  return conv_kernels_of(current_isa());
}

const Parallel kTorchThreads = [](i64 workers, const std::function<void(i64)>& body) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
  });
};

const Parallel kParallel = [](i64 workers, const std::function<void(i64)>& body) {
  const std::vector<int> processors = crowded_processors(workers);
  processors.empty() ? kTorchThreads(workers, body) : run_with_companions(workers, workers, processors, body);
};

ScalarType scalar_type(Storage storage) {
  return storage == Storage::float32 ? ScalarType::Float : ScalarType::BFloat16;
}

// A layer as integers: c_in, c_out, height, width, upsample, activation, storage, algorithm, detail.
constexpr size_t kLayerNumbers = 9;

std::vector<StudentLayer> parse_layers(const std::vector<int64_t>& numbers, double slope) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kLayerNumbers == 0, "layers must hold 9 integers each");
  std::vector<StudentLayer> layers;
  for (auto n = numbers.begin(); n != numbers.end(); n += kLayerNumbers) {
    STD_TORCH_CHECK(n[0] > 0 && n[1] > 0 && n[2] > 0 && n[3] > 0, "channels and sides must be positive");
    STD_TORCH_CHECK(n[8] >= 0 && n[8] < n[0], "detail must be some of the input channels");
    STD_TORCH_CHECK(n[5] >= 0 && n[5] <= 2 && n[6] >= 0 && n[6] <= 1, "unknown activation or storage");
    STD_TORCH_CHECK(n[7] >= 0 && n[7] < kAlgorithms, "unknown algorithm");
    const ConvLayer conv{
        n[0], n[1], n[2], n[3], n[4] != 0, static_cast<Activation>(n[5]), static_cast<float>(slope),
        static_cast<Storage>(n[6]), static_cast<Algorithm>(n[7])};
    STD_TORCH_CHECK(conv.algorithm != Algorithm::dot || (conv.c_out <= 4 && !conv.upsample), "dot makes at most 4 channels, without up-sampling");
    layers.push_back({conv, nullptr, n[8]});
  }
  return layers;
}

Tensor conv_pack(const Tensor& weight, const Tensor& bias, std::vector<int64_t> numbers) {
  const ConvLayer layer = parse_layers(numbers, 0).front().conv;
  STD_TORCH_CHECK(
      is_contiguous(weight, ScalarType::Float) && weight.numel() == layer.c_out * layer.c_in * 9,
      "weight must be contiguous float32 (c_out, c_in, 3, 3)");
  STD_TORCH_CHECK(is_contiguous(bias, ScalarType::Float) && bias.numel() == layer.c_out, "bias must be contiguous float32 (c_out,)");
  const std::vector<int64_t> shape{conv_kernels().packed_bytes(layer)};
  Tensor packed = torch::stable::new_empty(weight, shape, ScalarType::Byte);
  conv_kernels().pack(layer, static_cast<const float*>(weight.const_data_ptr()), static_cast<const float*>(bias.const_data_ptr()), packed.mutable_data_ptr());
  return packed;
}

const void* checked_packed(const Tensor& packed, const ConvLayer& layer) {
  STD_TORCH_CHECK(
      packed.is_contiguous() && packed.numel() == conv_kernels().packed_bytes(layer) &&
          conv_kernels().fits(layer, packed.const_data_ptr()),
      "packed weights are of another layer or of another processor: pack them here");
  return packed.const_data_ptr();
}

Tensor conv_block(const Tensor& x, const Tensor& packed, std::vector<int64_t> numbers, double slope) {
  const ConvLayer layer = parse_layers(numbers, slope).front().conv;
  const i64 images = x.size(0), s = layer.scale();
  STD_TORCH_CHECK(
      is_contiguous(x, ScalarType::Float) && x.numel() == images * layer.c_in * layer.height * layer.width,
      "x must be contiguous float32 (N, c_in, height, width)");
  const std::vector<int64_t> shape{images, layer.c_out, s * layer.height, s * layer.width};
  Tensor out = torch::stable::new_empty(x, shape, scalar_type(layer.storage));
  if (images == 0) return out;
  conv_block_forward(
      conv_kernels(), layer, checked_packed(packed, layer), static_cast<const float*>(x.const_data_ptr()), images,
      out.mutable_data_ptr(), threads(), kParallel);
  return out;
}

std::vector<StudentLayer> student_layers(const std::vector<Tensor>& packed, const std::vector<int64_t>& numbers, double slope) {
  std::vector<StudentLayer> layers = parse_layers(numbers, slope);
  STD_TORCH_CHECK(packed.size() == layers.size(), "one packed tensor per layer");
  STD_TORCH_CHECK(layers.front().detail == 0, "the first layer's input is the latent's first part: it has no detail");
  STD_TORCH_CHECK(layers.back().conv.algorithm == Algorithm::dot, "the last layer must be `dot`");
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].packed = checked_packed(packed[i], layers[i].conv);
    const ConvLayer& next = layers[std::min(i + 1, layers.size() - 1)].conv;
    const i64 s = layers[i].conv.scale();
    STD_TORCH_CHECK(
        i + 1 == layers.size() ||
            (next.height == s * layers[i].conv.height && next.width == s * layers[i].conv.width &&
             next.c_in == layers[i].conv.c_out + layers[i + 1].detail && next.storage == layers[i].conv.storage &&
             layers[i].conv.algorithm != Algorithm::dot),
        "the layers do not follow each other, or `dot` is not the last");
  }
  return layers;
}

Tensor student_forward(const Tensor& z, std::vector<Tensor> packed, std::vector<int64_t> numbers, double slope) {
  const std::vector<StudentLayer> layers = student_layers(packed, numbers, slope);
  i64 numel = 0;
  for (size_t i = 0; i < layers.size(); ++i)
    numel += (i == 0 ? layers[i].conv.c_in : layers[i].detail) * layers[i].conv.height * layers[i].conv.width;
  STD_TORCH_CHECK(
      is_contiguous(z, ScalarType::Float) && z.dim() == 2 && z.size(1) == numel, "z must be contiguous float32 (N, latent_numel)");
  const ConvLayer& head = layers.back().conv;
  const i64 images = z.size(0);
  const std::vector<int64_t> shape{images, head.c_out, head.height, head.width};
  Tensor out = torch::stable::new_empty(z, shape, scalar_type(head.storage));
  if (images == 0) return out;
  // Read once: another thread may change it.
  const i64 workers = threads();
  auto workspace = acquire_workspace(student_workspace_bytes(conv_kernels(), layers, images, workers));
  run_student(
      conv_kernels(), layers, static_cast<const float*>(z.const_data_ptr()), images, out.mutable_data_ptr(), workers, kParallel,
      workspace->data());
  release_workspace(std::move(workspace));
  return out;
}

int64_t workspace_bytes(std::vector<int64_t> numbers, int64_t images) {
  return Workspace::rounded(student_workspace_bytes(conv_kernels(), parse_layers(numbers, 0), images, threads()));
}

double conv_seconds(const Tensor& packed, std::vector<int64_t> numbers, int64_t images, int64_t repeats) {
  STD_TORCH_CHECK(images > 0 && repeats > 0, "images and repeats must be positive");
  const ConvLayer layer = parse_layers(numbers, 0.2).front().conv;
  return conv_block_seconds(conv_kernels(), layer, checked_packed(packed, layer), images, repeats, threads(), kParallel);
}

// Multiply-adds per second of all threads together.
double all_threads_rate(int64_t storage, double seconds) {
  const i64 workers = threads();
  std::vector<double> rates(workers);
  const auto kind = static_cast<Storage>(storage);
  const std::function<void(i64)> measure = [&](i64 worker) { rates[worker] = product_rate(conv_kernels(), kind, seconds); };
  kTorchThreads(workers, measure);
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

// Multiply-adds of one image: as the algorithm does them, and as the layer is defined.
std::vector<int64_t> conv_products(std::vector<int64_t> numbers) {
  const ConvLayer layer = parse_layers(numbers, 0).front().conv;
  return {products_per_image(layer), direct_products_per_image(layer)};
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cpu, m) {
  m.def("conv_pack(Tensor weight, Tensor bias, int[] layer) -> Tensor");
  m.def("conv_block(Tensor x, Tensor packed, int[] layer, float slope) -> Tensor");
  m.def("student_forward(Tensor z, Tensor[] packed, int[] layers, float slope) -> Tensor");
  m.def("conv_seconds(Tensor packed, int[] layer, int images, int repeats) -> float");
  m.def("conv_products(int[] layer) -> int[]");
  m.def("workspace_bytes(int[] layers, int images) -> int");
  m.def("clear_workspaces() -> int");
  m.def("product_rate(int storage, float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&advkd::conv_pack));
  m.impl("conv_block", TORCH_BOX(&advkd::conv_block));
  m.impl("student_forward", TORCH_BOX(&advkd::student_forward));
  m.impl("conv_seconds", TORCH_BOX(&advkd::conv_seconds));
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("conv_products", TORCH_BOX(&advkd::conv_products));
  m.impl("workspace_bytes", TORCH_BOX(&advkd::workspace_bytes));
  m.impl("clear_workspaces", TORCH_BOX(&advkd::clear_workspaces));
  m.impl("product_rate", TORCH_BOX(&advkd::all_threads_rate));
}
