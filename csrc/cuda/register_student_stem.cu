// The launcher of student_stem: it checks layers and layouts, plans and starts the kernel.

#include "cuda/register.h"
#include "cuda/student_stem.cu"

namespace advkd::stem {
namespace {

using torch::stable::accelerator::DeviceGuard;

using StemKernel = void (*)(StemParameters);
// [product][log2 of the cluster].
struct StemKernels {
  StemKernel entries[4];
};
#define ADVKD_STEM_POINTERS(PRODUCT)                                                                  \
  StemKernels{{advkd_student_stem_cluster1_##PRODUCT, advkd_student_stem_cluster2_##PRODUCT,          \
               advkd_student_stem_cluster4_##PRODUCT, advkd_student_stem_cluster8_##PRODUCT}},
const StemKernels kStemKernels[] = {ADVKD_PRODUCTS(ADVKD_STEM_POINTERS)};
#undef ADVKD_STEM_POINTERS
constexpr ScalarType kStorage[] = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Float};
constexpr int kFullProduct = 3, kMostSide = 32, kMostImages = 4096, kMostChannels = 1 << 16;

// The tensor's storage, where its sides, dtype, device and layout are these.
void* checked(const char* name, const Tensor& t, const std::vector<int64_t>& sides, ScalarType dtype, const Tensor& x) {
  bool fits = t.dim() == static_cast<int64_t>(sides.size()) && t.scalar_type() == dtype && t.is_contiguous() &&
              t.get_device() == x.get_device();
  for (size_t i = 0; fits && i < sides.size(); ++i) fits = t.size(i) == sides[i];
  STD_TORCH_CHECK(fits, "student_stem: ", name, " has the wrong shape, dtype, layout or device");
  void* data = t.mutable_data_ptr();
  STD_TORCH_CHECK(aligned({data}), "student_stem: ", name, " must be aligned to 16 bytes");
  return data;
}

// Layers from rows of five numbers, each beginning where the one before ends.
void set_layers(StemParameters& p, const std::vector<int64_t>& numbers) {
  const bool whole = !numbers.empty() && numbers.size() % 5 == 0 && numbers.size() <= 5 * kStemLayers;
  STD_TORCH_CHECK(whole, "student_stem: layers must be five numbers for each of 1 to 32 layers");
  p.count = static_cast<int>(numbers.size() / 5);
  int64_t side = 4, channels = numbers[0];
  for (int i = 0; i < p.count; ++i) {
    const int64_t *row = &numbers[5 * i], c_in = row[0], c_out = row[1], upsample = row[4];
    const bool sized = c_in >= 16 && c_out >= 16 && c_in <= kMostChannels && c_out <= kMostChannels;
    const bool follows = c_in == channels && c_in % 16 == 0 && c_out % 16 == 0 && row[2] == side && row[3] == side;
    const bool known = upsample == 0 || upsample == 1;
    STD_TORCH_CHECK(sized && follows && known, "student_stem: layer ", i, " does not follow the one before, from a side of 4");
    p.layers[i].c_in = static_cast<int>(c_in);
    p.layers[i].c_out = static_cast<int>(c_out);
    p.layers[i].side = static_cast<int>(side);
    p.layers[i].upsample = static_cast<int>(upsample);
    side *= 1 + upsample;
    channels = c_out;
    STD_TORCH_CHECK(side <= kMostSide, "student_stem: layer ", i, " makes images of more than 32 pixels to a side");
  }
}

void set_tensors(
    StemParameters& p,
    const Tensor& x,
    const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases,
    const Tensor& out,
    ScalarType dtype) {
  const int element = dtype == ScalarType::Float ? 4 : 2;
  const StemLayer& last = p.layers[p.count - 1];
  const int64_t side = last.side * (1 + last.upsample), pitch = out.dim() == 4 ? out.size(3) : 0;
  const bool wide = pitch >= last.c_out && pitch <= kMostChannels && pitch % 16 == 0;
  STD_TORCH_CHECK(wide, "student_stem: out must have at least the last layer's channels, in whole units of 16");
  p.samples = x.dim() ? x.size(0) : 0;
  p.x = checked("x", x, {p.samples, 4, 4, p.layers[0].c_in}, dtype, x);
  p.out = checked("out", out, {p.samples, side, side, pitch}, dtype, x);
  p.out_pitch = static_cast<int>(pitch);
  const bool complete = weights.size() == static_cast<size_t>(p.count) && biases.size() == weights.size();
  STD_TORCH_CHECK(complete, "student_stem: there must be weights and a bias for every layer");
  for (int i = 0; i < p.count; ++i) {
    StemLayer& layer = p.layers[i];
    const int64_t phases = layer.upsample ? 4 : 1, taps = layer.upsample ? 4 : 9;
    const std::vector<int64_t> packed{phases, layer.c_in * element / 32, taps, layer.c_out / 16, 32, 16 / element};
    layer.weights = checked("weights", weights[i], packed, dtype, x);
    layer.bias = static_cast<const float*>(checked("biases", biases[i], {layer.c_out}, ScalarType::Float, x));
  }
}

// See student_stem in advkd/ops/cupy_student_stem.py.
void student_stem(
    const Tensor& x,
    std::vector<Tensor> weights,
    std::vector<Tensor> biases,
    Tensor out,
    std::vector<int64_t> layers,
    double slope,
    int64_t product,
    int64_t cluster,
    int64_t images) {
  constexpr const char* kName = "student_stem";
  STD_TORCH_CHECK(product >= 0 && product < 4, kName, ": product must be 0 to 3");
  STD_TORCH_CHECK(cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8, kName, ": cluster must be 1, 2, 4 or 8");
  STD_TORCH_CHECK(images >= 1 && images <= kMostImages, kName, ": images must be 1 to 4096");
  STD_TORCH_CHECK(slope - slope == 0, kName, ": slope must be finite");
  StemParameters p{};
  p.images = static_cast<int>(images);
  p.slope = static_cast<float>(slope);
  set_layers(p, layers);
  set_tensors(p, x, weights, biases, out, kStorage[product]);
  if (p.samples == 0) return;
  const int device = x.get_device();
  DeviceGuard guard(device);
  const bool able = cluster == 1 || device_attribute(x, cudaDevAttrComputeCapabilityMajor) >= 9;
  STD_TORCH_CHECK(able, kName, ": cluster must be 1 before compute capability 9.0");
  const int limit = device_attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int element = product < 2 ? 2 : 4, products = product == kFullProduct ? 3 : 1;
  const int cluster_shift = cluster == 8 ? 3 : static_cast<int>(cluster / 2);
  const StemPlan plan = stem_plan(p, element, products, cluster_shift, limit);
  STD_TORCH_CHECK(plan.layers == p.count, kName, ": ", plan.layers, " of ", p.count, " layers fit in shared memory");
  const i64 blocks = stem_cover(p.samples, images) * cluster;
  STD_TORCH_CHECK(blocks <= kMostBlocks, kName, ": x is too large for one launch");
  const StemKernel kernel = kStemKernels[product].entries[cluster_shift];
  allow_shared_memory(kName, kernel, plan.bytes, x);
  kernel<<<static_cast<unsigned>(blocks), kThreads, plan.bytes, static_cast<cudaStream_t>(current_stream(x))>>>(p);
  check_launch(kName);
}

}  // namespace
}  // namespace advkd::stem

STABLE_TORCH_LIBRARY_FRAGMENT(advkd_cuda, m) {
  m.def(
      "student_stem(Tensor x, Tensor[] weights, Tensor[] biases, Tensor(a!) out, int[] layers, float slope, int product, "
      "int cluster, int images) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(advkd_cuda, CUDA, m) {
  m.impl("student_stem", TORCH_BOX(&advkd::stem::student_stem));
}
