// All cells whose recurrence is linear in the state (linear_scan.h).
#pragma once

#include "cells/linear_scan.h"
#include "cells/min_gru.h"
#include "cells/min_lstm.h"
#include "cells/sru.h"

//   CELL(kind, name, type): the enumerator of ScanCell, the operators' name
#define FASTRNN_SCAN_CELLS(CELL)             \
  CELL(kLinear, "linear", cells::LinearScan) \
  CELL(kMinGru, "min_gru", cells::MinGru)    \
  CELL(kMinLstm, "min_lstm", cells::MinLstm) \
  CELL(kSru, "sru", cells::Sru)

namespace fastrnn {

enum class ScanCell : int {
#define FASTRNN_CELL(kind, name, type) kind,
  FASTRNN_SCAN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};

struct ScanCellInfo {
  ScanCell kind;
  const char* name;
  int inputs;
  bool has_output;
};
inline constexpr ScanCellInfo kScanCells[] = {
#define FASTRNN_CELL(kind, name, type) {ScanCell::kind, name, type::kInputs, type::kHasOutput},
    FASTRNN_SCAN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
};
inline constexpr int kScanCellCount = int(sizeof(kScanCells) / sizeof(kScanCells[0]));

}  // namespace fastrnn
