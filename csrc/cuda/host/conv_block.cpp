// The plan of a convolution's tiles is a search: of every candidate the cycles are predicted, and the least taken.

#include "cuda/conv_block.h"

#include <algorithm>
#include <array>
#include <map>

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

constexpr int kUnit = 16;  // channels come in multiples of it

constexpr ConvShape kConvShapes[] = {{4, 4, 1}, {4, 3, 1}, {4, 2, 2}, {4, 1, 2}, {2, 2, 2}, {1, 1, 2}};
constexpr int kConvShapeCount = 6;
constexpr i64 kMostConvTiles = i64{1} << 30;

// The inputs of a plan beside the sizes: bytes of an element, whether a product is three, and the device.
struct ConvDevice {
  int element, split;
  int multiprocessors, shared_limit;  // bytes of shared memory that a block may have
};

int conv_log(i64 n) {
  int log = 0;
  while (i64{1} << log < n) ++log;
  return log;
}

// The tile of so many pixels that fits x best. Whether it is not mostly empty.
bool conv_tile(ConvBlockParameters& p, int log_pixels) {
  p.log_width = std::min(conv_log(p.width), log_pixels >= 9 ? 5 : 4);
  p.log_width = std::min(p.log_width, log_pixels);
  p.log_height = std::min(conv_log(p.height), log_pixels - p.log_width);
  p.tile_images = 1 << (log_pixels - p.log_width - p.log_height);
  p.halo_height = (1 << p.log_height) + p.side - 1;
  p.halo_width = (1 << p.log_width) + p.side - 1;
  p.tile_rows = static_cast<int>(cover<i64>(p.height, i64{1} << p.log_height));
  p.tile_columns = static_cast<int>(cover<i64>(p.width, i64{1} << p.log_width));
  return p.tile_images == 1 || p.tile_images <= 1 << conv_log(p.images);
}

i64 conv_tiles(const ConvBlockParameters& p) {
  return cover<i64>(p.images, p.tile_images) * p.tile_rows * p.tile_columns;
}

// Chunks, stages and their place: as many blocks on a multiprocessor as its registers hold, a stage to spare, large chunks;
// what cannot be had is given up from the last to the first. `weights`: bytes of one step's in the block; `before`: bytes of
// shared memory for other things. The number of blocks on a multiprocessor, or 0.
int conv_fit(ConvBlockParameters& p, const ConvDevice& device, int most_blocks, int resident, int weights, int before) {
  const i64 halo = static_cast<i64>(p.tile_images) * p.halo_height * p.halo_width;
  const i64 stay = resident ? i64{p.steps} * weights : 0, place = before + stay;
  for (int blocks = most_blocks; blocks >= 1; --blocks) {
    const i64 room = (device.shared_limit + 1024) / blocks - 1024 - place;
    for (int least = 3; least >= 2; --least)
      for (int chunk = 4; chunk >= 1; --chunk) {
        const i64 stage = halo * (32 * chunk + 16) + (resident ? 0 : i64{chunk} * weights);
        if (p.steps % chunk != 0 || room < least * stage) continue;
        p.chunk = chunk;
        p.chunks = p.steps / chunk;
        p.stages = static_cast<int>(clamp<i64>(room / stage, 4));
        p.resident = resident;
        p.stages_place = static_cast<int>(place);
        p.stage_bytes = static_cast<int>(stage);
        p.shared_bytes = p.stages_place + p.stages * p.stage_bytes;
        return blocks;
      }
  }
  return 0;
}

// Shares out the tiles among as many blocks as run at a time. `per_tile`: blocks that one tile takes. Turns of a block.
i64 conv_share(ConvBlockParameters& p, const ConvDevice& device, int blocks, int per_tile) {
  const i64 tiles = conv_tiles(p), most = clamp<i64>(i64{blocks} * device.multiprocessors / per_tile, tiles);
  const i64 turns = cover<i64>(tiles, most);
  p.tiles = static_cast<int>(clamp<i64>(tiles, kMostConvTiles));
  p.walkers = static_cast<int>(cover<i64>(tiles, turns));
  return turns;
}

