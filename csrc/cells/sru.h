// The simple recurrent unit (Lei et al., Training RNNs as Fast as CNNs, 2017), without recurrent
// vectors. Inputs: the candidate, the pre-activations of f and r, and the input x that r mixes in.
#pragma once

#include "cells/linear_scan.h"

namespace fastrnn::cells {

struct Sru {
  static constexpr int kInputs = 4;
  static constexpr bool kHasGates = true;
  static constexpr bool kHasOutput = true;

  // f = sigmoid(in_1)     a = f     b = (1 - f) c
  template <class A>
  static FASTRNN_HD void coefficients(const A* in, bool, A& a, A& b) {
    a = sigmoid(in[1]);
    b = (A(ScalarOf<A>(1)) - a) * in[0];
  }

  // d_c = d_b (1 - f)     d_f = d_a - d_b c
  template <class A>
  static FASTRNN_HD void gradients(const A* in, bool, A d_a, A d_b, A* d_in) {
    const A f = sigmoid(in[1]), closed = A(ScalarOf<A>(1)) - f;
    d_in[0] = d_b * closed;
    d_in[1] = (d_a - d_b * in[0]) * f * closed;
  }

  // r = sigmoid(in_2)     y = r h + (1 - r) x
  template <class A>
  static FASTRNN_HD A output(const A* in, A h) {
    const A r = sigmoid(in[2]);
    return r * h + (A(ScalarOf<A>(1)) - r) * in[3];
  }

  // d_r = d_y (h - x)     d_x = d_y (1 - r)     d_h = d_y r
  template <class A>
  static FASTRNN_HD void output_gradients(const A* in, A h, A d_y, A* d_in, A& d_h) {
    const A r = sigmoid(in[2]), closed = A(ScalarOf<A>(1)) - r;
    d_in[2] = d_y * (h - in[3]) * r * closed;
    d_in[3] = d_y * closed;
    d_h = d_y * r;
  }
};

}  // namespace fastrnn::cells
