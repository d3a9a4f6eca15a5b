// The contract of a cell whose step reduces over the units of a row, as layer normalisation does.
// Such a cell has the traits of contract.h, but forward and backward compute a whole row:
//
//   template <class Row> static void forward(const Row& row);
//   template <class Row> static void backward(const Row& row);
//
//   kSavedRows        values per row that forward leaves for backward. They share the last of the
//                     kSaved columns, so a layer has at least as many units.
//   kForwardBuffers   values per unit that one loop of forward leaves for a later one
//   kBackwardBuffers  the same of backward
//
// Row::Value is the value type A, in which a value per row has the same number in all lanes:
//
//   row.units()                 H
//   row.for_units(body)         calls body(at) for all units, a vector at a time
//   row.total(sum)              the sum over the lanes of what at.add has added
//   row.lowest()                less than every number
//   row.largest(value)          the largest of what at.raise has seen
//   row.saved(k)                k < kSavedRows; backward only
//   row.set_saved(k, value)     forward only
//
// and at, a place in the row:
//
//   at.add(sum, value)          sum += value, for units of the row only
//   at.raise(largest, value)    the same for the maximum
//   at.pre(k), state(k), parameter(k), saved(k), next_state(k), d_next_state(k)
//                               the arrays of contract.h
//   at.set_saved(k, value), set_next_state, set_d_pre, set_d_state, set_d_parameter
//                               store results. A state may take the place of the one before the
//                               step, so a cell stores states in its last loop.
//   at.d_pre(k), d_parameter(k) what backward has stored, and saved(k) in forward
//   at.buffer(k), set_buffer(k, value)
#pragma once

#include <type_traits>

#include "cells/contract.h"

// Of the bodies of loops.
#define FASTRNN_INLINED __attribute__((always_inline))

namespace fastrnn::cells {

// The traits that a cell has only if it computes rows.
template <class Cell, class = void>
struct RowTraits {
  static constexpr bool kComputesRows = false;
  static constexpr int kSavedRows = 0, kForwardBuffers = 0, kBackwardBuffers = 0;
};
template <class Cell>
struct RowTraits<Cell, std::void_t<decltype(Cell::kSavedRows)>> {
  static constexpr bool kComputesRows = true;
  static constexpr int kSavedRows = Cell::kSavedRows;
  static constexpr int kForwardBuffers = Cell::kForwardBuffers;
  static constexpr int kBackwardBuffers = Cell::kBackwardBuffers;
};

}  // namespace fastrnn::cells
