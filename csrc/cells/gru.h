// Gated recurrent unit (Cho et al. 2014) in the form of cuDNN and torch: the reset gate multiplies
// W_hn h + b_hn, so the pre-activation of n arrives in two parts, xn and hn.
#pragma once

#include "cells/contract.h"
#include "cells/gates.h"
#include "cells/math.h"

namespace fastrnn::cells {

// Gate: the activation f of r and z (gates.h).
template <class Gate>
struct GruWith {
  static constexpr int kGates = 3;           // r, z, n
  static constexpr int kPre = 4;             // r, z, hn, xn
  static constexpr int kSaved = 4;           // r, z, n, hn
  static constexpr int kStates = 1;          // h
  static constexpr int kSavedState = -1;     // no cell state
  static constexpr int kPreX[] = {0, 1, 3};  // the input side adds into r, z, xn
  static constexpr int kPreH[] = {0, 1, 2};  // the hidden side into r, z, hn
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 0;
  static constexpr bool kForwardReadsH = true;
  static constexpr bool kBackwardReadsH = true;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = true;
  static constexpr bool kBoundedState = true;  // h' is between n and h
  static constexpr bool kProjects = false;

  // r = f(pre_r)   z = f(pre_z)   n = tanh(xn + r hn)   h' = n + z (h - n)
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A *pre = inputs.pre, *state = inputs.state;
    A *saved = outputs.saved, *next_state = outputs.next_state;
    const A r = Gate::apply(pre[0]), z = Gate::apply(pre[1]), hn = pre[2];
    const A n = tanh(pre[3] + r * hn);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = hn;
    next_state[0] = n + z * (state[0] - n);
  }

  // h' = (1 - z) n + z h    dn = dh' - dh' z     dz = dh' (h - n)     dh = dh' z  (the direct part)
  // n = tanh(xn + r hn)     d_xn = dn (1 - n^2)  d_hn = d_xn r        dr = d_xn hn
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A *saved = inputs.saved, *state = inputs.state, *d_next_state = inputs.d_next_state;
    A *d_pre = outputs.d_pre, *d_state = outputs.d_state;
    const A one = A(ScalarOf<A>(1));
    const A r = saved[0], z = saved[1], n = saved[2], hn = saved[3];
    // An infinite dh' makes dn NaN, as in torch, which does not multiply by (1 - z) either.
    const A d_h = d_next_state[0] * z;
    const A d_xn = (d_next_state[0] - d_h) * (one - n * n);
    d_pre[0] = Gate::gradient(d_xn * hn, r);
    d_pre[1] = Gate::gradient(d_next_state[0] * (state[0] - n), z);
    d_pre[2] = d_xn * r;
    d_pre[3] = d_xn;
    d_state[0] = d_h;
  }
};

struct Gru : GruWith<SigmoidGate> {};

}  // namespace fastrnn::cells
