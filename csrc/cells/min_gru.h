// minGRU (Feng et al., Were RNNs All We Needed?, 2024): a GRU whose gates depend on the input only.
// Inputs: the pre-activations of z and of the candidate.
#pragma once

#include "cells/linear_scan.h"

namespace fastrnn::cells {

// g(x) of the paper: x + 0.5 for x >= 0, else sigmoid(x). Its derivative is 1, or g (1 - g).
template <class A>
FASTRNN_HD A positive_candidate(A x) {
  using Real = ScalarOf<A>;
  return select(x >= A(Real(0)), x + A(Real(0.5)), sigmoid(x));
}
template <class A>
FASTRNN_HD A positive_slope(A x) {
  using Real = ScalarOf<A>;
  const A one = A(Real(1)), g = sigmoid(x);
  return select(x >= A(Real(0)), one, g * (one - g));
}

struct MinGru {
  static constexpr int kInputs = 2;
  static constexpr bool kHasGates = true;
  static constexpr bool kHasOutput = false;

  // z = sigmoid(in_0)     a = 1 - z     b = z c,  c = in_1 or g(in_1)
  template <class A>
  static FASTRNN_HD void coefficients(const A* in, bool positive, A& a, A& b) {
    const A z = sigmoid(in[0]);
    a = A(ScalarOf<A>(1)) - z;
    b = z * (positive ? positive_candidate(in[1]) : in[1]);
  }

  // d_z = d_b c - d_a     d_c = d_b z
  template <class A>
  static FASTRNN_HD void gradients(const A* in, bool positive, A d_a, A d_b, A* d_in) {
    const A z = sigmoid(in[0]);
    const A c = positive ? positive_candidate(in[1]) : in[1];
    d_in[0] = (d_b * c - d_a) * z * (A(ScalarOf<A>(1)) - z);
    d_in[1] = d_b * z;
    if (positive) d_in[1] = d_in[1] * positive_slope(in[1]);
  }
};

}  // namespace fastrnn::cells
