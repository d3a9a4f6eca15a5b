// Cells whose recurrence is linear in the state, elementwise, with factors that depend on the
// inputs of the step only:
//
//   h_t = a_t * h_{t-1} + b_t
//
// d_h_t is the gradient that h_t gets from outside. With carry_t = a_{t+1} * d_b_{t+1}, the part
// that comes from the next step (0 after the last one):
//
//   d_b_t = d_h_t + carry_t      d_a_t = d_b_t * h_{t-1}      carry_{t-1} = a_t * d_b_t
//
// carry before the first step is the gradient of the initial state.
//
// A cell is a struct of
//
//   kInputs      inputs of a step, at most kMostScanInputs (problem/scan.h)
//   kHasGates    whether a and b are computed from pre-activations. Without, there is one sequence,
//                and neither marks nor a bias (problem/scan.h)
//   kHasOutput   whether a step has an output that is not the state
//   coefficients(in, positive, a, b)            a and b from the inputs
//   gradients(in, positive, d_a, d_b, d_in)     the gradients of those inputs
//   output(in, h)                               only with kHasOutput
//   output_gradients(in, h, d_y, d_in, d_h)     the gradients of the other inputs, and of h
//
// as templates over a value type (cells/math.h). `positive`: an option of min_gru.h and min_lstm.h.
#pragma once

#include "cells/math.h"

namespace fastrnn::cells {

template <class A>
FASTRNN_HD A scan_step(A a, A b, A h) {
  return a * h + b;
}

// Returns d_b.
template <class A>
FASTRNN_HD A scan_gradient(A d_h, A carry) {
  return d_h + carry;
}

// The inputs are a and b themselves.
struct LinearScan {
  static constexpr int kInputs = 2;
  static constexpr bool kHasGates = false;
  static constexpr bool kHasOutput = false;

  template <class A>
  static FASTRNN_HD void coefficients(const A* in, bool, A& a, A& b) {
    a = in[0], b = in[1];
  }
  template <class A>
  static FASTRNN_HD void gradients(const A*, bool, A d_a, A d_b, A* d_in) {
    d_in[0] = d_a, d_in[1] = d_b;
  }
};

}  // namespace fastrnn::cells
