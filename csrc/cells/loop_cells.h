// The cells that only the time loops with options run (problem/recurrence.h): those with two
// products per step, and those with other activations of the gates. No other schedule has them.
#pragma once

#include "cells/halves.h"
#include "cells/registry.h"
#include "cells/two_products.h"

//       enumerator  name                type
#define FASTRNN_LOOP_CELLS(CELL)                                                                   \
  CELL(kLstmHard, "lstm_hard_sigmoid",                                                             \
       ::fastrnn::cells::LstmWith<::fastrnn::cells::HardSigmoidGate>)                              \
  CELL(kGruHard, "gru_hard_sigmoid", ::fastrnn::cells::GruWith<::fastrnn::cells::HardSigmoidGate>) \
  CELL(kResetBeforeGru, "gru_reset_before",                                                        \
       ::fastrnn::cells::ResetBeforeGru<::fastrnn::cells::SigmoidGate>)                            \
  CELL(kResetBeforeGruHard, "gru_reset_before_hard_sigmoid",                                       \
       ::fastrnn::cells::ResetBeforeGru<::fastrnn::cells::HardSigmoidGate>)                        \
  CELL(kMgu, "mgu", ::fastrnn::cells::Mgu)

namespace fastrnn {

enum LoopCellIndex : int {
#define FASTRNN_CELL(index, name, type) index,
  FASTRNN_LOOP_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
      kLoopCellCount
};

struct LoopCell {
  CellInfo info;    // its kind is kFirstLoopCell + index
  int first_gates;  // of the first product; fewer than all gates with two products
};

inline constexpr LoopCell kLoopCells[kLoopCellCount] = {
#define FASTRNN_CELL(index, name, type)                                       \
  {make_cell_info<type>(static_cast<CellKind>(kFirstLoopCell + index), name), \
   cells::kFirstGates<type>},
    FASTRNN_LOOP_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

#define FASTRNN_CELL(index, name, type) static_assert(cells::check_cell<type>());
FASTRNN_LOOP_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL

// Gates of the first product of a step; those of a second product follow. Always inlined, as
// cell_info.
inline constexpr __attribute__((always_inline)) int first_gates(const CellInfo& cell) {
  return is_loop_cell(cell) ? kLoopCells[static_cast<int>(cell.kind) - kFirstLoopCell].first_gates
                            : cell.gates;
}

}  // namespace fastrnn
