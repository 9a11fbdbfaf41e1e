// The CUDA ops: their host functions, and their names and arguments as torch knows them. "cuda_<name>" of the CPU object plans an
// op; "<name>" of the CUDA object plans it and starts the kernels.
#pragma once

#include "cuda/host/host.h"

namespace advkd::host {

Plan conv_bias_act_mask(
    const Device&,
    const TensorView& x,
    const std::optional<TensorView>& bias,
    double slope,
    const TensorView& out,
    const TensorView& mask);

Plan mask_mul(const Device&, const TensorView& x, const TensorView& mask, double slope, const TensorView& out);

Plan penalty_reduce(
    const Device&,
    const TensorView& g,
    double target,
    double weight,
    std::int64_t mode,
    const TensorView& out,
    const TensorView& penalties);

Plan interpolate(
    const Device&,
    const TensorView& real,
    const TensorView& fake,
    const std::optional<TensorView>& a,
    const std::optional<TensorView>& indices,
    std::int64_t seed,
    std::int64_t step,
    const std::optional<TensorView>& steps,
    const TensorView& out);

Plan norm_act_moments(const Device&, const TensorView& x, const TensorView& statistics);

Plan norm_act(
    const Device&,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    double eps,
    double slope,
    bool upsample,
    const TensorView& out);

Plan norm_act_sums(
    const Device&,
    const TensorView& gradient,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    double eps,
    double slope,
    bool upsample,
    const std::optional<TensorView>& kept,
    const TensorView& sums);

Plan norm_act_backward(
    const Device&,
    const TensorView& gradient,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& statistics,
    const TensorView& means,
    double eps,
    double slope,
    bool upsample,
    bool masked,
    const TensorView& dx);

Plan philox_words(
    const Device&,
    const TensorView& indices,
    std::int64_t seed,
    std::int64_t stream,
    std::int64_t step,
    const TensorView& out);

Plan philox_normal(
    const Device&,
    const TensorView& indices,
    std::int64_t seed,
    std::int64_t stream,
    std::int64_t step,
    const TensorView& out);

Plan sampler_step(
    const Device&,
    const TensorView& x,
    const TensorView& m,
    const TensorView& table,
    const std::optional<TensorView>& previous_x0,
    const std::optional<TensorView>& history,
    const std::optional<TensorView>& noise,
    const std::optional<TensorView>& indices,
    std::int64_t seed,
    std::int64_t step,
    const std::optional<TensorView>& steps,
    std::int64_t pool,
    const TensorView& out,
    const std::optional<TensorView>& x0,
    const std::optional<TensorView>& pooled,
    const std::optional<TensorView>& flags);

// A 3x3 convolution, of the up-sampled input or of the input, with bias and activation (0 none, 1 LeakyReLU, 2 tanh). x: contiguous
// (N, H, W, C_in), channels in whole units, in the storage of `product`, an index into kProducts. weights: fragments, as
// advkd/ops/gpu_storage.py packs them. bias: float32 (C_out,). out: contiguous (N, H', W', P >= C_out), of whose channels C_out are
// written; H' and W' are twice H and W where x is up-sampled.
Plan conv_layer(
    const Device& device,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& bias,
    const TensorView& out,
    bool upsample,
    std::int64_t activation,
    double slope,
    std::int64_t product);

// The student's last convolution, 3x3 of C_in to 1 to 4 channels. weights: as pack_image makes them. out: (N, C_out, H, W).
Plan conv_image(
    const Device& device,
    const TensorView& x,
    const TensorView& weights,
    const TensorView& bias,
    const TensorView& out,
    std::int64_t activation,
    double slope,
    std::int64_t product);

// out = activation(conv3x3(leaky_relu(conv3x3(up(x)) + bias1)) + bias2), both with zeros around the image, of up to 64 channels.
// With `image` the second convolution is that of conv_image, with weights and out as there.
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
    std::int64_t product);

