// The recurrence that is linear in its state, elementwise, and its gradient:
//
//   h_t = a_t * h_{t-1} + b_t
//
// d_h_t is the gradient that h_t gets from outside. With carry_t = a_{t+1} * d_b_{t+1}, the part
// that comes from the next step (0 after the last one):
//
//   d_b_t = d_h_t + carry_t      d_a_t = d_b_t * h_{t-1}      carry_{t-1} = a_t * d_b_t
//
// carry before the first step is the gradient of the initial state.
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

}  // namespace fastrnn::cells
