// Cells in two halves, around the normalisation of their cell state:
//
//   pre, c  --update-->  saved, c'        n = c', or layer norm of c' over the units of a row
//   o, n    --output-->  h'
//
// A cell without halves has no cell state to normalise; its forward and backward are used whole.
#pragma once

#include "cells/contract.h"
#include "cells/gates.h"
#include "cells/lstm.h"
#include "cells/math.h"

namespace fastrnn::cells {

template <class Cell>
struct HalvesOf {
  static constexpr bool kExist = false;
};

// The equations of Lstm, with the activation f of i, f and o (gates.h). kOutputGate: the index of o
// in pre and saved.
template <class Gate>
struct LstmHalves {
  static constexpr bool kExist = true;
  static constexpr int kOutputGate = 3;

  // Writes i, f, g, o, c' to saved. Returns c'.
  template <class A>
  static FASTRNN_HD A update(const A* pre, A c, A* saved) {
    const A i = Gate::apply(pre[0]), f = Gate::apply(pre[1]), g = tanh(pre[2]);
    const A o = Gate::apply(pre[3]);
    const A next = f * c + i * g;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[4] = next;
    return next;
  }
  // h' = o tanh(n)
  template <class A>
  static FASTRNN_HD A output(A o, A n) {
    return o * tanh(n);
  }

  // do = dh' tanh(n)    d_pre_o = do f'(pre_o)    dn = dh' o (1 - tanh(n)^2)
  template <class A>
  static FASTRNN_HD void output_backward(A o, A n, A d_h, A& d_pre_o, A& d_n) {
    const A one = A(ScalarOf<A>(1)), tanh_n = tanh(n);
    d_pre_o = Gate::gradient(d_h * tanh_n, o);
    d_n = d_h * o * (one - tanh_n * tanh_n);
  }
  // d_pre of i, f, g from dc' and the values that update has saved. Returns dc.
  template <class A>
  static FASTRNN_HD A update_backward(const A* saved, A c, A d_c, A* d_pre) {
    const A one = A(ScalarOf<A>(1));
    const A i = saved[0], f = saved[1], g = saved[2];
    d_pre[0] = Gate::gradient(d_c * g, i);
    d_pre[1] = Gate::gradient(d_c * c, f);
    d_pre[2] = d_c * i * (one - g * g);
    return d_c * f;
  }
};

template <>
struct HalvesOf<Lstm> : LstmHalves<SigmoidGate> {};

// An LSTM with another activation of its gates, which runs in halves alone.
template <class Gate>
struct LstmWith : Lstm {};
template <class Gate>
struct HalvesOf<LstmWith<Gate>> : LstmHalves<Gate> {};

}  // namespace fastrnn::cells
