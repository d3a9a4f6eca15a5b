// The registry: every cell fastrnn knows, one line each.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

//       enumerator   name           type
#define FASTRNN_CELLS(CELL)                                                          \
  CELL(kRnnTanh, "rnn_tanh", ::fastrnn::cells::Rnn<::fastrnn::cells::Tanh>)          \
  CELL(kRnnRelu, "rnn_relu", ::fastrnn::cells::Rnn<::fastrnn::cells::Relu>)          \
  CELL(kRnnSigmoid, "rnn_sigmoid", ::fastrnn::cells::Rnn<::fastrnn::cells::Sigmoid>) \
  CELL(kLstm, "lstm", ::fastrnn::cells::Lstm)                                        \
  CELL(kGru, "gru", ::fastrnn::cells::Gru)

namespace fastrnn {

enum class CellKind : int {
#define FASTRNN_CELL(kind, name, type) kind,
  FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

// What a schedule has to know of a cell to size its buffers.
struct CellInfo {
  CellKind kind;
  const char* name;
  int gates;         // G
  int pre;           // Q: pre-activations a unit
  int saved;         // S: values saved a unit and step
  int states;        // 1: h; 2: h and c
  const int* pre_x;  // [G] where gate g of the input side adds into
  const int* pre_h;  // [G] the same for the hidden side
};

inline constexpr CellInfo kCells[] = {
#define FASTRNN_CELL(kind, name, type)                              \
  CellInfo{CellKind::kind, name,          type::kGates, type::kPre, \
           type::kSaved,   type::kStates, type::kPreX,  type::kPreH},
    FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

// On the host alone. Inlined for good: a copy of its own would belong to one instruction set.
inline constexpr __attribute__((always_inline)) const CellInfo& cell_info(CellKind kind) {
  return kCells[static_cast<int>(kind)];
}

}  // namespace fastrnn
