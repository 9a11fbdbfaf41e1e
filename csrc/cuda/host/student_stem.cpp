#include "cuda/student_stem.h"

#include <algorithm>
#include <cmath>

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

constexpr int kFullProduct = 3, kMostPixels = 32, kMostImages = 4096, kMostChannels = 1 << 16;

// How many of the leading layers fit, and the bytes of shared memory that they need.
struct StemPlan {
  int layers;
  int bytes;
};

// As many parts of a sum as one image leaves warps without work. Only the layer counts: the bits of an image depend neither on
// the images beside it nor on the cluster.
int stem_part_shift(const StemLayer& layer) {
  const int tiles = (layer.upsample ? 4 : 1) * (layer.side > 4 ? layer.side * layer.side / 32 : 1);
  int shift = 0;
  while (tiles << (shift + 1) <= kStemWarps) ++shift;
  return shift;
}

// Sets of blocks of a cluster of 1 << `cluster_shift`: the cheapest in cycles, as student_stem.cu assumes them. A quarter of a
// multiprocessor takes 16 for a unit (a step of one tap) of 16 pixels of a column, `products` times; the L2 cache gives a
// column's 512 bytes of weights in 11; other blocks send a block's pixels, 16 bytes in one. Eighths are counted.
int stem_line_shift(const StemLayer& layer, int element, int products, int cluster_shift, int images) {
  const i64 phases = layer.upsample ? 4 : 1, columns = layer.c_out / 16, parts = 1 << layer.part_shift;
  const i64 units = (layer.upsample ? 4 : 9) * layer.c_in * element / 32;
  const i64 all = static_cast<i64>(images) * layer.side * layer.side;
  const i64 lines = phases * cover<i64>(all / 16, layer.rows);
  int best = 0;
  i64 least = -1;
  for (int shift = 0; shift <= cluster_shift; ++shift) {
    const i64 column = cover<i64>(columns, 1 << (cluster_shift - shift)), line = cover<i64>(lines, 1 << shift);
    const i64 multiply = cover<i64>(line * column * parts, 4) * (kStemWarps / parts) * 16 * layer.rows * products;
    const i64 read = 8 * 11 * column * cover<i64>(phases, 1 << shift);
    const i64 near = line * layer.rows * 16 + 2 * layer.side + 2;
    const i64 receive = layer.upsample || shift == 0 || near > all ? all : near;
    const i64 cost = std::max<i64>(multiply, read) * units + receive * layer.c_in * element / 2;
    if (least < 0 || cost < least) {
      least = cost;
      best = shift;
    }
  }
  return best;
}

void stem_split(StemLayer& layer, int element, int products, int cluster_shift, int images) {
  layer.shift = 0;
  while (1 << layer.shift < layer.side) ++layer.shift;
  layer.part_shift = stem_part_shift(layer);
  layer.rows = images * layer.side * layer.side > 16 ? 2 : 1;
  layer.line_shift = stem_line_shift(layer, element, products, cluster_shift, images);
}

// `limit`: bytes of shared memory; a cluster has 1 << `cluster_shift` blocks.
StemPlan stem_plan(StemParameters& p, i64 product, int cluster_shift, i64 limit) {
  // Bytes of a stored number, and tensor-core instructions per product.
  const int element = element_size(product_storage(product)), products = product == kFullProduct ? 3 : 1;
  StemPlan plan = {0, 0};
  i64 biases = 0, sums = 0, buffers[2] = {0, 0};
  for (int i = 0; i < p.count; ++i) {
    StemLayer& layer = p.layers[i];
    stem_split(layer, element, products, cluster_shift, p.images);
    layer.bias_place = static_cast<int>(biases / 4);
    const i64 pixels = static_cast<i64>(p.images) * layer.side * layer.side, pixel = layer.c_in * element;
    biases += 4 * layer.c_out;
    sums = std::max<i64>(sums, kStemWarps * 16 * layer.rows * kStemPitch * 4);
    buffers[i % 2] = std::max<i64>(buffers[i % 2], pixels * (pixel + 16));
    const i64 bytes = kStemZeros + biases + sums + buffers[0] + buffers[1];
    if (bytes > limit) break;
    p.bias = kStemZeros;
    p.sums = static_cast<int>(kStemZeros + biases);
    p.buffers[0] = p.sums + static_cast<int>(sums);
    p.buffers[1] = p.buffers[0] + static_cast<int>(buffers[0]);
    plan = {i + 1, static_cast<int>(bytes)};
  }
  return plan;
}

bool in_units(i64 channels) {
  return channels >= 16 && channels <= kMostChannels && channels % 16 == 0;
}

// A layer from its five numbers; it begins where the one before ends, with so many pixels to a side and channels.
void set_layer(StemParameters& p, int i, const std::int64_t* row, i64& side, i64& channels) {
  const i64 c_in = row[0], c_out = row[1], upsample = row[4];
  const bool follows = c_in == channels && in_units(c_in) && in_units(c_out);
  require(follows, "layer ", i, " must take ", channels, " channels, all in multiples of 16, got ", c_in, " and ", c_out);
  const bool sized = row[2] == side && row[3] == side && (upsample == 0 || upsample == 1);
  require(sized, "layer ", i, " must have a side of ", side, " and upsample 0 or 1, got ", row[2], "x", row[3], " and ", upsample);
  StemLayer& layer = p.layers[i];
  layer.c_in = static_cast<int>(c_in);
  layer.c_out = static_cast<int>(c_out);
  layer.side = static_cast<int>(side);
  layer.upsample = static_cast<int>(upsample);
  side *= 1 + upsample;
  channels = c_out;
  require(side <= kMostPixels, "layer ", i, " makes images of ", side, " pixels to a side, more than ", kMostPixels);
}

