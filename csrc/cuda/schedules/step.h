// The pointwise parts of a step: the work of one thread for one row and one column. Loads, the code
// of the cell (csrc/cells), stores. Also compiled for the host, where the tests run it.
//
//                columns j: hidden units
//   rows b:    ...[b,j]...      reads pre-activations, states and saved values of unit j,
//   sequences                   writes the unit's outputs; nothing is shared between threads
//
// Every struct is a copyable set of pointers. The stepwise schedule calls it with (row, column)
// after the recurrent product. The persistent schedule calls its parts: `load`, which needs no
// other block, before the product; then `compute`; and `store` after it has published the new
// state.
#pragma once

#include <utility>

#include "cells/contract.h"
#include "cuda/machine/product.h"
#include "cuda/schedules/schedule.h"

namespace fastrnn::cuda {

// A static constexpr array of a cell cannot be indexed on the device, but its values can be named.
template <const int* Map, int Gate>
struct At {
  static constexpr int kValue = Map[Gate];
};

// pre[Map[g]] += values[g * stride] for the gates g of one side.
template <const int* Map, class A, class V, int... Gate>
FASTRNN_HD void add_side(A* pre, const V* values, std::int64_t stride,
                         std::integer_sequence<int, Gate...>) {
  ((pre[At<Map, Gate>::kValue] += widen(values[Gate * stride])), ...);
}

// One step forward: h', c' from h, c, or from h0, c0 in rows that start at this step.
template <class Cell, class S>
struct ForwardStep {
  using A = Accumulate<S>;
  static constexpr int kSavedValues = cells::kSavedLength<Cell>;
  static constexpr int kCellStates = cells::kCellStates<Cell>;
  static constexpr int kCellLength = kCellStates > 0 ? kCellStates : 1;

  std::int64_t hidden;  // H
  StepRows at;
  const A* gates_x;   // [n, G*H] x_t w_ih^T
  const A* gates_h;   // [n, G*H] h w_hh^T
  const S* b_ih;      // [G*H] or null
  const S* b_hh;      // [G*H] or null
  const S* w_unit;    // [E*H] or null
  const S* h_before;  // [at.first_starting, H], h_before_stride apart (only cells that read h)
  std::int64_t h_before_stride;
  const S* h0;  // [B, H]
  const S* c0;  // [B, C*H]
  A* c;         // [B, C*H] the running cell states
  S* h;         // [n, H], h_stride apart, or null: y, or the unprojected h'
  std::int64_t h_stride;
  A* saved;  // [n, S*H] or null
  S* h_n;    // [B, H] or null
  S* c_n;    // [B, C*H]

  // What one unit reads, except the recurrent product. Values keep the type that they have in
  // memory: a conversion would wait for the load.
  struct Inputs {
    A gates_x[Cell::kGates];
    S h_before;  // or h0 (only cells that read h)
    A c[kCellLength];
    S c0[kCellLength];
    bool starts;  // from c0, not c
  };
  // What is the same for a unit at every step: the sum of both biases, and its parameters.
  struct Constants {
    A pre[Cell::kPre];
    A parameters[cells::kParametersLength<Cell>];
  };
  struct Outputs {
    A next_state[Cell::kStates];
    A saved[kSavedValues];
  };

  FASTRNN_HD Constants constants(std::int64_t unit) const {
    Constants values{};
    if (b_ih != nullptr) {
      add_side<Cell::kPreX>(values.pre, b_ih + unit, hidden, kGates);
      if constexpr (Cell::kDenseRecurrence)
        add_side<Cell::kPreH>(values.pre, b_hh + unit, hidden, kGates);
    }
    for (int k = 0; k < Cell::kParameters; ++k)
      values.parameters[k] = widen(w_unit[k * hidden + unit]);
    return values;
  }