// Predicted cycles, by which plans are compared: a block's products (6 cycles on one of four tensor cores), its reads of shared
// memory (128 bytes a cycle) and of device memory and L2 (16 bytes a cycle), or a chain of dependent steps (40 cycles each).
i64 conv_cost(const ConvBlockParameters& p, const ConvDevice& device, const ConvShape& shape, int blocks, i64 turns) {
  const i64 taps = p.side * p.side, work = cover<i64>(p.steps * taps, p.parts);
  const i64 grid = i64{p.walkers} * p.channel_blocks * p.phases;
  const i64 active = clamp<i64>(cover<i64>(grid, device.multiprocessors), blocks);
  const i64 rounds = turns * cover<i64>(grid, active * device.multiprocessors);
  const i64 products = work * shape.rows * shape.columns * (device.split ? 72 : 24);
  const i64 reads = work * (shape.rows + shape.columns) * 32;
  const i64 halo = i64{p.tile_images} * p.halo_height * p.halo_width * p.steps * 32;
  const i64 weights = p.steps * taps * shape.columns * p.channel_warps * 512;
  const i64 made = i64{256} * shape.rows * p.pixel_warps * shape.columns * p.channel_warps * device.element;
  const i64 bytes = halo + made + (p.resident ? 0 : weights);
  i64 busiest = products > reads ? products : reads;
  busiest = active * (busiest > bytes / 16 ? busiest : bytes / 16);
  const i64 chain = work * 40;
  // Time that does not overlap: a part of the copies, the begin and the end of a tile, weights that come first.
  const i64 rest = active * bytes / 64 + 600, first = p.resident ? active * weights / 16 : 0;
  return rounds * ((busiest > chain ? busiest : chain) + rest) + first;
}

// Whether a warp's sums of `shape` by `channel_warps` warps suit the layer, whose best width of sums is `best`.
bool conv_suits(const ConvBlockParameters& p, const ConvShape& shape, int best, int channel_warps, int parts) {
  const bool small = shape.rows * shape.columns == 1;
  // tanh of many sums would be long code for a layer that has few channels.
  if (!small && (parts > 1 || p.activation == 2)) return false;
  if (shape.rows == 4 && shape.columns != best) return false;
  return (channel_warps == 1 || shape.columns * channel_warps / 2 < p.columns) && parts * channel_warps <= kConvWarps;
}

// The one of 16 x 1 to 4 channels with the least reads of shared memory.
int conv_best_columns(int columns) {
  int best = 4;
  for (int c = 3; c >= 1; --c)
    if (cover<i64>(columns, c) * (c + 4) < cover<i64>(columns, best) * (best + 4)) best = c;
  return best;
}

// One candidate's plan; its predicted cycles, or -1 where it does not fit.
i64 conv_layer_try(
    ConvBlockParameters& p, const ConvDevice& device, int shape_index, int channel_warps, int parts, int resident) {
  const ConvShape& shape = kConvShapes[shape_index];
  p.shape = shape_index;
  p.channel_warps = channel_warps;
  p.parts = parts;
  p.pixel_warps = kConvWarps / (channel_warps * parts);
  const int log_pixels = conv_log(16 * shape.rows * p.pixel_warps);
  if (!conv_tile(p, log_pixels) && log_pixels > 4) return -1;
  p.channel_blocks = static_cast<int>(cover<i64>(p.columns, shape.columns * channel_warps));
  const int weights = p.side * p.side * shape.columns * channel_warps * 512;
  const int before = kConvWarps * conv_store_bytes(shape.columns, device.element);
  // Full float32 takes more registers for the parts of its operands.
  const int most = device.split && shape.rows * shape.columns >= 8 ? 1 : shape.blocks;
  const int blocks = conv_fit(p, device, most, resident, weights, before);
  if (blocks == 0) return -1;
  const i64 turns = conv_share(p, device, blocks, p.channel_blocks * p.phases);
  return conv_cost(p, device, shape, blocks, turns);
}

