// The time loop of one direction of a layer whose input product is there already, with what plain
// layers do not have: layer normalisation, zoneout, recurrent dropout, a clipped cell state, two
// products per step (cells/loop_cells.h). LN(v) = (v - mean(v)) / sqrt(var(v) + epsilon) over the
// values of a row; an absent part drops out of its line.
//
//   a   = w_hh (mask_h * h)                     over all gates
//   pre = pre_x + b_x + gain_h * LN(a) + b_hh   in the order of the cell (kPreX, kPreH)
//   c'  = the cell's update, at most clip_c and at least -clip_c
//   h'  = its output from gain_c * LN(c') + bias_c
//   h  <- zone_h * h + (1 - zone_h) * h'
//   c  <- zone_c * c + (1 - zone_c) * c'
//
// With two products a has two parts, each with a normalisation of its own: the first gates have the
// first rows of w_hh times mask_h * h, the last one has the other rows times mask_h * operand,
// which the cell makes of the first gates and h (cells/two_products.h).
//
// Pointers as in problem/layer.h. Absent parts are null.
#pragma once

#include "cells/loop_cells.h"
#include "problem/layer.h"

namespace fastrnn {

template <class T>
struct RecurrenceParts {
  const T* w_hh;    // [G*H, H], contiguous
  const T* b_hh;    // [G*H]
  const T* gain_h;  // [G*H]
  const T* gain_c;  // [H]
  const T* bias_c;  // [H], only with gain_c
  const T* mask_h;  // [B, H] what multiplies h before the product with w_hh
  const T* zone_h;  // [N, H], or [1, H] for all rows: the share of the old state in the new one
  const T* zone_c;
  std::int64_t zone_h_stride, zone_c_stride;  // H, or 0
  const T* b_x;                               // [G*H]
  const T* clip_c;                            // [1]
  T epsilon;
};

// The columns of a row of `saved`, in values.
struct RecurrenceSaved {
  std::int64_t cell;        // [S*H] what the cell saves
  std::int64_t normalised;  // [G*H] LN(a), with gain_h
  std::int64_t state;       // [H] c after the step, with zone_c
  std::int64_t fresh;       // [H] h', with zone_h, if the cell's backward reads it
  std::int64_t unclipped;   // [H] c' before it is clipped, with clip_c
  // [3] 1/deviation of a; then mean and 1/deviation of c', or 1/deviation of the second part of a
  std::int64_t statistics;
  std::int64_t width;

  // The flags say which parts are there.
  constexpr RecurrenceSaved(const CellInfo& info, std::int64_t hidden, bool gain_h, bool zone_h,
                            bool zone_c, bool clip_c)
      : cell(0),
        normalised(info.saved * hidden),
        state(normalised + (gain_h ? info.gates * hidden : 0)),
        fresh(state + (zone_c ? hidden : 0)),
        unclipped(fresh + (zone_h && info.saved == 0 ? hidden : 0)),
        statistics(unclipped + (clip_c ? hidden : 0)),
        width(statistics + 3) {}
};

template <class T>
struct Recurrence {
  LayerShape shape;  // input_size and proj_size are 0
  RecurrenceParts<T> parts;
  const T* pre_x;  // [N, G*H] the input side, without b_x
  const T* h0;     // [B, H]
  const T* c0;     // [B, H] or null
  T* y;            // [N, H]
  T* h_n;          // [B, H]
  T* c_n;          // [B, H] or null
  T* saved;        // [N, RecurrenceSaved::width] or null
};

template <class T>
struct RecurrenceGradients {
  LayerShape shape;
  RecurrenceParts<T> parts;
  const T* h0;
  const T* c0;
  const T* y;
  const T* saved;
  const T* d_y;    // [N, H] or null: zero
  const T* d_h_n;  // [B, H] or null: zero
  const T* d_c_n;  // [B, H] or null: zero
  T* d_pre_x;      // [N, G*H]
  T* d_a;          // [N, G*H] at the products with w_hh
  T* d_h0;         // [B, H]
  T* d_c0;         // [B, H] or null
  T* d_vectors;    // [2*G*H + 2*H] of b_hh, gain_h, gain_c, bias_c
};

// Values of d_vectors.
constexpr std::int64_t recurrence_vectors(const CellInfo& cell, std::int64_t hidden) {
  return 2 * (cell.gates + 1) * hidden;
}

}  // namespace fastrnn