  FASTRNN_HD Inputs load(std::int64_t b, std::int64_t unit) const {
    const std::int64_t i = b * hidden + unit;
    Inputs inputs{};
    for (int gate = 0; gate < Cell::kGates; ++gate)
      inputs.gates_x[gate] = gates_x[(b * Cell::kGates + gate) * hidden + unit];
    inputs.starts = at.starts(b);
    if constexpr (Cell::kForwardReadsH)
      inputs.h_before = inputs.starts ? h0[i] : h_before[b * h_before_stride + unit];
    for (int s = 0; s < kCellStates; ++s) {
      const std::int64_t j = (b * kCellStates + s) * hidden + unit;
      if (inputs.starts)
        inputs.c0[s] = c0[j];
      else
        inputs.c[s] = c[j];
    }
    return inputs;
  }

  // product[0], product[stride], ...: the unit's recurrent products, one per gate.
  FASTRNN_HD Outputs compute(const Inputs& inputs, const Constants& constants, const A* product,
                             std::int64_t stride) const {
    A pre[Cell::kPre], state[Cell::kStates] = {};
    for (int q = 0; q < Cell::kPre; ++q) pre[q] = constants.pre[q];
    add_side<Cell::kPreX>(pre, inputs.gates_x, 1, kGates);
    if constexpr (Cell::kDenseRecurrence) add_side<Cell::kPreH>(pre, product, stride, kGates);
    if constexpr (Cell::kForwardReadsH) state[0] = widen(inputs.h_before);
    for (int s = 0; s < kCellStates; ++s)
      state[s + 1] = inputs.starts ? A(widen(inputs.c0[s])) : inputs.c[s];
    Outputs outputs{};
    Cell::forward(cells::StepInputs<A>{pre, state, constants.parameters},
                  cells::StepOutputs<A>{outputs.saved, outputs.next_state});
    return outputs;
  }

  FASTRNN_HD void store(const Outputs& outputs, std::int64_t b, std::int64_t unit) const {
    const S out = narrow<S>(outputs.next_state[0]);
    if (h != nullptr) h[b * h_stride + unit] = out;
    if constexpr (Cell::kSaved > 0) {
      if (saved != nullptr) {
        for (int s = 0; s < Cell::kSaved; ++s)
          saved[(b * Cell::kSaved + s) * hidden + unit] = outputs.saved[s];
      }
    }
    if (at.ends(b) && h_n != nullptr) h_n[b * hidden + unit] = out;
    for (int s = 0; s < kCellStates; ++s) {
      const std::int64_t j = (b * kCellStates + s) * hidden + unit;
      c[j] = outputs.next_state[s + 1];
      if (at.ends(b)) c_n[j] = narrow<S>(outputs.next_state[s + 1]);
    }
  }

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t unit) const {
    const A* product = gates_h + b * Cell::kGates * hidden + unit;
    store(compute(load(b, unit), constants(unit), product, hidden), b, unit);
  }

 private:
  static constexpr auto kGates = std::make_integer_sequence<int, Cell::kGates>{};
};

// One step backward. Rows that end at this step read their gradients from d_h_n and d_c_n, other
// rows those that the step after wrote. d_c_steps is added to either.
template <class Cell, class S>
struct BackwardStep {
  using A = Accumulate<S>;
  static constexpr int kSavedValues = cells::kSavedLength<Cell>;
  static constexpr int kCellStates = cells::kCellStates<Cell>;
  static constexpr int kCellLength = kCellStates > 0 ? kCellStates : 1;
  static constexpr int kColumns = cells::kGradientColumns<Cell>;

  std::int64_t hidden;  // H
  StepRows at;
  const A* d_unprojected;  // [n, H] the gradient at the unprojected h', null: no projection
  A* d_h;                  // [B, H] the running gradient at h'; store writes its direct part at h
  const S* d_h_n;          // [B, H] or null
  const S* d_y;            // [n, H], d_y_stride apart, or null
  std::int64_t d_y_stride;
  A* d_c;              // [B, C*H] the running gradient at c'; store writes that at c
  const S* d_c_n;      // [B, C*H] or null
  const S* d_c_steps;  // [n, C*H] or null
  const A* saved;      // [n, S*H]
  const S* h;          // [n, H], h_stride apart: y of this step (only cells that read h')
  std::int64_t h_stride;
  const S* h_before;  // that of the step before, h_before_stride apart (only cells that read h)
  std::int64_t h_before_stride;
  const S* h0;            // [B, H]
  const A* saved_before;  // [n, S*H] of the step before: its saved cell state is c
  const S* c0;            // [B, C*H]
  const S* w_unit;        // [E*H] or null
  S* d_pre;               // [n, (Q+E)*H]

