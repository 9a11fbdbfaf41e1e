#include "cuda/conv_pair.h"

#include "cuda/host/ops.h"

namespace advkd::host {
namespace {

// For pair_quotient(n, divisor), exact while n * divisor < 2^20 and n / divisor < 2^12.
u32 pair_divisor(int divisor) {
  return (1u << 20) / static_cast<u32>(divisor) + 1;
}

void pair_try(ConvPairParameters& p, int height, int width, int element) {
  const PairTile tile = pair_tile(height, width, p.upsample != 0);
  const int mid = tile.mid_height * tile.mid_width, units = p.c_mid / 16;
  const int input = tile.input_height * tile.input_width * pair_pitch(p.c_in, element);
  const int output = p.image ? mid * pair_image_pitch(p.c_out) * 4 : height * width * pair_pitch(p.c_out, element);
  p.tile_height = height;
  p.tile_width = width;
  p.down = static_cast<int>(cover(static_cast<i64>(p.height) << p.upsample, height));
  p.across = static_cast<int>(cover(static_cast<i64>(p.width) << p.upsample, width));
  p.blocks = p.samples * p.down * p.across;
  // The pixels of a whole tile are enough for eight warps; of a part of it two share the channels, as do two turns of more than
  // 48, for which there are no registers.
  p.columns = height * width < 256 || units > 3 ? cover(units, 2) : units;
  p.mid_place = input > output ? input : output;
  p.shared = p.mid_place + mid * pair_pitch(p.c_mid, element);
  p.by_input_chunks = pair_divisor(p.c_in * element / 16);
  p.by_input_width = pair_divisor(tile.input_width);
  p.by_grid_width = pair_divisor(tile.grid_width);
  p.by_sets = pair_divisor(cover(tile.grid_height * tile.grid_width, 16 * kPairRows1));
  p.by_out_chunks = pair_divisor(p.image ? 1 : p.c_out * element / 16);
}

// The largest tile that fits in shared memory, but a smaller one where there would be fewer blocks than multiprocessors, or
// where as many blocks cover the images. Whether one fits.
bool pair_plan(ConvPairParameters& p, int element, int multiprocessors, int shared_limit) {
  constexpr int kTiles[][2] = {{16, 16}, {8, 16}, {8, 8}};
  bool found = false;
  for (const auto& tile : kTiles) {
    ConvPairParameters next = p;
    pair_try(next, tile[0], tile[1], element);
    if (next.shared > shared_limit) continue;
    if (!found || p.blocks < multiprocessors || next.blocks == p.blocks) p = next;
    found = true;
  }
  return found;
}

bool whole_units(i64 channels) {
  return channels % 16 == 0 && 0 < channels && channels <= kMostPairChannels;
}

bool image_channels(i64 channels) {
  return 1 <= channels && channels <= 4;
}

void require_channels(i64 c_in, i64 c_mid, i64 c_out, bool image) {
  const bool fit = whole_units(c_in) && whole_units(c_mid) && (image || whole_units(c_out));
  require(fit, "channels must be multiples of 16 up to 64, got ", c_in, ", ", c_mid, " and ", c_out);
  require(!image || image_channels(c_out), "an image must have 1 to 4 channels, got ", c_out);
}

void require_out(const TensorView& out, const TensorView& x, i64 scale, i64 c_out, DType storage, bool image) {
  const i64 n = x.size(0), height = scale * x.size(1), width = scale * x.size(2);
  if (image) return require_tensor("out", out, storage, {n, c_out, height, width}, x, false);
  const i64 pitch = out.dims == 4 ? out.size(3) : 0;
  const bool wide = pitch >= c_out && pitch % 16 == 0 && pitch <= kMostSide;
  require(wide, "out must have channels in units of 16, at least ", c_out, ", got ", out);
  require_tensor("out", out, storage, {n, height, width, pitch}, x, true);
}

}  // namespace

Plan conv_pair(
    const Device& device,
    const TensorView& x,
    const TensorView& weights1,
    const TensorView& bias1,
    const TensorView& weights2,
    const TensorView& bias2,
    const TensorView& out,
    bool upsample,
    bool image,
    std::int64_t activation,
    double slope,
    std::int64_t product) {
  const DType storage = product_storage(product);
  require_activation(activation);
  require(x.dims == 4, "x must have shape (N, H, W, C), got ", x);
  const int element = element_size(storage), step = 32 / element;
  const i64 n = x.size(0), height = x.size(1), width = x.size(2), c_in = x.size(3);
  const i64 c_mid = bias1.numel(), c_out = bias2.numel();
  require(height <= kMostSide && width <= kMostSide, "x must have at most 2^29 rows and columns, got ", x);
  require_channels(c_in, c_mid, c_out, image);
  const i64 taps1 = upsample ? 4 : 9, taps2 = image ? 1 : 9, columns = image ? cover(9 * c_out, 16) : c_out / 16;
  require_tensor("x", x, storage, {n, height, width, c_in}, x, true);
  require_tensor("weights1", weights1, storage, {upsample ? 4 : 1, c_in / step, taps1, c_mid / 16, 32, 16 / element}, x, true);
  require_tensor("weights2", weights2, storage, {1, c_mid / step, taps2, columns, 32, 16 / element}, x, true);
  require_flat("bias1", bias1, DType::f32, c_mid, x);
  require_flat("bias2", bias2, DType::f32, c_out, x);
  require_out(out, x, upsample ? 2 : 1, c_out, storage, image);
  if (x.numel() == 0) return {};
  ConvPairParameters p{};
  p.x = x.data;
  p.weights1 = weights1.data;
  p.weights2 = weights2.data;
  p.bias1 = pointer<const float>(bias1);
  p.bias2 = pointer<const float>(bias2);
  p.out = out.data;
  p.samples = n;
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.c_in = static_cast<int>(c_in);
  p.c_mid = static_cast<int>(c_mid);
  p.c_out = static_cast<int>(c_out);
  p.pitch = static_cast<int>(image ? 0 : out.size(3));
  p.upsample = upsample;
  p.image = image;
  p.activation = static_cast<int>(activation);
  p.slope = static_cast<float>(slope);
  const bool fits = pair_plan(p, element, device.multiprocessors, device.shared_limit);
  require(fits, c_in, ", ", c_mid, " and ", c_out, " channels in ", storage, " do not fit in this GPU's shared memory");
  require_launch(p.blocks, "x", x);
  const std::string kernel = "advkd_conv_pair_columns" + std::to_string(p.columns) + "_" + kProducts[product];
  return plan_of("conv_pair", kProducts[product], p, {{kernel, p.blocks, kPairThreads, p.shared}});
}

bool pair_fits(
    std::int64_t c_in,
    std::int64_t c_mid,
    std::int64_t c_out,
    bool upsample,
    bool image,
    std::int64_t product,
    std::int64_t shared_limit) {
  const bool units = whole_units(c_in) && whole_units(c_mid) && (image ? image_channels(c_out) : whole_units(c_out));
  if (!units) return false;
  ConvPairParameters p{};
  p.samples = p.height = p.width = 1;
  p.c_in = static_cast<int>(c_in);
  p.c_mid = static_cast<int>(c_mid);
  p.c_out = static_cast<int>(c_out);
  p.upsample = upsample;
  p.image = image;
  return pair_plan(p, element_size(product_storage(product)), 1, static_cast<int>(shared_limit));
}

}  // namespace advkd::host
