// minLSTM (Feng et al., Were RNNs All We Needed?, 2024), the normalised form: an LSTM whose gates
// depend on the input only. Inputs: the pre-activations of f, of i and of the candidate.
#pragma once

#include "cells/min_gru.h"

namespace fastrnn::cells {

struct MinLstm {
  static constexpr int kInputs = 3;
  static constexpr bool kHasGates = true;
  static constexpr bool kHasOutput = false;

  // f = sigmoid(x)   i = sigmoid(y)   a = f / (f + i)   b = i / (f + i) c,  c = in_2 or g(in_2)
  template <class A>
  static FASTRNN_HD void coefficients(const A* in, bool positive, A& a, A& b) {
    const Shares<A> shares(in[0], in[1]);
    a = shares.forget;
    b = shares.input * (positive ? positive_candidate(in[2]) : in[2]);
  }

  // With s = f / (f + i) and i / (f + i) = 1 - s:
  //   d_s = d_a - d_b c     d_x = d_s s (1 - s) (1 - f)     d_y = -d_s s (1 - s) (1 - i)
  template <class A>
  static FASTRNN_HD void gradients(const A* in, bool positive, A d_a, A d_b, A* d_in) {
    const Shares<A> shares(in[0], in[1]);
    const A c = positive ? positive_candidate(in[2]) : in[2];
    const A d_s = (d_a - d_b * c) * shares.forget * shares.input;
    d_in[0] = d_s * shares.f_closed();
    d_in[1] = -d_s * shares.i_closed();
    d_in[2] = d_b * shares.input;
    if (positive) d_in[2] = d_in[2] * positive_slope(in[2]);
  }

 private:
  // f / (f + i) = (1 + e^-y) / (2 + e^-x + e^-y). With all exponents lowered by the largest of
  // them, nothing overflows, and gates that are both 0 do not give 0/0.
  template <class A>
  struct Shares {
    A forget, input;     // f / (f + i), i / (f + i)
    A unit, of_f, of_i;  // 1, e^-x and e^-y times e^-(the largest exponent)

    FASTRNN_HD Shares(A x, A y) {
      using Real = ScalarOf<A>;
      const A zero = A(Real(0));
      A least = select(x > y, y, x);
      least = select(least > zero, zero, least);
      unit = exp_of_negative(least);
      of_f = exp_of_negative(least - x);
      of_i = exp_of_negative(least - y);
      const A one_over = A(Real(1)) / ((unit + of_f) + (unit + of_i));
      forget = (unit + of_i) * one_over;
      input = (unit + of_f) * one_over;
    }
    FASTRNN_HD A f_closed() const { return of_f / (unit + of_f); }  // 1 - f
    FASTRNN_HD A i_closed() const { return of_i / (unit + of_i); }
  };
};

}  // namespace fastrnn::cells
