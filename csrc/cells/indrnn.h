// Independently recurrent network (Li et al., "Independently Recurrent Neural Network (IndRNN):
// Building A Longer and Deeper RNN", CVPR 2018): a unit of h depends on its own past alone.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"

namespace fastrnn::cells {

struct IndRnn {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr int kSaved = 0;
  static constexpr int kStates = 1;  // h
  static constexpr int kSavedState = -1;
  static constexpr int kPreX[] = {0};
  static constexpr int kPreH[] = {0};
  static constexpr bool kDenseRecurrence = false;
  static constexpr int kParameters = 1;  // u
  static constexpr bool kForwardReadsH = true;
  static constexpr bool kBackwardReadsH = true;
  static constexpr bool kBackwardReadsNextH = true;
  static constexpr bool kDirectPath = true;
  static constexpr bool kBoundedState = false;
  static constexpr bool kProjects = false;

  // h' = relu(a + u h)
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    outputs.next_state[0] = relu(inputs.pre[0] + inputs.parameters[0] * inputs.state[0]);
  }

  // da = dh' where h' > 0, else 0     dh = da u     du = da h
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A zero = A(ScalarOf<A>(0));
    const A d_a = select(zero >= inputs.next_state[0], zero, inputs.d_next_state[0]);
    outputs.d_pre[0] = d_a;
    outputs.d_state[0] = d_a * inputs.parameters[0];
    outputs.d_parameters[0] = d_a * inputs.state[0];
  }
};

}  // namespace fastrnn::cells
