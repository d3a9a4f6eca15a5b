// FastGRNN (Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated
// Recurrent Neural Network", 2018): the gate and the candidate share their products.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

struct FastGrnn {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr int kSaved = 2;   // z, g
  static constexpr int kStates = 1;  // h
  static constexpr int kSavedState = -1;
  static constexpr int kPreX[] = {0};
  static constexpr int kPreH[] = {0};
  static constexpr bool kDenseRecurrence = true;
  static constexpr int kParameters = 3;  // b: the gate's bias minus the candidate's; zeta, nu
  static constexpr bool kForwardReadsH = true;
  static constexpr bool kBackwardReadsH = true;
  static constexpr bool kBackwardReadsNextH = false;
  static constexpr bool kDirectPath = true;
  static constexpr bool kBoundedState = false;  // of any zeta and nu
  static constexpr bool kProjects = false;

  // z = sigmoid(a + b)   g = tanh(a)   h' = (zeta (1 - z) + nu) g + z h
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    const A b = inputs.parameters[0], zeta = inputs.parameters[1], nu = inputs.parameters[2];
    const A z = sigmoid(inputs.pre[0] + b), g = tanh(inputs.pre[0]);
    outputs.saved[0] = z, outputs.saved[1] = g;
    const A weight = zeta * (A(ScalarOf<A>(1)) - z) + nu;
    outputs.next_state[0] = weight * g + z * inputs.state[0];
  }

  // dz = dh' (h - zeta g)    db = dz z (1 - z)    dg = dh' (zeta (1 - z) + nu)    dh = dh' z
  // da = db + dg (1 - g^2)   dzeta = dh' (1 - z) g   dnu = dh' g
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A one = A(ScalarOf<A>(1)), d_h = inputs.d_next_state[0], h = inputs.state[0];
    const A z = inputs.saved[0], g = inputs.saved[1];
    const A zeta = inputs.parameters[1], nu = inputs.parameters[2];
    const A d_b = d_h * (h - zeta * g) * z * (one - z);
    outputs.d_pre[0] = d_b + d_h * (zeta * (one - z) + nu) * (one - g * g);
    outputs.d_parameters[0] = d_b;
    outputs.d_parameters[1] = d_h * (one - z) * g;
    outputs.d_parameters[2] = d_h * g;
    outputs.d_state[0] = d_h * z;
  }
};

}  // namespace fastrnn::cells
