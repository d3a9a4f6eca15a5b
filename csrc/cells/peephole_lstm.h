// Long short-term memory whose gates see the cell state of their own unit (Gers & Schmidhuber,
// "Recurrent Nets that Time and Count", 2000): i and f see c, o sees c'.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

struct PeepholeLstm {
  static constexpr int kGates = 4;  // i, f, g, o
  static constexpr int kPre = 4;
  static constexpr int kSaved = 5;       // i, f, g, o, c'
  static constexpr int kStates = 2;      // h, c
  static constexpr int kSavedState = 4;  // saved[4] is the cell state c'
  static constexpr int kPreX[] = {0, 1, 2, 3};
  static constexpr int kPreH[] = {0, 1, 2, 3};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 3;  // p_i, p_f, p_o
  static constexpr bool kForwardReadsH = false;
  static constexpr bool kBackwardReadsH = false;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = false;
  static constexpr bool kBoundedState = true;  // h' = o tanh(c')
  static constexpr bool kProjects = false;

  // i = sigmoid(pre_i + p_i c)   f = sigmoid(pre_f + p_f c)   g = tanh(pre_g)
  // c' = f c + i g               o = sigmoid(pre_o + p_o c')  h' = o tanh(c')
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A *pre = inputs.pre, *peephole = inputs.parameters;
    A *saved = outputs.saved, *next_state = outputs.next_state;
    const A c_before = inputs.state[1];
    const A i = sigmoid(pre[0] + peephole[0] * c_before);
    const A f = sigmoid(pre[1] + peephole[1] * c_before);
    const A g = tanh(pre[2]);
    const A c = f * c_before + i * g;
    const A o = sigmoid(pre[3] + peephole[2] * c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    next_state[0] = o * tanh(c);
    next_state[1] = c;
  }

  // h' = o tanh(c')      do  = dh' tanh(c')   pre_o = do o (1 - o)
  //                      dct = dc' + dh' o (1 - tanh(c')^2) + pre_o p_o
  // c' = f c + i g       di  = dct g    df = dct c    dg = dct i
  // through the gates    pre_s = ds s (1 - s) for i, f   pre_g = dg (1 - g^2)
  //                      dc  = dct f + pre_i p_i + pre_f p_f
  // peepholes            dp_i = pre_i c   dp_f = pre_f c   dp_o = pre_o c'
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A *saved = inputs.saved, *d_next_state = inputs.d_next_state;
    const A* peephole = inputs.parameters;
    A *d_pre = outputs.d_pre, *d_peephole = outputs.d_parameters;
    const A one = A(ScalarOf<A>(1));
    const A i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = saved[4];
    const A c_before = inputs.state[1], tanh_c = tanh(c);
    const A d_o = d_next_state[0] * tanh_c * o * (one - o);
    const A d_c =
        d_next_state[1] + d_next_state[0] * o * (one - tanh_c * tanh_c) + d_o * peephole[2];
    const A d_i = d_c * g * i * (one - i), d_f = d_c * c_before * f * (one - f);
    d_pre[0] = d_i;
    d_pre[1] = d_f;
    d_pre[2] = d_c * i * (one - g * g);
    d_pre[3] = d_o;
    d_peephole[0] = d_i * c_before;
    d_peephole[1] = d_f * c_before;
    d_peephole[2] = d_o * c;
    outputs.d_state[1] = d_c * f + d_i * peephole[0] + d_f * peephole[1];
  }
};

}  // namespace fastrnn::cells