void set_layers(StemParameters& p, const std::vector<std::int64_t>& numbers) {
  const bool whole = !numbers.empty() && numbers.size() % 5 == 0 && numbers.size() <= 5 * kStemLayers;
  require(whole, "layers must be five numbers for each of 1 to 32 layers, got ", numbers.size(), " numbers");
  p.count = static_cast<int>(numbers.size() / 5);
  i64 side = 4, channels = numbers[0];
  for (int i = 0; i < p.count; ++i) set_layer(p, i, &numbers[5 * i], side, channels);
}

void set_tensors(
    StemParameters& p,
    const TensorView& x,
    const std::vector<TensorView>& weights,
    const std::vector<TensorView>& biases,
    const TensorView& out,
    DType storage) {
  const int element = element_size(storage);
  const StemLayer& last = p.layers[p.count - 1];
  const i64 side = last.side * (1 + last.upsample), pitch = out.dims == 4 ? out.size(3) : 0;
  const bool wide = pitch >= last.c_out && pitch <= kMostChannels && pitch % 16 == 0;
  require(wide, "out must have at least ", last.c_out, " channels, in whole units of 16, got ", out);
  p.samples = x.dims ? x.size(0) : 0;
  require_tensor("x", x, storage, {p.samples, 4, 4, p.layers[0].c_in}, x, true);
  require_tensor("out", out, storage, {p.samples, side, side, pitch}, x, true);
  p.x = x.data;
  p.out = out.data;
  p.out_pitch = static_cast<int>(pitch);
  const bool complete = weights.size() == static_cast<size_t>(p.count) && biases.size() == weights.size();
  require(complete, "there must be weights and biases for ", p.count, " layers, got ", weights.size(), " and ", biases.size());
  for (int i = 0; i < p.count; ++i) {
    StemLayer& layer = p.layers[i];
    const i64 phases = layer.upsample ? 4 : 1, taps = layer.upsample ? 4 : 9;
    const std::string place = std::string("[").append(std::to_string(i)).append("]");
    const std::initializer_list<std::int64_t> packed{phases, layer.c_in * element / 32, taps, layer.c_out / 16, 32, 16 / element};
    require_tensor("weights" + place, weights[i], storage, packed, x, true);
    require_tensor("biases" + place, biases[i], DType::f32, {layer.c_out}, x, true);
    layer.weights = weights[i].data;
    layer.bias = pointer<const float>(biases[i]);
  }
}

void require_numbers(double slope, i64 cluster, i64 images, const Device& device) {
  require(cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8, "cluster must be 1, 2, 4 or 8, got ", cluster);
  require(cluster == 1 || device.capability >= 9, "cluster must be 1 before compute capability 9.0, got ", cluster);
  require(1 <= images && images <= kMostImages, "images must be 1 to ", kMostImages, ", got ", images);
  require(std::isfinite(slope), "slope must be finite, got ", slope);
}

}  // namespace

Plan student_stem(
    const Device& device,
    const TensorView& x,
    const std::vector<TensorView>& weights,
    const std::vector<TensorView>& biases,
    const TensorView& out,
    const std::vector<std::int64_t>& layers,
    double slope,
    std::int64_t product,
    std::int64_t cluster,
    std::int64_t images) {
  const DType storage = product_storage(product);
  require_numbers(slope, cluster, images, device);
  StemParameters p{};
  p.images = static_cast<int>(images);
  p.slope = static_cast<float>(slope);
  set_layers(p, layers);
  set_tensors(p, x, weights, biases, out, storage);
  if (p.samples == 0) return {};
  const int cluster_shift = cluster == 8 ? 3 : static_cast<int>(cluster / 2);
  const StemPlan plan = stem_plan(p, product, cluster_shift, device.shared_limit);
  require(plan.layers == p.count, plan.layers, " of ", p.count, " layers fit in ", device.shared_limit,
          " bytes of shared memory with ", images, " images in a group");
  const i64 blocks = cover(p.samples, images) * cluster;
  require_launch(blocks, "x", x);
  const std::string kernel = "advkd_student_stem_cluster" + std::to_string(cluster) + "_" + kProducts[product];
  return plan_of("student_stem", kProducts[product], p, {{kernel, blocks, kThreads, plan.bytes}});
}

std::int64_t stem_layers(
    const std::vector<std::int64_t>& layers, std::int64_t product, std::int64_t images, std::int64_t shared_limit) {
  require(layers.size() % 5 == 0, "layers must be five numbers for each layer, got ", layers.size(), " numbers");
  require(1 <= images && images <= kMostImages, "images must be 1 to ", kMostImages, ", got ", images);
  StemParameters p{};
  p.images = static_cast<int>(images);
  i64 side = 4, channels = layers.empty() ? 0 : layers[0];
  for (size_t i = 0; i < layers.size() / 5 && i < kStemLayers; ++i) {
    const std::int64_t* row = &layers[5 * i];
    if (row[2] != side || row[3] != side || side * (1 + row[4]) > kMostPixels) break;
    set_layer(p, p.count++, row, side, channels);
  }
  return stem_plan(p, product, 0, shared_limit).layers;
}

}  // namespace advkd::host
