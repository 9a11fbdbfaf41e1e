// Products of a convolution on tensor cores, by storage and precision, and a warp's sums. Weights come packed as fragments (see
// advkd/ops/gpu_storage.py): for every step of K and every 16 output channels each lane's four words of B are neighbours, so that
// a warp reads 512 bytes in one go and nothing is exchanged. No Torch and no standard library.
#pragma once

#include "cuda/storage.cuh"
#include "cuda/warp.cuh"

#ifdef __CUDACC__
#define ADVKD_MEMBER __device__ __forceinline__
#else
#define ADVKD_MEMBER inline
#endif

namespace advkd {

template <int kParts>
struct OperandA {
  u32 words[kParts][4];
};

// One of bfloat16, float16: operands are used as they are.
#define ADVKD_PRODUCT(NAME, STORAGE, MMA)                                                                              \
  struct NAME {                                                                                                        \
    using Storage = STORAGE;                                                                                           \
    static constexpr int kParts = 1;                                                                                   \
    ADVKD_INLINE void prepare(OperandA<1>&) {}                                                                         \
    ADVKD_INLINE void multiply(float (&d)[4], const OperandA<1>& a, u32 b0, u32 b1) { MMA(d, a.words[0], b0, b1); }    \
  };
ADVKD_PRODUCT(product_bf16, bf16, mma_bf16)
ADVKD_PRODUCT(product_f16, f16, mma_f16)
#undef ADVKD_PRODUCT

// float32 numbers rounded to TensorFloat-32 (packed weights are rounded already).
struct product_tf32 {
  using Storage = f32;
  static constexpr int kParts = 1;
  ADVKD_INLINE void prepare(OperandA<1>& a) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) a.words[0][i] = round_tf32(a.words[0][i]);
  }
  ADVKD_INLINE void multiply(float (&d)[4], const OperandA<1>& a, u32 b0, u32 b1) { mma_tf32(d, a.words[0], b0, b1); }
};

ADVKD_INLINE u32 rest_tf32(u32 bits, u32 rounded) {
  return round_tf32(__float_as_uint(__fadd_rn(__uint_as_float(bits), -__uint_as_float(rounded))));
}

// Full float32: each number is the sum of two of TensorFloat-32 to 22 bits, and three of the four products count. Infinity
// gives NaN.
struct product_f32 {
  using Storage = f32;
  static constexpr int kParts = 2;
  ADVKD_INLINE void prepare(OperandA<2>& a) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 bits = a.words[0][i];
      a.words[0][i] = round_tf32(bits);
      a.words[1][i] = rest_tf32(bits, a.words[0][i]);
    }
  }
  ADVKD_INLINE void multiply(float (&d)[4], const OperandA<2>& a, u32 b0, u32 b1) {
    const u32 high0 = round_tf32(b0), high1 = round_tf32(b1);
    // Small products first.
    mma_tf32(d, a.words[1], high0, high1);
    mma_tf32(d, a.words[0], rest_tf32(b0, high0), rest_tf32(b1, high1));
    mma_tf32(d, a.words[0], high0, high1);
  }
};

// A warp's sums: kRows times 16 pixels by kColumns times 16 output channels: pixels row * 16 + g (and + 8) and channels
// column * 16 + half * 8 + 2t (and + 1), as cuda/warp.cuh says.
template <typename Product, int kRows, int kColumns>
struct WarpSums {
  float sums[kRows][kColumns][2][4];

  ADVKD_MEMBER void clear() {
    #pragma unroll
    for (int row = 0; row < kRows; ++row)
      #pragma unroll
      for (int column = 0; column < kColumns; ++column)
        #pragma unroll
        for (int half = 0; half < 2; ++half)
          #pragma unroll
          for (int i = 0; i < 4; ++i) sums[row][column][half][i] = 0.0f;
  }

  // Adds one step of K. `rows[r] + offset`: this lane's address for load_fragment of the r-th 16 pixels. `weights[c]`: this lane's
  // four words of the c-th 16 channels.
  ADVKD_MEMBER void step(const unsigned char* const (&rows)[kRows], int offset, const uint4 (&weights)[kColumns]) {
    #pragma unroll
    for (int row = 0; row < kRows; ++row) {
      OperandA<Product::kParts> a;
      load_fragment(a.words[0], rows[row] + offset);
      Product::prepare(a);
      #pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        Product::multiply(sums[row][column][0], a, weights[column].x, weights[column].y);
        Product::multiply(sums[row][column][1], a, weights[column].z, weights[column].w);
      }
    }
  }
};

// The function between a sum and memory.
enum Activation { kNone, kLeakyRelu, kTanh };

ADVKD_INLINE float activate(float sum, float bias, int activation, float slope) {
  const float y = __fadd_rn(sum, bias);
  if (activation == kTanh) return tanhf(y);
  return activation == kLeakyRelu && !(y > 0.0f) ? __fmul_rn(slope, y) : y;
}

}  // namespace advkd

// Entry points by product. A compilation of some of a source's variants defines ADVKD_VARIANTS.
#define ADVKD_PRODUCTS(EACH) EACH(bf16) EACH(f16) EACH(tf32) EACH(f32)
