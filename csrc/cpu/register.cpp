// Registration of the CPU kernels with torch, through its stable ABI. Launchers check layout, allocate, launch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/conv_block.h"
#include "cpu/dispatch.h"
#include "cpu/philox.h"
#include "cpu/sampler_step.h"
#include "cpu/student_forward.h"
#include "cpu/threads.h"

namespace advkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// out: (samples, ...), each sample's numbers one run of memory.
template <typename Element, typename Kernel>
void launch(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, ScalarType dtype, Kernel kernel, Tensor& out) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_contiguous(), "indices must be contiguous int64");
  STD_TORCH_CHECK(
      out.scalar_type() == dtype && out.is_contiguous() && out.dim() > 0 && out.size(0) == indices.numel(),
      "out must be contiguous, a row of numbers for each index");
  if (out.numel() == 0) return;
  const PhiloxParameters p = philox_parameters(seed, stream, step, out.numel() / indices.numel());
  STD_TORCH_CHECK(p.count <= i64{1} << 34, "a sample has at most 2^34 elements");
  const i64 tiles = (p.count + 4 * kPhiloxTile - 1) / (4 * kPhiloxTile);
  const auto* index = static_cast<const std::int64_t*>(indices.const_data_ptr());
  auto* data = static_cast<Element*>(out.mutable_data_ptr());
  constexpr i64 kTilesPerTask = 32;
  spread(indices.numel() * tiles, kTilesPerTask, [&](i64 begin, i64 end) {
    for (i64 item = begin; item < end; ++item) {
      const i64 sample = item / tiles;
      kernel(static_cast<std::uint64_t>(index[sample]), item % tiles, p, data + sample * p.count);
    }
  });
}

void philox_words(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, Tensor out) {
  launch<std::int64_t>(indices, seed, stream, step, ScalarType::Long, ADVKD_DISPATCH(philox_words), out);
}

void philox_normal(const Tensor& indices, int64_t seed, int64_t stream, int64_t step, Tensor out) {
  launch<float>(indices, seed, stream, step, ScalarType::Float, ADVKD_DISPATCH(philox_normal), out);
}

StepDtype step_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return StepDtype::float32;
    case ScalarType::BFloat16: return StepDtype::bfloat16;
    case ScalarType::Half: return StepDtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "sampler_step takes float32, bfloat16 and float16");
}

const void* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// The tensors' common layout: contiguous, or NHWC.
void set_layout(SamplerStep& s, const Tensor& x) {
  const int64_t dims = x.dim();
  const bool image = dims == 4, contiguous = x.is_contiguous();
  s.samples = x.size(0);
  const i64 size = s.samples ? x.numel() / s.samples : 0;
  s.channels = contiguous ? 1 : x.size(1);
  s.planes = image && contiguous ? x.size(1) : 1;
  s.height = image ? x.size(2) : 1;
  s.width = s.height ? size / (s.planes * s.height) : 0;
  // The stride of an axis with one element is any number.
  const bool last = image && (x.size(1) == 1 || x.stride(1) == 1) && (x.size(3) == 1 || x.stride(3) == s.channels);
  STD_TORCH_CHECK(contiguous || last, "x must be contiguous or channels_last");
}

void sampler_step(
    const Tensor& x,
    const Tensor& model_output,
    const Tensor& table,
    std::optional<Tensor> previous_x0,
    std::optional<Tensor> noise,
    std::optional<Tensor> indices,
    int64_t seed,
    int64_t step,
    std::optional<Tensor> steps,
    int64_t pool,
    Tensor out,
    std::optional<Tensor> x0,
    std::optional<Tensor> pooled,
    std::optional<Tensor> flags) {
  if (x.numel() == 0) return;
  SamplerStep s{};
  set_layout(s, x);
  STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == ScalarType::Float && table.size(1) == 8, "table must be float32 (rows, 8)");
  STD_TORCH_CHECK(!indices || (indices->is_contiguous() && indices->numel() == s.samples), "one index per sample");
  STD_TORCH_CHECK(!indices || x.numel() / s.samples <= i64{1} << 34, "a sample has at most 2^34 elements");
  STD_TORCH_CHECK(!steps || steps->is_contiguous(), "steps must be contiguous");
  s.x = x.const_data_ptr();
  s.model_output = model_output.const_data_ptr();
  s.previous_x0 = pointer(previous_x0);
  s.noise = pointer(noise);
  s.out = out.mutable_data_ptr();
  s.x0 = const_cast<void*>(pointer(x0));
  s.pooled = const_cast<void*>(pointer(pooled));
  s.flags = static_cast<std::int32_t*>(const_cast<void*>(pointer(flags)));
  s.rows = static_cast<const StepRow*>(table.const_data_ptr());
  s.row_count = table.size(0);
  s.indices = static_cast<const std::int64_t*>(pointer(indices));
  s.steps = static_cast<const std::int64_t*>(pointer(steps));
  s.step_count = steps ? steps->numel() : 0;
  s.philox = philox_parameters(seed, PhiloxStream::step, steps ? 0 : step, 0);
  s.pool = pool;
  s.dtype = step_dtype(x);
  s.model_dtype = step_dtype(model_output);
  // What is larger than the caches goes past them, but for a step in place, whose lines are there already.
  constexpr i64 kCached = i64{4} << 20;
  s.stream = s.out != s.x && s.out != s.model_output && x.numel() * (s.dtype == StepDtype::float32 ? 4 : 2) > kCached;
  constexpr i64 kElementsPerTask = 1 << 15;
  const i64 pieces = s.samples * step_pieces_per_sample(s), grain = std::max<i64>(1, kElementsPerTask / step_piece(s));
  const SamplerStepKernel kernel = ADVKD_DISPATCH(sampler_step);
  spread(pieces, grain, [&](i64 begin, i64 end) { kernel(s, begin, end); });
}