// 3x3 convolutions with LeakyReLU one after the other, on 4x4 to 32x32 pixels. x: contiguous (N, 4, 4, C). layers: five numbers for
// each, channels in and out in whole units, height and width of the input, whether it is up-sampled first. cluster: 1, 2, 4 or 8
// blocks compute a group of `images` together; an image's bits depend on neither. out: (N, R, R, P) like conv_layer's.
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
    std::int64_t images);

// Questions that plans of whole networks ask: whether a pair fits in so many bytes of shared memory, with channels in whole units
// (of an image's layer c_out is the image's own), and how many of the leading layers one stem takes, five numbers each.
bool pair_fits(
    std::int64_t c_in,
    std::int64_t c_mid,
    std::int64_t c_out,
    bool upsample,
    bool image,
    std::int64_t product,
    std::int64_t shared_limit);

std::int64_t stem_layers(
    const std::vector<std::int64_t>& layers, std::int64_t product, std::int64_t images, std::int64_t shared_limit);

}  // namespace advkd::host

// Every op with its arguments, and every question with its signature, as in torch's schemas.
#define ADVKD_CUDA_OPS(EACH)                                                                                         \
  EACH(conv_bias_act_mask, "Tensor p, Tensor? bias, float slope, Tensor(a!) out, Tensor(b!) mask")                   \
  EACH(mask_mul, "Tensor x, Tensor mask, float slope, Tensor(a!) out")                                               \
  EACH(penalty_reduce, "Tensor g, float target, float weight, int mode, Tensor(a!) out, Tensor(b!) penalties")       \
  EACH(interpolate,                                                                                                  \
       "Tensor real, Tensor fake, Tensor? a, Tensor? indices, int seed, int step, Tensor? steps, Tensor(a!) out")    \
  EACH(norm_act_moments, "Tensor x, Tensor(a!) statistics")                                                          \
  EACH(norm_act,                                                                                                     \
       "Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, Tensor(a!) out")         \
  EACH(norm_act_sums,                                                                                                \
       "Tensor gradient, Tensor x, Tensor weights, Tensor statistics, float eps, float slope, bool upsample, "       \
       "Tensor(a!)? kept, Tensor(b!) sums")                                                                          \
  EACH(norm_act_backward,                                                                                            \
       "Tensor gradient, Tensor x, Tensor weights, Tensor statistics, Tensor means, float eps, float slope, "        \
       "bool upsample, bool masked, Tensor(a!) dx")                                                                  \
  EACH(philox_words, "Tensor indices, int seed, int stream, int step, Tensor(a!) out")                               \
  EACH(philox_normal, "Tensor indices, int seed, int stream, int step, Tensor(a!) out")                              \
  EACH(sampler_step,                                                                                                 \
       "Tensor x, Tensor m, Tensor table, Tensor? previous_x0, Tensor? history, Tensor? noise, Tensor? indices, "     \
       "int seed, int step, Tensor? steps, int pool, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? pooled, "           \
       "Tensor(d!)? flags")                                                                                          \
  EACH(conv_layer,                                                                                                   \
       "Tensor x, Tensor weights, Tensor bias, Tensor(a!) out, bool upsample, int activation, float slope, "         \
       "int product")                                                                                                \
  EACH(conv_image,                                                                                                   \
       "Tensor x, Tensor weights, Tensor bias, Tensor(a!) out, int activation, float slope, int product")            \
  EACH(conv_pair,                                                                                                    \
       "Tensor x, Tensor weights1, Tensor bias1, Tensor weights2, Tensor bias2, Tensor(a!) out, bool upsample, "     \
       "bool image, int activation, float slope, int product")                                                       \
  EACH(student_stem,                                                                                                 \
       "Tensor x, Tensor[] weights, Tensor[] biases, Tensor(a!) out, int[] layers, float slope, int product, "       \
       "int cluster, int images")

#define ADVKD_CUDA_QUERIES(EACH)                                                                                        \
  EACH(pair_fits, "(int c_in, int c_mid, int c_out, bool upsample, bool image, int product, int shared_limit) -> bool") \
  EACH(stem_layers, "(int[] layers, int product, int images, int shared_limit) -> int")
