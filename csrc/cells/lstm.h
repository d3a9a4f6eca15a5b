// Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).
// With a projection (Sak et al. 2014) the schedule multiplies h' by w_hr; the cell does not change.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

struct Lstm {
  static constexpr int kGates = 4;  // i, f, g, o
  static constexpr int kPre = 4;
  static constexpr int kSaved = 5;       // i, f, g, o, c'
  static constexpr int kStates = 2;      // h, c
  static constexpr int kSavedState = 4;  // saved[4] is the cell state c'
  static constexpr int kPreX[] = {0, 1, 2, 3};
  static constexpr int kPreH[] = {0, 1, 2, 3};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 0;
  static constexpr bool kForwardReadsH = false;
  static constexpr bool kBackwardReadsH = false;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = false;
  static constexpr bool kBoundedState = true;  // h' = o tanh(c')
  static constexpr bool kProjects = true;

  // i = sigmoid(pre_i)  f = sigmoid(pre_f)  g = tanh(pre_g)  o = sigmoid(pre_o)
  // c' = f c + i g      h' = o tanh(c')
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A *pre = inputs.pre, *state = inputs.state;
    A *saved = outputs.saved, *next_state = outputs.next_state;
    const A i = sigmoid(pre[0]), f = sigmoid(pre[1]), g = tanh(pre[2]), o = sigmoid(pre[3]);
    const A c = f * state[1] + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next_state[0] = o * tanh(c);
    next_state[1] = c;
  }

  // h' = o tanh(c')      do  = dh' tanh(c')                 dct = dc' + dh' o (1 - tanh(c')^2)
  // c' = f c + i g       di  = dct g    df = dct c          dg  = dct i         dc = dct f
  // through the gates    pre_s = ds s (1 - s) for i, f, o   pre_g = dg (1 - g^2)
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A *saved = inputs.saved, *state = inputs.state, *d_next_state = inputs.d_next_state;
    A *d_pre = outputs.d_pre, *d_state = outputs.d_state;
    const A one = A(ScalarOf<A>(1));
    const A i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const A tanh_c = tanh(saved[4]);
    const A d_c = d_next_state[1] + d_next_state[0] * o * (one - tanh_c * tanh_c);
    d_pre[0] = d_c * g * i * (one - i);
    d_pre[1] = d_c * state[1] * f * (one - f);
    d_pre[2] = d_c * i * (one - g * g);
    d_pre[3] = d_next_state[0] * tanh_c * o * (one - o);
    d_state[1] = d_c * f;
  }
};

}  // namespace fastrnn::cells
