// Runs a CUDA kernel on the host, so that its arithmetic and its indices can be tested without a GPU. Every thread of a block (of
// all blocks of a cluster) is a fiber; a barrier sends it back to the scheduler until the others have come, and threads take
// turns in a scattered order. Included before the device source.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct float4 {
  float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T>
static inline T __ldg(const T* place) {
  return *place;
}
static inline void __stwb(uint4* place, uint4 value) { *place = value; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
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

constexpr unsigned kWarp = 32;

// Threads that wait for each other; those that have ended are not waited for.
struct Barrier {
  unsigned members = 0, waiting = 0, generation = 0;
  void release_if_complete() {
    if (waiting == 0 || waiting < members) return;
    waiting = 0;
    ++generation;
  }
};

// A copy that runs beside the arithmetic: see warp_on_host.h.
struct Copy {
  unsigned char* to;
  const void* from;
  bool inside;
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(1 << 16);
  jmp_buf place;
  bool started, done;
  const Barrier* waits;
  unsigned since;
  unsigned turns;  // of warp-wide instructions
  std::vector<std::vector<Copy>> copies;  // by group, the last one open
};
static ucontext_t fiber_context;
static jmp_buf scheduler;
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps, blocks;
static std::vector<std::vector<unsigned char>> shared;
static Barrier cluster;
static unsigned current, first_of_cluster;
static std::function<void()> kernel;
extern "C" unsigned first_block, order;
unsigned first_block = 0;
// 0: threads take turns in a scattered order. 1 and 2: the first or the last warp that can go on does, far ahead of the others.
unsigned order = 0;

static unsigned block_in_cluster() { return current / blockDim.x; }
static unsigned lane() { return current % kWarp; }

static void yield() {
  if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

static void wait(Barrier& barrier) {
  ++barrier.waiting;
  const unsigned since = barrier.generation;
  barrier.release_if_complete();
  if (barrier.generation != since) return;
  fibers[current].waits = &barrier;
  fibers[current].since = since;
  yield();
}

static void enter() {
  kernel();
  fibers[current].done = true;
  for (Barrier* barrier : {&warps[current / kWarp], &blocks[block_in_cluster()], &cluster}) {
    --barrier->members;
    barrier->release_if_complete();
  }
  _longjmp(scheduler, 1);
}

// Lets fiber `i` run up to its next barrier. Only its start goes through ucontext, whose switches are system calls.
static void resume(unsigned i) {
  current = i;
  threadIdx.x = i % blockDim.x;
  blockIdx.x = first_of_cluster + i / blockDim.x;
  Fiber& fiber = fibers[i];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber_context);
  fiber_context.uc_stack.ss_sp = fiber.stack.data();
  fiber_context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber_context, enter, 0);
  setcontext(&fiber_context);
}

static void run_cluster(unsigned size, unsigned threads, unsigned shared_bytes) {
  const unsigned all = size * threads;
  fibers.resize(std::max<size_t>(fibers.size(), all));
  for (unsigned i = 0; i < all; ++i) {
    fibers[i].started = fibers[i].done = false;
    fibers[i].waits = nullptr;
    fibers[i].turns = 0;
    fibers[i].copies = {{}};
  }
  warps.assign((all + kWarp - 1) / kWarp, {});
  for (unsigned i = 0; i < all; ++i) ++warps[i / kWarp].members;
  blocks.assign(size, {});
  for (Barrier& block : blocks) block.members = threads;
  cluster = {};
  cluster.members = all;
  // Memory that nobody has written is NaN; one allocation each, so that a sanitizer sees its end.
  shared.assign(size, std::vector<unsigned char>(shared_bytes + 128, 0xFF));
  unsigned left = all;
  const auto moves = [&left](unsigned i) {
    Fiber& fiber = fibers[i];
    if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.since)) return false;
    fiber.waits = nullptr;
    resume(i);
    left -= fiber.done;
    return true;
  };
  const unsigned count = warps.size();
  while (left > 0) {
    bool moved = false;
    for (unsigned turn = 0; order == 0 && turn < all; ++turn) moved |= moves(turn * 37 % all);  // all is a power of two
    for (unsigned warp = 0; order != 0 && !moved && warp < count; ++warp) {
      const unsigned first = (order == 1 ? warp : count - 1 - warp) * kWarp;
      for (unsigned i = first; i < std::min(first + kWarp, all); ++i) moved |= moves(i);
    }
    if (!moved) {
      std::fprintf(stderr, "every thread waits for another\n");
      std::abort();
    }
  }
}

static void run(unsigned count, unsigned threads, std::function<void()> body, unsigned shared_bytes = 0, unsigned size = 1) {
  kernel = std::move(body);
  gridDim.x = count;
  blockDim.x = threads;
  for (first_of_cluster = first_block; first_of_cluster < count; first_of_cluster += size)
    run_cluster(size, threads, shared_bytes);
}

}  // namespace on_host

static inline void __syncthreads() { on_host::wait(on_host::blocks[on_host::block_in_cluster()]); }
