// The activations that a gate may have: apply(x), and gradient(d, y), the gradient d f'(x) at x for
// a gradient d at y = f(x), computed from y.
#pragma once

#include "cells/math.h"

namespace fastrnn::cells {

struct SigmoidGate {  // f' = y (1 - y)
  template <class A>
  static FASTRNN_HD A apply(A x) {
    return sigmoid(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    return d * y * (A(ScalarOf<A>(1)) - y);
  }
};

// min(max(x + 3, 0), 6) / 6, as in torch. f' = 1/6 where 0 < y < 1, else 0; a NaN y gives 0.
struct HardSigmoidGate {
  template <class A>
  static FASTRNN_HD A apply(A x) {
    using Real = ScalarOf<A>;
    const A six = A(Real(6));
    return clamp(x + A(Real(3)), A(Real(0)), six) / six;
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    using Real = ScalarOf<A>;
    const A zero = A(Real(0)), one = A(Real(1));
    return select(y > zero, select(one > y, d / A(Real(6)), zero), zero);
  }
};

}  // namespace fastrnn::cells
