// LSTM with an exponential input gate, a normaliser and a stabiliser: sLSTM with one head (Beck et
// al., "xLSTM: Extended Long Short-Term Memory", 2024).
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

struct Slstm {
  static constexpr int kGates = 4;  // i, f, z, o
  static constexpr int kPre = 4;
  static constexpr int kSaved = 8;       // i, f, z, o, sigmoid(pre_f), c', n', m'
  static constexpr int kStates = 4;      // h, c, n, m
  static constexpr int kSavedState = 5;  // c', n', m'
  static constexpr int kPreX[] = {0, 1, 2, 3};
  static constexpr int kPreH[] = {0, 1, 2, 3};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 0;
  static constexpr bool kForwardReadsH = false;
  static constexpr bool kBackwardReadsH = false;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = false;
  static constexpr bool kBoundedState = false;  // of any c and n
  static constexpr bool kProjects = false;

  // Gates   z = tanh(pre_z)   o = sigmoid(pre_o)
  // m keeps both exponents at most 0:
  //         a = log sigmoid(pre_f) + m   m' = max(a, pre_i)   f = e^(a - m')   i = e^(pre_i - m')
  // States  c' = f c + i z    n' = f n + i    h' = o c' / n'
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A *pre = inputs.pre, *state = inputs.state;
    A *saved = outputs.saved, *next_state = outputs.next_state;
    const A z = tanh(pre[2]), o = sigmoid(pre[3]);
    const A a = log_sigmoid(pre[1]) + state[3];
    const A m = select(a > pre[0], a, pre[0]);
    const A f = exp_of_negative(a - m), i = exp_of_negative(pre[0] - m);
    const A c = f * state[1] + i * z, n = f * state[2] + i;
    saved[0] = i, saved[1] = f, saved[2] = z, saved[3] = o, saved[4] = sigmoid(pre[1]);
    saved[5] = c, saved[6] = n, saved[7] = m;
    next_state[0] = o * c / n;
    next_state[1] = c, next_state[2] = n, next_state[3] = m;
  }

  // h' = o c' / n'       do  = dh' c' / n'   dct = dc' + dh' o / n'   dnt = dn' - dh' o c' / n'^2
  // c', n'               df  = dct c + dnt n     di = dct z + dnt     dz = dct i
  //                      dc  = dct f             dn = dnt f
  // f, i                 da  = df f    dpre_i = di i     dm' = dm' - df f - di i
  // m' is a or pre_i     the larger one also gets dm'. It was a where i < 1, or else f = i = 1 and
  //                      both get half, as torch.maximum divides it.
  // a                    dm  = da      pre_f = da (1 - sigmoid(pre_f))
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A *saved = inputs.saved, *state = inputs.state, *d_next_state = inputs.d_next_state;
    A *d_pre = outputs.d_pre, *d_state = outputs.d_state;
    const A one = A(ScalarOf<A>(1)), half = A(ScalarOf<A>(0.5)), zero = A(ScalarOf<A>(0));
    const A i = saved[0], f = saved[1], z = saved[2], o = saved[3];
    const A ratio = saved[5] / saved[6];
    const A d_ratio = d_next_state[0] * o / saved[6];
    const A d_c = d_next_state[1] + d_ratio, d_n = d_next_state[2] - d_ratio * ratio;
    const A d_f = (d_c * state[1] + d_n * state[2]) * f, d_i = (d_c * z + d_n) * i;
    const A d_m = d_next_state[3] - d_f - d_i;
    const A share = select(one > i, one, select(one > f, zero, half));  // of a
    const A d_a = d_f + d_m * share;
    d_pre[0] = d_i + d_m * (one - share);
    d_pre[1] = d_a * (one - saved[4]);
    d_pre[2] = d_c * i * (one - z * z);
    d_pre[3] = d_next_state[0] * ratio * o * (one - o);
    d_state[1] = d_c * f;
    d_state[2] = d_n * f;
    d_state[3] = d_a;
  }
};

}  // namespace fastrnn::cells
