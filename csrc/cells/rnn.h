// The simple (Elman) recurrent cell: h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh, relu or
// sigmoid (Elman, "Finding structure in time", 1990).
#pragma once

#include "cells/math.h"

namespace fastrnn::cells {

// f, and what a gradient d at y = f(x) becomes at x: d f'(x), written with y.
struct Tanh {  // f' = 1 - y^2
  template <class A>
  static FASTRNN_HD A value(A x) {
    return tanh(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    return d * (A(typename Limits<A>::Real(1)) - y * y);
  }
};

// f' = 0 where y <= 0, else 1. No product: as in torch, NaN passes d on, and 0 drops an infinite d.
struct Relu {
  template <class A>
  static FASTRNN_HD A value(A x) {
    return relu(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    const A zero = A(typename Limits<A>::Real(0));
    return select(zero >= y, zero, d);
  }
};

struct Sigmoid {  // f' = y (1 - y)
  template <class A>
  static FASTRNN_HD A value(A x) {
    return sigmoid(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    return d * (y * (A(typename Limits<A>::Real(1)) - y));
  }
};

template <class F>
struct Rnn {
  static constexpr int kGates = 1;         // rows of w_ih and w_hh, in units of H
  static constexpr int kPre = 1;           // pre-activations that reach the pointwise part
  static constexpr int kSaved = 0;         // values a step leaves for its backward step
  static constexpr int kStates = 1;        // h
  static constexpr int kSavedState = -1;   // no cell state
  static constexpr int kPreX[] = {0};      // gate g of the input side adds into pre[kPreX[g]]
  static constexpr int kPreH[] = {0};      // gate g of the hidden side into pre[kPreH[g]]
  static constexpr bool kReadsH0 = false;  // does backward read h ...
  static constexpr bool kReadsH1 = true;   // ... or h' (state0[0], state1[0])?
  static constexpr bool kDirect = false;   // does h reach h' around the recurrent product?

  // h' = f(a)
  template <class A>
  static FASTRNN_HD void forward(const A* pre, const A* /*state0*/, A* /*saved*/, A* state1) {
    state1[0] = F::value(pre[0]);
  }

  // da = dh' f'(a), and f' is a function of h'
  template <class A>
  static FASTRNN_HD void backward(const A* /*saved*/, const A* /*state0*/, const A* state1,
                                  const A* d_state1, A* d_pre, A* /*d_state0*/) {
    d_pre[0] = F::gradient(d_state1[0], state1[0]);
  }
};

}  // namespace fastrnn::cells
