// Standard normals from Philox words on NVIDIA GPUs, for the kernels that draw. No Torch and no standard library.
#pragma once

#include "common/philox.h"

namespace advkd {

// The four words of a block of the sample whose index is given; counter word 3 is stream << 24 | step.
ADVKD_INLINE void draw_words(u64 index, i64 block, u32 key0, u32 key1, u32 stream_step, u32 c[4]) {
  c[0] = static_cast<u32>(block);
  c[1] = static_cast<u32>(index);
  c[2] = static_cast<u32>(index >> 32);
  c[3] = stream_step;
  philox_rounds(c, key0, key1);
}

// Cosine and sine of an angle in [0, 2 pi]: quarter turns are taken off (pi / 2 in two parts), Taylor series do the rest. The
// library's sincosf is as exact, but carries a reduction for huge angles, with a stack frame, into every kernel.
ADVKD_INLINE void cos_sin(float angle, float& cosine, float& sine) {
  const int quarter = static_cast<int>(__fmaf_rn(angle, 0.636619772367581f, 0.5f));
  const float turns = static_cast<float>(quarter);
  const float r = __fmaf_rn(turns, -4.83826794897e-4f, __fmaf_rn(turns, -1.5703125f, angle));
  const float w = __fmul_rn(r, r);
  float s = __fmaf_rn(w, 2.75573192e-6f, -1.98412698e-4f);
  s = __fmaf_rn(__fmaf_rn(s, w, 8.33333333e-3f), w, -0.166666667f);
  s = __fmaf_rn(__fmul_rn(s, w), r, r);
  float c = __fmaf_rn(w, -2.75573192e-7f, 2.48015873e-5f);
  c = __fmaf_rn(__fmaf_rn(c, w, -1.38888889e-3f), w, 4.16666667e-2f);
  c = __fmaf_rn(__fmaf_rn(c, w, -0.5f), w, 1.0f);
  const float a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

ADVKD_INLINE void box_muller(u32 radius_word, u32 angle_word, float* out) {
  const float u1 = static_cast<float>((radius_word >> 8) + 1) * 5.9604644775390625e-8f;
  const float u2 = static_cast<float>(angle_word >> 8) * 5.9604644775390625e-8f;
  const float radius = __fsqrt_rn(__fmul_rn(-2.0f, logf(u1)));
  float cosine, sine;
  cos_sin(__fmul_rn(6.28318530717958647f, u2), cosine, sine);
  out[0] = __fmul_rn(radius, cosine);
  out[1] = __fmul_rn(radius, sine);
}

// The four normals of a block's words.
ADVKD_INLINE void normals_of(const u32 words[4], float out[4]) {
  box_muller(words[0], words[1], out);
  box_muller(words[2], words[3], out + 2);
}

}  // namespace advkd