  // What one unit reads, except the gradient from the step after; types as in memory.
  struct Inputs {
    A saved[kSavedValues];
    S h_before, h;  // (only cells that read them)
    A c_before[kCellLength];
    S c0[kCellLength];
    S d_y, d_h_n;
    A d_c[kCellLength];
    S d_c_n[kCellLength];
    S d_c_step[kCellLength];
    S parameters[cells::kParametersLength<Cell>];
    bool starts, ends;  // from c0, not c_before; with d_h_n and d_c_n, not d_c
  };
  struct Outputs {
    A d_pre[kColumns];
    A d_state[Cell::kStates];
  };

  FASTRNN_HD Inputs load(std::int64_t b, std::int64_t unit) const {
    const std::int64_t i = b * hidden + unit;
    Inputs inputs{};
    inputs.starts = at.starts(b);
    inputs.ends = at.ends(b);
    if (inputs.ends && d_h_n != nullptr) inputs.d_h_n = d_h_n[i];
    if (d_y != nullptr) inputs.d_y = d_y[b * d_y_stride + unit];
    for (int s = 0; s < kCellStates; ++s) {
      const std::int64_t j = (b * kCellStates + s) * hidden + unit;
      if (!inputs.ends)
        inputs.d_c[s] = d_c[j];
      else if (d_c_n != nullptr)
        inputs.d_c_n[s] = d_c_n[j];
      if (d_c_steps != nullptr) inputs.d_c_step[s] = d_c_steps[j];
      if (inputs.starts)
        inputs.c0[s] = c0[j];
      else
        inputs.c_before[s] =
            saved_before[(b * Cell::kSaved + Cell::kSavedState + s) * hidden + unit];
    }
    for (int k = 0; k < Cell::kParameters; ++k) inputs.parameters[k] = w_unit[k * hidden + unit];
    if constexpr (Cell::kBackwardReadsH)
      inputs.h_before = inputs.starts ? h0[i] : h_before[b * h_before_stride + unit];
    if constexpr (Cell::kBackwardReadsNextH) inputs.h = h[b * h_stride + unit];
    for (int s = 0; s < Cell::kSaved; ++s)
      inputs.saved[s] = saved[(b * Cell::kSaved + s) * hidden + unit];
    return inputs;
  }

  // d_after: the gradient at h' from the step after, 0 if there is none.
  FASTRNN_HD Outputs compute(const Inputs& inputs, A d_after) const {
    A state[Cell::kStates] = {}, next_state[Cell::kStates] = {}, d_next_state[Cell::kStates] = {};
    d_next_state[0] = d_after + widen(inputs.d_h_n) + widen(inputs.d_y);
    if constexpr (Cell::kBackwardReadsH) state[0] = widen(inputs.h_before);
    if constexpr (Cell::kBackwardReadsNextH) next_state[0] = widen(inputs.h);
    A parameters[cells::kParametersLength<Cell>] = {};
    for (int s = 0; s < kCellStates; ++s) {
      state[s + 1] = inputs.starts ? A(widen(inputs.c0[s])) : inputs.c_before[s];
      d_next_state[s + 1] = inputs.ends ? A(widen(inputs.d_c_n[s])) : inputs.d_c[s];
      d_next_state[s + 1] += widen(inputs.d_c_step[s]);
    }
    for (int k = 0; k < Cell::kParameters; ++k) parameters[k] = widen(inputs.parameters[k]);
    Outputs outputs{};
    Cell::backward(
        cells::StepGradientInputs<A>{inputs.saved, state, next_state, d_next_state, parameters},
        cells::StepGradientOutputs<A>{outputs.d_pre, outputs.d_state, outputs.d_pre + Cell::kPre});
    return outputs;
  }

