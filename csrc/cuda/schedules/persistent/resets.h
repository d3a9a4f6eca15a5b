// Resets in the persistent schedule (problem/layer.h has what they are).
//
//   forward    the owner of a state that the next step replaces writes the state after the reset
//              into the exchange, so products read that one. The owner replaces what it alone reads
//              (the h of a GRU, c) when it loads it. y, h_n, c_n and saved stay as computed.
//   backward   the owner of a gradient at a replaced state adds it to the gradient at the state
//              after the reset, and passes zero on.
//
// One thread owns a row and unit at every step, so neither needs a wait of its own. Values are
// selected, never multiplied by a mask: no NaN passes a reset.
//
// Kernels with resets are types of their own. Those without have none of this code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/schedules/step.h"

namespace fastrnn::cuda {

// The resets of a direction.
template <class S>
struct WalkResets {
  Resets<S> states;
  float *d_h, *d_c;  // the gradients at states.h and states.c; null: not needed

  // Those before step t, whose rows are `rows` from the first row on.
  FASTRNN_HD ResetsOfStep<S> at(std::int64_t t, std::int64_t rows) const {
    return {states, t, t * rows};
  }

  // Moves the gradient at a state h that step t replaces. Returns what goes to the step before.
  FASTRNN_HD float pass_h(bool is_reset, float d_state, std::int64_t t, std::int64_t at) const {
    return pass(is_reset, d_state, d_h, t * states.h_stride + at);
  }
  // Moves the gradients at the states of one unit before step t that cells write.
  template <class Cell>
  FASTRNN_HD void pass_states(bool is_reset, float* d_state, std::int64_t t, std::int64_t b,
                              std::int64_t unit, std::int64_t hidden) const {
    if constexpr (Cell::kDirectPath)
      d_state[0] = pass_h(is_reset, d_state[0], t, b * hidden + unit);
    constexpr int kCellStates = cells::kCellStates<Cell>;
    for (int s = 0; s < kCellStates; ++s)
      d_state[s + 1] = pass(is_reset, d_state[s + 1], d_c,
                            t * states.c_stride + (b * kCellStates + s) * hidden + unit);
  }

 private:
  static FASTRNN_HD float pass(bool is_reset, float d_state, float* d_reset, std::int64_t at) {
    if (!is_reset) return d_state;
    if (d_reset != nullptr) d_reset[at] += d_state;
    return 0;
  }
};
struct NoResets {};
template <class S, bool kResets>
using WalkResetsOf = std::conditional_t<kResets, WalkResets<S>, NoResets>;

// A step of step.h. Inputs: what `load` reads, with the states after a reset next to those that
// they may replace, because a choice between them would wait for the mask.
template <class Cell, class S, class Step, bool kReadsH>
struct StepWithResets : Step {
  ResetsOfStep<S> resets;

  struct Inputs : Step::Inputs {
    bool is_reset = false;
    S reset_h{};  // (only if kReadsH)
    S reset_c[Step::kCellLength]{};

    FASTRNN_HD Inputs() : Step::Inputs{} {}
    FASTRNN_HD explicit Inputs(const typename Step::Inputs& inputs) : Step::Inputs(inputs) {}
  };

  FASTRNN_HD Inputs load(std::int64_t b, std::int64_t unit) const {
    Inputs inputs(Step::load(b, unit));
    inputs.is_reset = resets.mask[b] != 0;
    if constexpr (kReadsH) {
      if (resets.h != nullptr) inputs.reset_h = resets.h[b * Step::hidden + unit];
    }
    if (resets.c != nullptr) {
      for (int s = 0; s < Step::kCellStates; ++s)
        inputs.reset_c[s] = resets.c[(b * Step::kCellStates + s) * Step::hidden + unit];
    }
    return inputs;
  }

  template <class... Rest>
  FASTRNN_HD typename Step::Outputs compute(const Inputs& inputs, const Rest&... rest) const {
    typename Step::Inputs chosen = inputs;
    if (inputs.is_reset) {
      chosen.starts = true;
      if constexpr (kReadsH) chosen.h_before = inputs.reset_h;
      for (int s = 0; s < Step::kCellStates; ++s) chosen.c0[s] = inputs.reset_c[s];
    }
    return Step::compute(chosen, rest...);
  }
};

template <class Cell, class S, bool kResets>
using ForwardStepOf =
    std::conditional_t<kResets, StepWithResets<Cell, S, ForwardStep<Cell, S>, Cell::kForwardReadsH>,
                       ForwardStep<Cell, S>>;
template <class Cell, class S, bool kResets>
using BackwardStepOf =
    std::conditional_t<kResets,
                       StepWithResets<Cell, S, BackwardStep<Cell, S>, Cell::kBackwardReadsH>,
                       BackwardStep<Cell, S>>;

// What the exchange gets of a state: the state itself, or the one after the reset, if the next step
// replaces it.
template <class S, bool kResets>
class PassedState {
 public:
  FASTRNN_HD void load(const ResetsOfStep<S>& next, std::int64_t b, std::int64_t outputs,
                       std::int64_t unit) {
    if (next.mask == nullptr) return;
    is_reset_ = next.mask[b] != 0;
    if (next.h != nullptr) reset_ = next.h[b * outputs + unit];
  }
  FASTRNN_HD float of(float state) const { return is_reset_ ? widen(reset_) : state; }

 private:
  bool is_reset_ = false;
  S reset_{};
};
template <class S>
class PassedState<S, false> {
 public:
  FASTRNN_HD float of(float state) const { return state; }
};

}  // namespace fastrnn::cuda
