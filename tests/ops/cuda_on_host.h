// Runs a CUDA kernel on the host, so that its arithmetic and its indices can be tested without a GPU: every thread of a block is a
// fiber, __syncthreads goes back to the scheduler, and threads take turns in a scattered order. Included before the device source.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct float4 {
  float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static inline void __stwb(uint4* place, uint4 value) { *place = value; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float half_to_float(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline unsigned short float_to_half(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

namespace on_host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers(256);
static Fiber* current;
static std::function<void()> kernel;
extern "C" unsigned first_block;
unsigned first_block = 0;

static void enter() {
  kernel();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

static void run(unsigned blocks, unsigned threads, std::function<void()> body) {
  kernel = std::move(body);
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = first_block; blockIdx.x < blocks; ++blockIdx.x) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.done = false;
      makecontext(&fiber.context, enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
      for (unsigned i = 0; i < threads; ++i) {
        threadIdx.x = i * 37 % threads;  // threads is a power of two
        current = &fibers[threadIdx.x];
        if (current->done) continue;
        swapcontext(&scheduler, &current->context);
        left -= current->done;
      }
    }
  }
}

}  // namespace on_host

static inline void __syncthreads() { swapcontext(&on_host::current->context, &on_host::scheduler); }
