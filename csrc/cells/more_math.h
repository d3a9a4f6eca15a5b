// Functions that cells which are defined at run time may use, in addition to those of math.h, and
// for the same value types. All are free of branches, and NaN in gives NaN out.
#pragma once

#include "cells/math.h"

namespace fastrnn::cells {

template <class A>
FASTRNN_HD A number(double value) {
  return A(ScalarOf<A>(value));
}

// e^x. The scale is halved, because 2^n is infinite for the largest n whose e^x is finite.
template <class A>
FASTRNN_HD A exp(A x) {
  using Real = ScalarOf<A>;
  using F = FloatFormat<Real>;
  const A bounded = clamp(x, A(F::kExpMin), A(F::kExpMax));
  const A shifted = bounded * A(Real(1.4426950408889634)) + A(F::kRoundingShift);
  const A n = shifted - A(F::kRoundingShift);
  const A r = (bounded - n * A(F::kLn2High)) - n * A(F::kLn2Low);
  const A half = power_of_two(shifted - A(Real(1)));
  return (half + half * expm1_series(r)) * A(Real(2));
}

// Vectors have their own sqrt, which the compiler finds in their namespace.
FASTRNN_HD float sqrt(float x) { return __builtin_sqrtf(x); }
FASTRNN_HD double sqrt(double x) { return __builtin_sqrt(x); }

template <class A>
FASTRNN_HD A rsqrt(A x) {
  return A(ScalarOf<A>(1)) / sqrt(x);
}

template <class A>
FASTRNN_HD A absolute(A x) {
  return select(A(ScalarOf<A>(0)) > x, -x, x);
}

// The larger of both; their sum is NaN if one is.
template <class A>
FASTRNN_HD A maximum(A a, A b) {
  return select(a > b, a, select(b >= a, b, a + b));
}

template <class A>
FASTRNN_HD A minimum(A a, A b) {
  return select(b > a, a, select(a >= b, b, a + b));
}

// -1, 0 or 1.
template <class A>
FASTRNN_HD A sign(A x) {
  using Real = ScalarOf<A>;
  const A zero = A(Real(0)), one = A(Real(1));
  return select(x > zero, one, select(zero > x, -one, x * zero));
}

// The share of a in the derivative of maximum(a, b): 1 or 0, or 1/2 where both are equal, as in
// torch.
template <class A>
FASTRNN_HD A larger(A a, A b) {
  using Real = ScalarOf<A>;
  return select(a > b, A(Real(1)), select(b > a, A(Real(0)), A(Real(0.5))));
}

// 1 where low <= x <= high, else 0: the derivative of clamp.
template <class A>
FASTRNN_HD A within(A x, A low, A high) {
  using Real = ScalarOf<A>;
  return select(low > x, A(Real(0)), select(x > high, A(Real(0)), A(Real(1))));
}

}  // namespace fastrnn::cells
