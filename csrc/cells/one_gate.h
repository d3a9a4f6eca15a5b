// Cells with one gate, which mixes the old state and a candidate:
//
//   LiGRU: light gated recurrent unit (Ravanelli et al., "Light Gated Recurrent Units for Speech
//   Recognition", 2018), with the gates in SpeechBrain's order: candidate, gate.
//   JANET: an LSTM that is left with its forget gate (van der Westhuizen & Lasenby, "The
//   unreasonable effectiveness of the forget gate", 2018): gate, candidate.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"
#include "cells/rnn.h"

namespace fastrnn::cells {

// F: the activation of the candidate (cells/rnn.h). kGate: the index of the gate in pre. kShifts:
// the weight of the candidate has a shift beta per unit.
template <class F, int kGate, bool kShifts>
struct OneGate {
  static constexpr int kGates = 2;
  static constexpr int kPre = 2;
  static constexpr int kSaved = kShifts ? 3 : 2;  // k, g, and w unless it is 1 - k
  static constexpr int kStates = 1;               // h
  static constexpr int kSavedState = -1;
  static constexpr int kPreX[] = {0, 1};
  static constexpr int kPreH[] = {0, 1};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = kShifts ? 1 : 0;  // beta
  static constexpr bool kForwardReadsH = true;
  static constexpr bool kBackwardReadsH = true;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = true;
  static constexpr bool kBoundedState = F::kIsBounded && !kShifts;  // else k + w may exceed 1
  static constexpr bool kProjects = false;
  static constexpr int kCandidate = 1 - kGate;

  // k = sigmoid(pre_gate)   w = 1 - sigmoid(pre_gate - beta) = sigmoid(beta - pre_gate)
  // g = f(pre_candidate)    h' = k h + w g
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A k = sigmoid(inputs.pre[kGate]), g = F::apply(inputs.pre[kCandidate]);
    A w = A(ScalarOf<A>(1)) - k;
    if constexpr (kShifts) {
      w = sigmoid(inputs.parameters[0] - inputs.pre[kGate]);
      outputs.saved[2] = w;
    }
    outputs.saved[0] = k, outputs.saved[1] = g;
    outputs.next_state[0] = k * inputs.state[0] + w * g;
  }

  // dk = dh' h    dw = dh' g    dg = dh' w    dh = dh' k    pre_candidate = dg f'
  // pre_gate = dk k (1 - k) - dbeta     dbeta = dw w (1 - w)
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A one = A(ScalarOf<A>(1)), d_h = inputs.d_next_state[0], h = inputs.state[0];
    const A k = inputs.saved[0], g = inputs.saved[1];
    if constexpr (kShifts) {
      const A w = inputs.saved[2];
      const A d_beta = d_h * g * w * (one - w);
      outputs.d_pre[kGate] = d_h * h * k * (one - k) - d_beta;
      outputs.d_pre[kCandidate] = F::gradient(d_h * w, g);
      outputs.d_parameters[0] = d_beta;
    } else {
      outputs.d_pre[kGate] = d_h * (h - g) * k * (one - k);
      outputs.d_pre[kCandidate] = F::gradient(d_h * (one - k), g);
    }
    outputs.d_state[0] = d_h * k;
  }
};

using LiGru = OneGate<Relu, 1, false>;
using Janet = OneGate<Tanh, 0, true>;

}  // namespace fastrnn::cells
