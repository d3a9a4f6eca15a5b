// The pointwise parts of a step: what a thread does for one row and one column. The cells' own
// text (csrc/cells) between loads and stores; also compiled for the host, where the tests run it.
//
//                columns j: hidden units
//   rows b:    ...[b,j]...      reads pre-activations, states and saved values of unit j,
//   sequences                   writes the unit's outputs; nothing is shared between threads
//
// Every struct is a copyable bundle of pointers. The stepwise schedule calls it with (row, column),
// after the recurrent product; the persistent one calls its two halves: `load`, which waits for
// nothing, before the product, and `finish` after it.
#pragma once

#include <utility>

#include "value.h"

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

// h, c, h' and c' of one step forward. Rows from `first_new` on start at this step, from h0 and c0;
// rows from `first_ending` on end at it.
template <class Cell, class S>
struct ForwardStep {
  using A = Accumulate<S>;

  std::int64_t hidden;  // H
  std::int64_t first_new, first_ending;
  const A* gates_x;   // [n, G*H] x_t w_ih^T
  const A* gates_h;   // [n, G*H] h w_hh^T
  const S* b_ih;      // [G*H] or null
  const S* b_hh;      // [G*H] or null
  const S* h_before;  // [first_new, H], h_before_stride apart (only cells that read h)
  std::int64_t h_before_stride;
  const S* h0;  // [B, H]
  const S* c0;  // [B, H]
  A* c;         // [B, H] the running cell state
  S* h;         // [n, H], h_stride apart: y, or what w_hr is to multiply
  std::int64_t h_stride;
  A* saved;  // [n, S*H] or null
  S* h_n;    // [B, H] or null
  S* c_n;    // [B, H]

  // What a unit's step reads, its share of the recurrent product apart.
  struct Inputs {
    A pre[Cell::kPre];
    A state0[2];
  };

  FASTRNN_HD Inputs load(std::int64_t b, std::int64_t unit) const {
    const std::int64_t at = b * hidden + unit;
    Inputs inputs{};
    add_side<Cell::kPreX>(inputs.pre, gates_x + b * Cell::kGates * hidden + unit, hidden, kGates);
    if (b_ih != nullptr) {
      add_side<Cell::kPreX>(inputs.pre, b_ih + unit, hidden, kGates);
      add_side<Cell::kPreH>(inputs.pre, b_hh + unit, hidden, kGates);
    }
    if constexpr (Cell::kDirect)
      inputs.state0[0] = widen(b < first_new ? h_before[b * h_before_stride + unit] : h0[at]);
    if constexpr (Cell::kStates == 2) inputs.state0[1] = b < first_new ? c[at] : A(widen(c0[at]));
    return inputs;
  }

  // The unit's share of the recurrent product are product[0], product[stride], ..., one a gate.
  // Returns h'.
  FASTRNN_HD A finish(Inputs inputs, const A* product, std::int64_t stride, std::int64_t b,
                      std::int64_t unit) const {
    const std::int64_t at = b * hidden + unit;
    add_side<Cell::kPreH>(inputs.pre, product, stride, kGates);
    A kept[Cell::kSaved + 1] = {}, state1[2] = {};
    Cell::forward(inputs.pre, inputs.state0, kept, state1);

    const S out = narrow<S>(state1[0]);
    h[b * h_stride + unit] = out;
    if constexpr (Cell::kSaved > 0) {
      if (saved != nullptr) {
        for (int s = 0; s < Cell::kSaved; ++s)
          saved[(b * Cell::kSaved + s) * hidden + unit] = kept[s];
      }
    }
    if constexpr (Cell::kStates == 2) c[at] = state1[1];
    if (b >= first_ending) {
      if (h_n != nullptr) h_n[at] = out;
      if constexpr (Cell::kStates == 2) c_n[at] = narrow<S>(state1[1]);
    }
    return state1[0];
  }

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t unit) const {
    finish(load(b, unit), gates_h + b * Cell::kGates * hidden + unit, hidden, b, unit);
  }

 private:
  static constexpr auto kGates = std::make_integer_sequence<int, Cell::kGates>{};
};

// One step backward. Rows from `first_ending` on end at this step, where the walk meets them first:
// their gradients come from d_h_n and d_c_n. Rows before carry those that the step after left.
template <class Cell, class S>
struct BackwardStep {
  using A = Accumulate<S>;

