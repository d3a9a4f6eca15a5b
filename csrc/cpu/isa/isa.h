// Kernels and facts that each instruction set offers.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/api.h"
#include "cpu/layout.h"
#include "cpu/recurrence_layout.h"
#include "cpu/runtime/team.h"
#include "problem/bfloat16.h"
#include "problem/float16.h"
#include "problem/recurrence.h"
#include "problem/scan.h"

namespace fastrnn::cpu {

template <class T>
struct Walk {
  // Reads panels that the team has packed, or that were packed before the call.
  void (*forward)(const LayerForward<T, T>&, const Plan&, const PanelLayout&, T* panels,
                  const ForwardLayout&, T* scratch, Team&, int rank);
  void (*backward)(const LayerBackward<T, T>&, const Plan&, const BackwardLayout&, T* workspace,
                   Team&, int rank);
  void (*gradients)(const LayerGradients<T>&, const Plan&, const GradientLayout&, T* workspace,
                    Team&, int rank);
};

template <class T>
struct Walks {
  // Packs a rank's part of the weights and the bias of forward into panels.
  void (*pack)(const LayerShape&, const LayerWeights<T>&, const Plan&, const PanelLayout&,
               T* panels, int rank);
  WeightFormats recurrent_formats;  // of w_hh in forward (cpu/kernels/product/formats.h)
  Walk<T> of[kCellCount];           // by CellKind; walk_of below serves all cells
};

// Multiply-adds in registers (cpu/kernels/peak.h).
struct PeakLoop {
  float (*run)(std::int64_t rounds, float factor, float term);
  double flops_per_round;
};

// The kernels of a linear recurrence (cpu/kernels/scan/scan.h). The units of each sequence are
// divided into blocks, of which the last one may be smaller. A part is a range of blocks of all
// sequences for a range of steps in the order of the pass. A state, and what `summarize` writes, is
// an array of kScanBlock values for each block of the part.
constexpr std::int64_t kScanBlock = 32;
struct ScanPart {
  std::int64_t first_block, blocks;
  std::int64_t first_step, steps;
  bool streams;  // whether results are stored past the caches
};
template <class Problem, class Value>
struct ScanKernels {
  // Runs a part. state: before the part, then after it.
  void (*run)(const Problem&, const ScanPart&, Value* state);
  // Writes the state after a part that starts with zeros, and the product of a over its steps.
  void (*summarize)(const Problem&, const ScanPart&, Value* state, Value* product);
};
template <class S>
struct ScanPasses {
  ScanKernels<Scan<S>, ScanSum<S>> forward;
  ScanKernels<ScanGradients<S>, ScanSum<S>> gradients;
};
template <class S>
struct ScanTable {
  ScanPasses<S> of[kScanCellCount];  // by ScanCell
};
struct ScanTypes {
  ScanTable<float> of_float;
  ScanTable<double> of_double;
  ScanTable<Bfloat16> of_bfloat16;
  ScanTable<Float16Value> of_float16;
};

// Time loops with options (cpu/kernels/recurrence/table.h); null for cells without kernels.
template <class T>
struct RecurrenceKernels {
  void (*forward)(const Recurrence<T>&, const Plan&, const RecurrenceLayout&, T* workspace, Team&,
                  int rank);
  void (*backward)(const RecurrenceGradients<T>&, const Plan&, const RecurrenceBackwardLayout&,
                   T* workspace, Team&, int rank);
};
template <class T>
struct RecurrenceTable {
  RecurrenceKernels<T> of[kCellCount];         // by CellKind
  RecurrenceKernels<T> loops[kLoopCellCount];  // of cells/loop_cells.h

  const RecurrenceKernels<T>& of_cell(const CellInfo& cell) const {
    const int kind = static_cast<int>(cell.kind);
    return is_loop_cell(cell) ? loops[kind - kFirstLoopCell] : of[kind];
  }
};

struct Isa {
  const char* name;
  int vector_bytes;
  Walks<float> walks_float;
  Walks<double> walks_double;
  PeakLoop peak;
  ScanTypes scans;
  RecurrenceTable<float> recurrences_float;
  RecurrenceTable<double> recurrences_double;

  // Whether forward can hold w_hh in this format.
  bool has_recurrent_format(WeightFormat format, int element_bytes) const {
    return (element_bytes == 4 ? walks_float.recurrent_formats : walks_double.recurrent_formats)
        .has(format);
  }
  template <class T>
  const Walks<T>& walks() const {
    if constexpr (sizeof(T) == 4) {
      return walks_float;
    } else {
      return walks_double;
    }
  }
  template <class T>
  const RecurrenceTable<T>& recurrences() const {
    if constexpr (sizeof(T) == 4) {
      return recurrences_float;
    } else {
      return recurrences_double;
    }
  }
};

// The kernels of a cell that was defined at run time (cpu/defined_cell.h). check_kernels(isa, cell)
// must have passed.
template <class T>
const Walk<T>& defined_walk(const Isa& isa, CellKind cell);

// The kernels of a cell.
template <class T>
const Walk<T>& walk_of(const Isa& isa, CellKind cell) {
  const int kind = static_cast<int>(cell);
  return kind < kCellCount ? isa.walks<T>().of[kind] : defined_walk<T>(isa, cell);
}

// Throws std::invalid_argument if the cell was defined at run time and its kernels were not
// compiled for this instruction set.
void check_kernels(const Isa& isa, CellRef cell);

// The instruction set in use (dispatch.cpp).
const Isa& isa();
// The instruction set with this name, which must be that of an Isa.
const Isa& isa_named(const char* name);

// Whether this CPU converts float16 faster into vectors of 32 bytes than into vectors of 64 bytes.
// Matters for AVX-512 only.
FASTRNN_EXPORT bool widens_by_halves();

}  // namespace fastrnn::cpu
