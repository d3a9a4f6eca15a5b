// The simple (Elman) recurrent cell: h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh, relu or
// sigmoid (Elman, "Finding structure in time", 1990).
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

// f as apply(x), and the gradient d f'(x) at x for a gradient d at y = f(x), computed from y.
struct Tanh {                               // f' = 1 - y^2
  static constexpr bool kIsBounded = true;  // |f| <= 1
  template <class A>
  static FASTRNN_HD A apply(A x) {
    return tanh(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    return d * (A(ScalarOf<A>(1)) - y * y);
  }
};

// f' = 0 where y <= 0, else 1. Selects instead of multiplying: as in torch, a NaN y passes d on,
// and 0 drops an infinite d.
struct Relu {
  static constexpr bool kIsBounded = false;
  template <class A>
  static FASTRNN_HD A apply(A x) {
    return relu(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    const A zero = A(ScalarOf<A>(0));
    return select(zero >= y, zero, d);
  }
};

struct Sigmoid {                            // f' = y (1 - y)
  static constexpr bool kIsBounded = true;  // |f| <= 1
  template <class A>
  static FASTRNN_HD A apply(A x) {
    return sigmoid(x);
  }
  template <class A>
  static FASTRNN_HD A gradient(A d, A y) {
    return d * (y * (A(ScalarOf<A>(1)) - y));
  }
};

template <class F>
struct Rnn {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr int kSaved = 0;
  static constexpr int kStates = 1;
  static constexpr int kSavedState = -1;
  static constexpr int kPreX[] = {0};
  static constexpr int kPreH[] = {0};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 0;
  static constexpr bool kForwardReadsH = false;
  static constexpr bool kBackwardReadsH = false;
  static constexpr bool kBackwardReadsNextH = true;
  static constexpr bool kDirectPath = false;
  static constexpr bool kBoundedState = F::kIsBounded;
  static constexpr bool kProjects = false;

  // h' = f(a)
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    outputs.next_state[0] = F::apply(inputs.pre[0]);
  }

  // da = dh' f'(a), and f' is a function of h'
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    outputs.d_pre[0] = F::gradient(inputs.d_next_state[0], inputs.next_state[0]);
  }
};

}  // namespace fastrnn::cells