  FASTRNN_HD void store(const Outputs& outputs, std::int64_t b, std::int64_t unit) const {
    for (int q = 0; q < kColumns; ++q)
      d_pre[(b * kColumns + q) * hidden + unit] = narrow<S>(outputs.d_pre[q]);
    if constexpr (Cell::kDirectPath) d_h[b * hidden + unit] = outputs.d_state[0];
    for (int s = 0; s < kCellStates; ++s)
      d_c[(b * kCellStates + s) * hidden + unit] = outputs.d_state[s + 1];
  }

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t unit) const {
    A d_after = A(0);
    if (d_unprojected != nullptr)
      d_after = d_unprojected[b * hidden + unit];
    else if (!at.ends(b))
      d_after = d_h[b * hidden + unit];
    store(compute(load(b, unit), d_after), b, unit);
  }
};

// With a projection: d_h_all = d_h + d_y, the whole gradient at the projected h'.
template <class S>
struct OutputGradient {
  using A = Accumulate<S>;

  std::int64_t size;  // P
  StepRows at;
  const A* d_h;    // [B, P] the running gradient at h'
  const S* d_h_n;  // [B, P] or null
  const S* d_y;    // [n, P], d_y_stride apart, or null
  std::int64_t d_y_stride;
  S* d_h_all;  // [n, P]

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    const std::int64_t i = b * size + j;
    A sum = A(0);
    if (!at.ends(b))
      sum = d_h[i];
    else if (d_h_n != nullptr)
      sum = widen(d_h_n[i]);
    if (d_y != nullptr) sum += widen(d_y[b * d_y_stride + j]);
    d_h_all[i] = narrow<S>(sum);
  }
};

// The states before a step whose problem has resets.
template <class S, class From, class To>
struct StateBefore {
  StepRows at;
  const std::uint8_t* mask;  // [n] not 0: the row is reset
  const S* reset;            // [n, *], or null: zeros
  const S* initial;          // [B, *]
  std::int64_t size;
  const From* running;  // [n, *] of the step before, running_stride apart
  std::int64_t running_stride;
  To* to;  // [n, *], to_stride apart; may be `running`
  std::int64_t to_stride;

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    Accumulate<S> state = Accumulate<S>(0);
    if (mask[b] != 0) {
      if (reset != nullptr) state = widen(reset[b * size + j]);
    } else {
      state = at.starts(b) ? widen(initial[b * size + j]) : widen(running[b * running_stride + j]);
    }
    to[b * to_stride + j] = narrow<To>(state);
  }
};

// Moves the gradients at the states before a step to the states after a reset.
template <class A>
struct ResetGradient {
  const std::uint8_t* mask;  // [n] not 0: the row is reset
  std::int64_t size;
  A* d_state;  // [n, *]
  A* d_reset;  // [n, *] or null: not needed

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    if (mask[b] == 0) return;
    const std::int64_t i = b * size + j;
    if (d_reset != nullptr) d_reset[i] += d_state[i];
    d_state[i] = A(0);
  }
};

// to = S(from), or zero if `from` is null.
template <class From, class S>
struct Copy {
  const From* from;  // [n, *], from_stride apart, or null
  std::int64_t from_stride;
  S* to;  // [n, *], to_stride apart
  std::int64_t to_stride;

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    to[b * to_stride + j] =
        narrow<S>(from != nullptr ? widen(from[b * from_stride + j]) : Accumulate<S>(0));
  }
};

// gates_x = x w_ih^T for some rows of x.
template <class S>
Product<S, Accumulate<S>> input_product(const Forward<S>& problem, std::int64_t first,
                                        std::int64_t rows, Accumulate<S>* gates_x) {
  const LayerShape& shape = problem.shape;
  const std::int64_t width = cell_info(shape.cell).gates * shape.hidden_size;
  return {rows,
          width,
          shape.input_size,
          problem.x + first * problem.x_stride,
          problem.x_stride,
          problem.weights.w_ih,
          problem.weights.w_ih_stride,
          true,
          gates_x,
          width,
          false};
}

}  // namespace fastrnn::cuda
