// The best instruction set that this processor has and that was compiled; ADVKD_ISA (baseline, avx2, avx512) forces a lower one.
#pragma once

#include <cstdlib>
#include <cstring>

namespace advkd {

enum class Isa { baseline, avx2, avx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ADVKD_ISA");
  if (wish && std::strcmp(wish, "baseline") == 0) return Isa::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && avx2 && !(wish && std::strcmp(wish, "avx2") == 0)) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

#if defined(__x86_64__)
#define ADVKD_DISPATCH(kernel)                                 \
  (::advkd::current_isa() == ::advkd::Isa::avx512 ? ::advkd::isa_avx512::kernel \
   : ::advkd::current_isa() == ::advkd::Isa::avx2 ? ::advkd::isa_avx2::kernel   \
                                                  : ::advkd::isa_baseline::kernel)
#else
#define ADVKD_DISPATCH(kernel) (::advkd::isa_baseline::kernel)
#endif

}  // namespace advkd
