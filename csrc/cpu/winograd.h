// Winograd's (Toom and Cook's) F(m, 3) along one axis, for m = 2, 4, 6: m outputs of a 3-tap correlation from n = m + 2 inputs by n
// products, at the points 0, +-p for each p of `kPoints`, and infinity. Points come in pairs, so every transform splits into an
// even and an odd half.
//
// Up-sampling: phase 0 of a nearest-up-sampled 3-tap filter is (w0, w1 + w2, 0) on the low-resolution input, phase 1 is
// (0, w0 + w1, w2). The first vanishes at infinity, the second at 0: each needs n - 1 products, on one and the same transformed
// input. In two dimensions four phases make (n - 1)^2 products each: 100 for 64 outputs with m = 4, where four direct phases
// take 256.
#pragma once

#include <array>

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

template <int m>
struct Winograd {
  static_assert(m == 2 || m == 4 || m == 6);
  static constexpr int n = m + 2;
  static constexpr int pairs = m / 2;
  // For m = 4 the pairs 0.75 and 1.5 halve the rounding error of the usual 1 and 2, and are as exact in binary.
  static constexpr double points[3] = {m == 4 ? 0.75 : 1.0, m == 4 ? 1.5 : 2.0, 0.5};

  // Coefficients (of x^0, x^2, ...) of the product of (x^2 - q^2) over the pairs but `left_out`.
  static constexpr std::array<double, pairs + 1> polynomial(int left_out) {
    std::array<double, pairs + 1> c{1.0};
    int degree = 0;
    for (int i = 0; i < pairs; ++i) {
      if (i == left_out) continue;
      ++degree;
      for (int j = degree; j >= 0; --j) c[j] = (j ? c[j - 1] : 0.0) - points[i] * points[i] * c[j];
    }
    return c;
  }

  static constexpr double power(double x, int exponent) {
    double y = 1.0;
    for (int i = 0; i < exponent; ++i) y *= x;
    return y;
  }

  // The filter's value at a point, over the product of its distances from the other points. Point order: 0, p, -p, ..., infinity.
  static constexpr std::array<double, n> filter(double g0, double g1, double g2) {
    std::array<double, n> out{};
    double at_zero = 1.0;
    for (int i = 0; i < pairs; ++i) {
      const double p = points[i];
      at_zero *= -p * p;
      double distances = 2.0 * p * p;
      for (int j = 0; j < pairs; ++j) distances *= j == i ? 1.0 : p * p - points[j] * points[j];
      out[1 + 2 * i] = (g0 + p * g1 + p * p * g2) / distances;
      out[2 + 2 * i] = (g0 - p * g1 + p * p * g2) / distances;
    }
    out[0] = g0 / at_zero;
    out[n - 1] = g2;
    return out;
  }

  static inline __attribute__((always_inline)) V term(V sum, double coefficient, V x) {
    return coefficient == 1.0 ? sum + x : coefficient == -1.0 ? sum - x : fma(x, splat(static_cast<float>(coefficient)), sum);
  }

  // n inputs to n factors.
  static inline __attribute__((always_inline)) void input(const V (&d)[n], V (&out)[n]) {
    constexpr auto all = polynomial(-1);
    // The leading coefficient is 1.
    V zero = d[2 * pairs], infinity = d[2 * pairs + 1];
#pragma GCC unroll 8
    for (int j = 0; j < pairs; ++j) {
      zero = term(zero, all[j], d[2 * j]);
      infinity = term(infinity, all[j], d[2 * j + 1]);
    }
    out[0] = zero;
    out[n - 1] = infinity;
    input_pair<0>(d, out);
    if constexpr (pairs > 1) input_pair<1>(d, out);
    if constexpr (pairs > 2) input_pair<2>(d, out);
  }

  template <int i>
  static inline __attribute__((always_inline)) void input_pair(const V (&d)[n], V (&out)[n]) {
    constexpr auto rest = polynomial(i);
    V even = d[2 * pairs], odd = d[2 * pairs - 1];
#pragma GCC unroll 8
    for (int j = 0; j < pairs - 1; ++j) {
      even = term(even, rest[j], d[2 * j + 2]);
      odd = term(odd, rest[j], d[2 * j + 1]);
    }
    out[1 + 2 * i] = term(even, points[i], odd);
    out[2 + 2 * i] = term(even, -points[i], odd);
  }

  // n products to m outputs; `zero` and `infinity` say whether those points' products are there.
  template <bool zero, bool infinity>
  static inline __attribute__((always_inline)) void output(const V (&x)[n], V (&out)[m]) {
    V even[pairs], odd[pairs];
#pragma GCC unroll 8
    for (int i = 0; i < pairs; ++i) {
      even[i] = x[1 + 2 * i] + x[2 + 2 * i];
      odd[i] = x[1 + 2 * i] - x[2 + 2 * i];
    }
#pragma GCC unroll 8
    for (int k = 0; k < m; ++k) {
      const V(&half)[pairs] = k % 2 ? odd : even;
      V sum = power(points[0], k) == 1.0 ? half[0] : half[0] * splat(static_cast<float>(power(points[0], k)));
#pragma GCC unroll 8
      for (int i = 1; i < pairs; ++i) sum = term(sum, power(points[i], k), half[i]);
      if (zero && k == 0) sum += x[0];
      if (infinity && k == m - 1) sum += x[n - 1];
      out[k] = sum;
    }
  }
};

}  // namespace advkd::ADVKD_ISA