  std::int64_t hidden;  // H
  std::int64_t first_new, first_ending;
  const A* d_m;    // [n, H] the gradient at o*tanh(c') with a projection, else null
  A* d_h;          // [B, H] the running gradient at h' (left: its direct part at h)
  const S* d_h_n;  // [B, H] or null
  const S* d_y;    // [n, H], d_y_stride apart, or null
  std::int64_t d_y_stride;
  A* d_c;             // [B, H] the running gradient at c' (left: at c)
  const S* d_c_n;     // [B, H] or null
  const A* saved;     // [n, S*H]
  const S* h;         // [n, H], h_stride apart: y of this step (only cells that read h'),
  const S* h_before;  // and of the step before (only cells that read h)
  std::int64_t h_stride;
  const S* h0;            // [B, H]
  const A* saved_before;  // [n, S*H] of the step before: its saved cell state is c
  const S* c0;            // [B, H]
  S* d_pre;               // [n, Q*H]

  // What a unit's step reads, the gradient that the step after left apart.
  struct Inputs {
    A saved[Cell::kSaved + 1];
    A state0[2], state1[2];
    A d_state1[2];
  };

  FASTRNN_HD Inputs load(std::int64_t b, std::int64_t unit) const {
    const std::int64_t at = b * hidden + unit;
    Inputs inputs{};
    if (b >= first_ending && d_h_n != nullptr) inputs.d_state1[0] = widen(d_h_n[at]);
    if (d_y != nullptr) inputs.d_state1[0] += widen(d_y[b * d_y_stride + unit]);
    if constexpr (Cell::kStates == 2) {
      if (b < first_ending)
        inputs.d_state1[1] = d_c[at];
      else if (d_c_n != nullptr)
        inputs.d_state1[1] = widen(d_c_n[at]);
      inputs.state0[1] = b < first_new
                             ? saved_before[(b * Cell::kSaved + Cell::kSavedState) * hidden + unit]
                             : A(widen(c0[at]));
    }
    if constexpr (Cell::kReadsH0)
      inputs.state0[0] = widen(b < first_new ? h_before[b * h_stride + unit] : h0[at]);
    if constexpr (Cell::kReadsH1) inputs.state1[0] = widen(h[b * h_stride + unit]);
    for (int s = 0; s < Cell::kSaved; ++s)
      inputs.saved[s] = saved[(b * Cell::kSaved + s) * hidden + unit];
    return inputs;
  }

  // d_left: what the step after left of the gradient at h', 0 where there is none. d_gates [Q]
  // comes back as it was before it was rounded to d_pre.
  FASTRNN_HD void finish(Inputs inputs, A d_left, std::int64_t b, std::int64_t unit,
                         A* d_gates) const {
    const std::int64_t at = b * hidden + unit;
    A d_state0[2];
    inputs.d_state1[0] += d_left;
    Cell::backward(inputs.saved, inputs.state0, inputs.state1, inputs.d_state1, d_gates, d_state0);

    for (int q = 0; q < Cell::kPre; ++q)
      d_pre[(b * Cell::kPre + q) * hidden + unit] = narrow<S>(d_gates[q]);
    if constexpr (Cell::kDirect) d_h[at] = d_state0[0];
    if constexpr (Cell::kStates == 2) d_c[at] = d_state0[1];
  }

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t unit) const {
    Inputs inputs = load(b, unit);
    A d_left = A(0);
    if (d_m != nullptr)
      inputs.d_state1[0] = d_m[b * hidden + unit];
    else if (b < first_ending)
      d_left = d_h[b * hidden + unit];
    A d_gates[Cell::kPre];
    finish(inputs, d_left, b, unit, d_gates);
  }
};

// With a projection: d_h_all = d_h + d_y, the whole gradient at h' = m w_hr^T.
template <class S>
struct OutputGradient {
  using A = Accumulate<S>;

  std::int64_t size;  // P
  std::int64_t first_ending;
  const A* d_h;    // [B, P] the running gradient at h'
  const S* d_h_n;  // [B, P] or null
  const S* d_y;    // [n, P], d_y_stride apart, or null
  std::int64_t d_y_stride;
  S* d_h_all;  // [n, P]

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    const std::int64_t at = b * size + j;
    A sum = A(0);
    if (b < first_ending)
      sum = d_h[at];
    else if (d_h_n != nullptr)
      sum = widen(d_h_n[at]);
    if (d_y != nullptr) sum += widen(d_y[b * d_y_stride + j]);
    d_h_all[at] = narrow<S>(sum);
  }
};

// to = S(from), or zero where there is nothing to copy from.
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

}  // namespace fastrnn::cuda