// The candidate with the least predicted cycles. Whether there is one.
bool conv_layer_plan(ConvBlockParameters& p, const ConvDevice& device) {
  i64 least = -1;
  ConvBlockParameters candidate = p;
  const int best = conv_best_columns(p.columns);
  for (int shape = 0; shape < kConvShapeCount; ++shape)
    for (int channel_warps = 1; channel_warps <= kConvWarps; channel_warps *= 2)
      for (int parts = 1; parts <= kConvWarps; parts *= 2)
        for (int resident = 1; resident >= 0; --resident) {
          if (!conv_suits(p, kConvShapes[shape], best, channel_warps, parts)) continue;
          const i64 cost = conv_layer_try(candidate, device, shape, channel_warps, parts, resident);
          if (cost < 0 || (least >= 0 && cost >= least)) continue;
          least = cost;
          p = candidate;
        }
  return least >= 0 && conv_tiles(p) < kMostConvTiles;
}

// Tiles of 8 x 32 pixels of the image. Whether one fits.
bool conv_image_plan(ConvBlockParameters& p, const ConvDevice& device) {
  p.log_height = 3;
  p.log_width = 5;
  p.tile_images = 1;
  p.halo_height = 10;
  p.halo_width = 34;
  p.tile_rows = static_cast<int>(cover<i64>(p.height, 8));
  p.tile_columns = static_cast<int>(cover<i64>(p.width, 32));
  p.shape = p.columns - 1;
  p.pixel_warps = kConvWarps;
  p.channel_warps = p.parts = p.channel_blocks = 1;
  // The nine taps' results for a tile with its halo: planes of float32, see conv_image.
  const int before = 9 * p.channels * kImagePlane * 4;
  const int blocks = conv_fit(p, device, 2, 0, p.columns * 512, before);
  if (blocks == 0) return false;
  conv_share(p, device, blocks, 1);
  return conv_tiles(p) < kMostConvTiles;
}

// conv_layer_plan, which takes some microseconds, once for every layer and batch that a thread meets.
bool plan_layer(ConvBlockParameters& p, const ConvDevice& d) {
  thread_local std::map<std::array<int, 12>, ConvBlockParameters> plans;
  const std::array<int, 12> key{p.images, p.height, p.width, p.steps, p.columns, p.channels, p.phases, p.activation, d.element,
                                d.split, d.multiprocessors, d.shared_limit};
  const auto known = plans.find(key);
  if (known == plans.end()) {
    if (!conv_layer_plan(p, d)) return false;
    if (plans.size() == 1024) plans.clear();
    plans.emplace(key, p);
    return true;
  }
  ConvBlockParameters plan = known->second;
  plan.x = p.x;
  plan.weights = p.weights;
  plan.bias = p.bias;
  plan.out = p.out;
  plan.slope = p.slope;
  p = plan;
  return true;
}

// Sizes and pointers after the checks that both kernels share.
ConvBlockParameters conv_parameters(
    const TensorView& x,
    const TensorView& weights,
    const TensorView& bias,
    const TensorView& out,
    i64 activation,
    double slope,
    DType storage) {
  require_activation(activation);
  const bool shaped = x.dims == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0 && x.size(3) % kUnit == 0;
  require(shaped, "x must have shape (N, H, W, C) with channels in units of 16, got ", x);
  const i64 n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  const bool small = n < kMostConvTiles && h < kMostConvTiles && w < kMostConvTiles && c < kMostConvTiles;
  require(small, "x must have sides below 2^30, got ", x);
  require_tensor("x", x, storage, {n, h, w, c}, x, true);
  require(bias.dims == 1, "bias must have one dimension, got ", bias);
  require_tensor("bias", bias, DType::f32, {bias.size(0)}, x, false);
  ConvBlockParameters p{};
  p.x = x.data;
  p.weights = weights.data;
  p.bias = pointer<const float>(bias);
  p.out = out.data;
  p.images = static_cast<int>(n);
  p.height = static_cast<int>(h);
  p.width = static_cast<int>(w);
  p.steps = static_cast<int>(c * element_size(storage) / 32);
  p.activation = static_cast<int>(activation);
  // LeakyReLU with the slope 1 is no activation.
  p.slope = activation ? static_cast<float>(slope) : 1.0f;
  return p;
}

