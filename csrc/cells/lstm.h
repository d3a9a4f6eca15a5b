// Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).
// With a projection (Sak et al. 2014) the schedule multiplies h' by w_hr; the cell does not change.
#pragma once

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
  static constexpr bool kReadsH0 = false;
  static constexpr bool kReadsH1 = false;
  static constexpr bool kDirect = false;

  // i = sigmoid(pre_i)  f = sigmoid(pre_f)  g = tanh(pre_g)  o = sigmoid(pre_o)
  // c' = f c + i g      h' = o tanh(c')
  template <class A>
  static FASTRNN_HD void forward(const A* pre, const A* state0, A* saved, A* state1) {
    const A i = sigmoid(pre[0]), f = sigmoid(pre[1]), g = tanh(pre[2]), o = sigmoid(pre[3]);
    const A c = f * state0[1] + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = c;
    state1[0] = o * tanh(c);
    state1[1] = c;
  }

  // h' = o tanh(c')      do  = dh' tanh(c')                 dct = dc' + dh' o (1 - tanh(c')^2)
  // c' = f c + i g       di  = dct g    df = dct c          dg  = dct i         dc = dct f
  // through the gates    pre_s = ds s (1 - s) for i, f, o   pre_g = dg (1 - g^2)
  template <class A>
  static FASTRNN_HD void backward(const A* saved, const A* state0, const A* /*state1*/,
                                  const A* d_state1, A* d_pre, A* d_state0) {
    const A one = A(typename Limits<A>::Real(1));
    const A i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const A tanh_c = tanh(saved[4]);
    const A d_c = d_state1[1] + d_state1[0] * o * (one - tanh_c * tanh_c);
    d_pre[0] = d_c * g * i * (one - i);
    d_pre[1] = d_c * state0[1] * f * (one - f);
    d_pre[2] = d_c * i * (one - g * g);
    d_pre[3] = d_state1[0] * tanh_c * o * (one - o);
    d_state0[1] = d_c * f;
  }
};

}  // namespace fastrnn::cells