// The student's convolutions.

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
      weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.numel() == layer.c_out * layer.c_in * 9,
      "weight must be contiguous float32 (c_out, c_in, 3, 3)");
  STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == layer.c_out, "bias must be contiguous float32 (c_out,)");
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
      x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == images * layer.c_in * layer.height * layer.width,
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
      z.scalar_type() == ScalarType::Float && z.is_contiguous() && z.dim() == 2 && z.size(1) == numel, "z must be contiguous float32 (N, latent_numel)");
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
double product_rate(int64_t storage, double seconds) {
  const i64 workers = threads();
  std::vector<double> rates(workers);
  const auto kind = static_cast<Storage>(storage);
  const std::function<void(i64)> measure = [&](i64 worker) { rates[worker] = conv_kernels().product_rate(kind, seconds); };
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

std::vector<int64_t> crowded(int64_t threads, std::vector<int64_t> allowed, std::vector<int64_t> kept) {
  const std::vector<int> processors = crowded_processors(threads, {allowed.begin(), allowed.end()}, {kept.begin(), kept.end()});
  return {processors.begin(), processors.end()};
}

std::string isa() {
  return kIsaNames[static_cast<int>(current_isa())];
}

}  // namespace
}  // namespace advkd

STABLE_TORCH_LIBRARY(advkd_cpu, m) {
  m.def("philox_words(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()");
  m.def("philox_normal(Tensor indices, int seed, int stream, int step, Tensor(a!) out) -> ()");
  m.def(
      "sampler_step(Tensor x, Tensor model_output, Tensor table, Tensor? previous_x0, Tensor? noise, Tensor? indices, int seed, "
      "int step, Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? pooled, Tensor(d!)? flags) -> ()");
  m.def("conv_pack(Tensor weight, Tensor bias, int[] layer) -> Tensor");
  m.def("conv_block(Tensor x, Tensor packed, int[] layer, float slope) -> Tensor");
  m.def("student_forward(Tensor z, Tensor[] packed, int[] layers, float slope) -> Tensor");
  m.def("conv_seconds(Tensor packed, int[] layer, int images, int repeats) -> float");
  m.def("conv_products(int[] layer) -> int[]");
  m.def("workspace_bytes(int[] layers, int images) -> int");
  m.def("clear_workspaces() -> int");
  m.def("product_rate(int storage, float seconds) -> float");
  m.def("crowded(int threads, int[] allowed, int[] kept) -> int[]");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&advkd::philox_words));
  m.impl("philox_normal", TORCH_BOX(&advkd::philox_normal));
  m.impl("sampler_step", TORCH_BOX(&advkd::sampler_step));
  m.impl("conv_pack", TORCH_BOX(&advkd::conv_pack));
  m.impl("conv_block", TORCH_BOX(&advkd::conv_block));
  m.impl("student_forward", TORCH_BOX(&advkd::student_forward));
  m.impl("conv_seconds", TORCH_BOX(&advkd::conv_seconds));
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("conv_products", TORCH_BOX(&advkd::conv_products));
  m.impl("workspace_bytes", TORCH_BOX(&advkd::workspace_bytes));
  m.impl("clear_workspaces", TORCH_BOX(&advkd::clear_workspaces));
  m.impl("product_rate", TORCH_BOX(&advkd::product_rate));
  m.impl("crowded", TORCH_BOX(&advkd::crowded));
  m.impl("isa", TORCH_BOX(&advkd::isa));
}