Plan conv_launch(const std::string& kernel, const char* variant, const ConvBlockParameters& p, i64 blocks) {
  return plan_of("conv_block", variant, p, {{kernel + variant, blocks, kConvThreads, p.shared_bytes}});
}

}  // namespace

Plan conv_layer(
    const Device& device,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& bias,
    const TensorView& out,
    bool upsample,
    std::int64_t activation,
    double slope,
    std::int64_t product) {
  const DType storage = product_storage(product);
  ConvBlockParameters p = conv_parameters(x, weights, bias, out, activation, slope, storage);
  const int element = element_size(storage), scale = upsample ? 2 : 1;
  const i64 c_out = bias.size(0);
  const bool units = c_out > 0 && c_out % kUnit == 0 && c_out < kMostConvTiles;
  require(units, "bias must have channels in units of 16, got ", bias);
  p.columns = static_cast<int>(c_out / kUnit);
  p.side = upsample ? 2 : 3;
  p.phases = upsample ? 4 : 1;
  require_tensor("weights", weights, storage, {p.phases, p.steps, p.side * p.side, p.columns, 32, 16 / element}, x, true);
  const i64 channels = out.dims == 4 ? out.size(3) : 0;
  const bool enough = channels >= c_out && channels % kUnit == 0 && channels < kMostConvTiles;
  require(enough, "out must have channels in units of 16, at least ", c_out, ", got ", out);
  require_tensor("out", out, storage, {p.images, scale * x.size(1), scale * x.size(2), channels}, x, true);
  if (x.numel() == 0) return {};
  p.channels = static_cast<int>(channels);
  const bool planned = plan_layer(p, {element, product == 3, device.multiprocessors, device.shared_limit});
  require(planned, "no tile of such a layer fits the device: x ", x, ", ", c_out, " channels out");
  const ConvShape& shape = kConvShapes[p.shape];
  const std::string kernel = "advkd_conv_layer_" + std::to_string(shape.rows) + "x" + std::to_string(shape.columns) + "_";
  return conv_launch(kernel, kProducts[product], p, i64{p.walkers} * p.channel_blocks * p.phases);
}

Plan conv_image(
    const Device& device,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& bias,
    const TensorView& out,
    std::int64_t activation,
    double slope,
    std::int64_t product) {
  const DType storage = product_storage(product);
  ConvBlockParameters p = conv_parameters(x, weights, bias, out, activation, slope, storage);
  const int element = element_size(storage);
  const i64 c_out = bias.size(0);
  require(1 <= c_out && c_out <= 4, "bias must have 1 to 4 channels, got ", bias);
  p.channels = static_cast<int>(c_out);
  p.columns = static_cast<int>(cover(9 * c_out, kUnit));
  // A tap is a part of the columns.
  p.side = p.phases = 1;
  require_tensor("weights", weights, storage, {1, p.steps, 1, p.columns, 32, 16 / element}, x, true);
  require_tensor("out", out, storage, {p.images, c_out, p.height, p.width}, x, false);
  if (x.numel() == 0) return {};
  const bool planned = conv_image_plan(p, {element, false, device.multiprocessors, device.shared_limit});
  require(planned, "no tile of such an image fits the device: x ", x);
  return conv_launch("advkd_conv_image_" + std::to_string(p.columns) + "_", kProducts[product], p, p.walkers);
}

}  // namespace advkd::host
