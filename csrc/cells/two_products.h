// Cells with two products per step: the second one multiplies an operand that the gates of the
// first one have made.
//
//   x-side + w_hh[first rows] h             = pre of the first kFirstGates gates
//   pre, h      --gates-->   saved, operand   (= saved[0] h)
//   x-side + w_hh[other rows] operand       = pre of the last gate, the candidate n
//   pre_n, h    --output-->  h'
//
// Backward goes the other way: output_backward, the product with the other rows of w_hh,
// gates_backward, the product with the first rows. f: the activation of the gates (gates.h).
#pragma once

#include "cells/contract.h"
#include "cells/gates.h"
#include "cells/math.h"

namespace fastrnn::cells {

// Gates of the first product. The cells below have one gate more, all others none.
template <class Cell>
inline constexpr int kFirstGates = Cell::kGates;
template <class Cell>
inline constexpr bool kHasTwoProducts = kFirstGates<Cell> < Cell::kGates;

// The traits that such cells share; every gate and n are saved.
template <int Gates>
struct TwoProductTraits {
  static constexpr int kGates = Gates;
  static constexpr int kPre = Gates;
  static constexpr int kSaved = Gates;
  static constexpr int kStates = 1;
  static constexpr int kSavedState = -1;
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 0;
  static constexpr bool kForwardReadsH = true;
  static constexpr bool kBackwardReadsH = true;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = true;
  static constexpr bool kBoundedState = true;  // h' is between n and h
  static constexpr bool kProjects = false;
};

// Gated recurrent unit whose reset gate acts before the product with W_hn (Cho et al., "Learning
// Phrase Representations using RNN Encoder-Decoder", 2014). Gates: r, z, n.
template <class Gate>
struct ResetBeforeGru : TwoProductTraits<3> {
  static constexpr int kPreX[] = {0, 1, 2};
  static constexpr int kPreH[] = {0, 1, 2};

  // r = f(pre_r)   z = f(pre_z)   operand = r h
  template <class A>
  static FASTRNN_HD A gates(const A* pre, A h, A* saved) {
    saved[0] = Gate::apply(pre[0]);
    saved[1] = Gate::apply(pre[1]);
    return saved[0] * h;
  }
  // n = tanh(pre_n)   h' = n + z (h - n)
  template <class A>
  static FASTRNN_HD A output(A pre, A h, A* saved) {
    const A n = tanh(pre);
    saved[2] = n;
    return n + saved[1] * (h - n);
  }
  // dn = dh' (1 - z)   d_pre_n = dn (1 - n^2)   d_pre_z = dh' (h - n) f'   dh = dh' z
  // Writes the parts of d_pre that do not come from the operand. Returns dh.
  template <class A>
  static FASTRNN_HD A output_backward(const A* saved, A h, A d_next, A* d_pre) {
    const A z = saved[1], n = saved[2], d_h = d_next * z;
    d_pre[0] = A(ScalarOf<A>(0));
    d_pre[1] = Gate::gradient(d_next * (h - n), z);
    d_pre[2] = (d_next - d_h) * (A(ScalarOf<A>(1)) - n * n);
    return d_h;
  }
  // d_pre_r = d_operand h f'   dh = d_operand r
  // Adds to the first d_pre. Returns dh.
  template <class A>
  static FASTRNN_HD A gates_backward(const A* saved, A h, A d_operand, A* d_pre) {
    d_pre[0] = Gate::gradient(d_operand * h, saved[0]);
    return d_operand * saved[0];
  }
};
template <class Gate>
inline constexpr int kFirstGates<ResetBeforeGru<Gate>> = 2;

// Minimal gated unit (Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016): one
// gate f for reset and update. Gates: f, n.
struct Mgu : TwoProductTraits<2> {
  static constexpr int kPreX[] = {0, 1};
  static constexpr int kPreH[] = {0, 1};

  // f = sigmoid(pre_f)   operand = f h
  template <class A>
  static FASTRNN_HD A gates(const A* pre, A h, A* saved) {
    saved[0] = sigmoid(pre[0]);
    return saved[0] * h;
  }
  // n = tanh(pre_n)   h' = h + f (n - h)
  template <class A>
  static FASTRNN_HD A output(A pre, A h, A* saved) {
    const A n = tanh(pre);
    saved[1] = n;
    return h + saved[0] * (n - h);
  }
  // dn = dh' f   d_pre_n = dn (1 - n^2)   d_pre_f = dh' (n - h) f'   dh = dh' (1 - f)
  template <class A>
  static FASTRNN_HD A output_backward(const A* saved, A h, A d_next, A* d_pre) {
    const A n = saved[1], d_n = d_next * saved[0];
    d_pre[0] = SigmoidGate::gradient(d_next * (n - h), saved[0]);
    d_pre[1] = d_n * (A(ScalarOf<A>(1)) - n * n);
    return d_next - d_n;
  }
  // d_pre_f += d_operand h f'   dh = d_operand f
  template <class A>
  static FASTRNN_HD A gates_backward(const A* saved, A h, A d_operand, A* d_pre) {
    d_pre[0] = d_pre[0] + SigmoidGate::gradient(d_operand * h, saved[0]);
    return d_operand * saved[0];
  }
};
template <>
inline constexpr int kFirstGates<Mgu> = 1;

}  // namespace fastrnn::cells
