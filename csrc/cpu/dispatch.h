// The best instruction set that this processor has and that was compiled; ADVKD_ISA (baseline, avx2, avx512, avx512bf16) forces a
// lower one.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/conv_block.h"

namespace advkd {

enum class Isa { baseline, avx2, avx512, avx512bf16 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

inline Isa processor_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa detect_isa() {
  const Isa best = processor_isa();
  const char* wish = std::getenv("ADVKD_ISA");
  if (!wish || !*wish) return best;
  for (int isa = 0; isa < 4; ++isa)
    if (std::strcmp(wish, kIsaNames[isa]) == 0) return isa < static_cast<int>(best) ? static_cast<Isa>(isa) : best;
  throw std::runtime_error("ADVKD_ISA must be baseline, avx2, avx512 or avx512bf16, got " + std::string(wish));
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

#if defined(__x86_64__)
// Kernels that bfloat16 instructions do not serve exist up to AVX-512.
#define ADVKD_DISPATCH(kernel)                                 \
  (::advkd::current_isa() >= ::advkd::Isa::avx512 ? ::advkd::isa_avx512::kernel \
   : ::advkd::current_isa() == ::advkd::Isa::avx2 ? ::advkd::isa_avx2::kernel   \
                                                  : ::advkd::isa_baseline::kernel)
#else
#define ADVKD_DISPATCH(kernel) (::advkd::isa_baseline::kernel)
#endif

inline const ConvKernels& conv_kernels_of([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512bf16: return isa_avx512bf16::conv_kernels;
    case Isa::avx512: return isa_avx512::conv_kernels;
    case Isa::avx2: return isa_avx2::conv_kernels;
    default: break;
  }
#endif
  return isa_baseline::conv_kernels;
}

}  // namespace advkd
