// The registry: one line per cell.
#pragma once

#include "cells/fastgrnn.h"
#include "cells/gru.h"
#include "cells/indrnn.h"
#include "cells/lstm.h"
#include "cells/one_gate.h"
#include "cells/peephole_lstm.h"
#include "cells/rnn.h"
#include "cells/row_contract.h"
#include "cells/slstm.h"

//       enumerator   name           type
#define FASTRNN_CELLS(CELL)                                                          \
  CELL(kRnnTanh, "rnn_tanh", ::fastrnn::cells::Rnn<::fastrnn::cells::Tanh>)          \
  CELL(kRnnRelu, "rnn_relu", ::fastrnn::cells::Rnn<::fastrnn::cells::Relu>)          \
  CELL(kRnnSigmoid, "rnn_sigmoid", ::fastrnn::cells::Rnn<::fastrnn::cells::Sigmoid>) \
  CELL(kLstm, "lstm", ::fastrnn::cells::Lstm)                                        \
  CELL(kGru, "gru", ::fastrnn::cells::Gru)                                           \
  CELL(kIndRnn, "indrnn", ::fastrnn::cells::IndRnn<::fastrnn::cells::Relu>)          \
  CELL(kPeepholeLstm, "peephole_lstm", ::fastrnn::cells::PeepholeLstm)               \
  CELL(kSlstm, "slstm", ::fastrnn::cells::Slstm)                                     \
  CELL(kIndRnnTanh, "indrnn_tanh", ::fastrnn::cells::IndRnn<::fastrnn::cells::Tanh>) \
  CELL(kLiGru, "ligru", ::fastrnn::cells::LiGru)                                     \
  CELL(kJanet, "janet", ::fastrnn::cells::Janet)                                     \
  CELL(kFastGrnn, "fastgrnn", ::fastrnn::cells::FastGrnn)

namespace fastrnn {

enum class CellKind : int {
#define FASTRNN_CELL(kind, name, type) kind,
  FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

// The cells with CPU kernels that multiply float16, bfloat16 and int8 as they are stored: a third
// of the code of a cell. All others compute these types in float32 copies.
template <class Cell>
inline constexpr bool kHasReducedFormats = false;
template <class F>
inline constexpr bool kHasReducedFormats<cells::Rnn<F>> = true;
template <>
inline constexpr bool kHasReducedFormats<cells::Lstm> = true;
template <>
inline constexpr bool kHasReducedFormats<cells::Gru> = true;

// The traits of a cell (contract.h) that are needed to size buffers and to combine weights.
struct CellInfo {
  CellKind kind;
  const char* name;
  int gates;         // G
  int pre;           // Q, per unit
  int saved;         // S, per unit and step
  int states;        // h, and the cell states
  int saved_state;   // index in saved of the first cell state, or -1
  int parameters;    // per unit
  bool dense;        // has a recurrent product with w_hh
  bool bounded;      // |h'| <= max(1, |h|)
  bool projects;     // may have a projection
  bool reduced;      // kHasReducedFormats
  const int* pre_x;  // [G]
  const int* pre_h;  // [G]
  // Of a cell whose step reduces over the units of a row (row_contract.h), else false and 0.
  bool computes_rows;
  int saved_rows;       // values per row that forward leaves for backward
  int forward_buffers;  // per unit
  int backward_buffers;

  int cell_states() const { return states - 1; }
  int gradient_columns() const { return pre + parameters; }  // of d_pre, per unit
};

template <class Cell>
inline constexpr __attribute__((always_inline)) CellInfo make_cell_info(CellKind kind,
                                                                        const char* name) {
  return {kind,
          name,
          Cell::kGates,
          Cell::kPre,
          Cell::kSaved,
          Cell::kStates,
          Cell::kSavedState,
          Cell::kParameters,
          Cell::kDenseRecurrence,
          Cell::kBoundedState,
          Cell::kProjects,
          kHasReducedFormats<Cell>,
          Cell::kPreX,
          Cell::kPreH,
          cells::RowTraits<Cell>::kComputesRows,
          cells::RowTraits<Cell>::kSavedRows,
          cells::RowTraits<Cell>::kForwardBuffers,
          cells::RowTraits<Cell>::kBackwardBuffers};
}

inline constexpr CellInfo kCells[] = {
#define FASTRNN_CELL(kind, name, type) make_cell_info<type>(CellKind::kind, name),
    FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

#define FASTRNN_CELL(kind, name, type) static_assert(cells::check_cell<type>());
FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL

constexpr int kCellCount = int(sizeof(kCells) / sizeof(kCells[0]));
// The kinds from kCellCount on are those of cells that a program defines at run time, and from here
// on those of cells/loop_cells.h.
constexpr int kFirstLoopCell = 1 << 16;

// Host only. Always inlined, as the functions below, so that no copy is compiled for one
// instruction set.
inline constexpr __attribute__((always_inline)) const CellInfo& cell_info(CellKind kind) {
  return kCells[static_cast<int>(kind)];
}

// The cell of a layer: a row of kCells, or a cell that a program defines at run time
// (cpu/defined_cell.h), whose kind is kCellCount or more.
class CellRef {
 public:
  CellRef() = default;
  __attribute__((always_inline)) constexpr CellRef(CellKind kind) : info_(&cell_info(kind)) {}
  __attribute__((always_inline)) constexpr CellRef(const CellInfo& info) : info_(&info) {}
  __attribute__((always_inline)) constexpr operator CellKind() const { return info_->kind; }
  __attribute__((always_inline)) constexpr const CellInfo& info() const { return *info_; }

 private:
  const CellInfo* info_;
};

inline constexpr __attribute__((always_inline)) const CellInfo& cell_info(CellRef cell) {
  return cell.info();
}
inline constexpr __attribute__((always_inline)) bool is_loop_cell(const CellInfo& cell) {
  return static_cast<int>(cell.kind) >= kFirstLoopCell;
}
inline constexpr __attribute__((always_inline)) bool is_defined_at_run_time(const CellInfo& cell) {
  return static_cast<int>(cell.kind) >= kCellCount && !is_loop_cell(cell);
}

}  // namespace fastrnn
