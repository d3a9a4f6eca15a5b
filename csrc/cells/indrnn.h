// Independently recurrent network (Li et al., "Independently Recurrent Neural Network (IndRNN):
// Building A Longer and Deeper RNN", CVPR 2018): a unit of h depends on its own past alone.
#pragma once

#include "cells/contract.h"
#include "cells/math.h"
#include "cells/rnn.h"

namespace fastrnn::cells {

// F: the activation (cells/rnn.h).
template <class F>
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
  static constexpr bool kBoundedState = F::kIsBounded;
  static constexpr bool kProjects = false;

  // h' = f(a + u h)
  template <class A>
  static FASTRNN_HD void forward(const StepInputs<A>& inputs, const StepOutputs<A>& outputs) {
    outputs.next_state[0] = F::apply(inputs.pre[0] + inputs.parameters[0] * inputs.state[0]);
  }

  // da = dh' f'     dh = da u     du = da h
  template <class A>
  static FASTRNN_HD void backward(const StepGradientInputs<A>& inputs,
                                  const StepGradientOutputs<A>& outputs) {
    const A d_a = F::gradient(inputs.d_next_state[0], inputs.next_state[0]);
    outputs.d_pre[0] = d_a;
    outputs.d_state[0] = d_a * inputs.parameters[0];
    outputs.d_parameters[0] = d_a * inputs.state[0];
  }
};

}  // namespace fastrnn::cells
