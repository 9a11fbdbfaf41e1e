// Philox4x32-10 (Salmon et al. 2011), shared by the CPU and the CUDA sources. No Torch, no standard library: NVRTC compiles it.
#pragma once

#ifdef __CUDACC__
#define ADVKD_INLINE static __device__ __forceinline__
#else
#define ADVKD_INLINE static inline
#endif

namespace advkd {

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Purposes of numbers: streams never share a counter. Python reads this list.
enum class PhiloxStream : int { x_T = 0, step = 1, z = 2, interpolation = 3, order = 4, draw = 5 };

// One call's draw: `count` elements per sample under a key; counter word 3 is stream << 24 | step.
struct PhiloxParameters {
  u32 key0;
  u32 key1;
  u32 stream_step;
  i64 count;
};

ADVKD_INLINE void philox_rounds(u32 c[4], u32 k0, u32 k1) {
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = static_cast<u64>(c[0]) * 0xD2511F53u;
    const u64 p1 = static_cast<u64>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<u32>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<u32>(p1);
    c[2] = static_cast<u32>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<u32>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

#ifndef __CUDACC_RTC__
// Parameters from what torch passes: a seed's 64 bits as a signed integer.
inline PhiloxParameters philox_parameters(i64 seed, i64 stream, i64 step, i64 count) {
  const u64 key = static_cast<u64>(seed);
  const u32 stream_step = static_cast<u32>(stream) << 24 | static_cast<u32>(step);
  return {static_cast<u32>(key), static_cast<u32>(key >> 32), stream_step, count};
}

inline PhiloxParameters philox_parameters(i64 seed, PhiloxStream stream, i64 step, i64 count) {
  return philox_parameters(seed, static_cast<i64>(stream), step, count);
}
#endif

}  // namespace advkd
