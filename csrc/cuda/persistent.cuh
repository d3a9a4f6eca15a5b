// The persistent schedule on a GPU. Included by one source file a type, so that they compile side
// by side.
#pragma once

#include "gpu.cuh"

namespace fastrnn::cuda {

template <class S>
void run_persistent(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                    Gpu& gpu) {
  persistent_forward<S>(problems, directions, plan, workspace, gpu);
}
template <class S>
void run_persistent(const Backward<S>* problems, int directions, const Plan& plan, void* workspace,
                    Gpu& gpu) {
  persistent_backward<S>(problems, directions, plan, workspace, gpu);
}

template <class Cell, class S>
struct Residency {
  Pass pass;
  std::int64_t shared_bytes;
  const Chip& chip;

  template <class Math, int kUnits>
  int run() const {
    return pass == Pass::kForward
               ? blocks_a_multiprocessor<ForwardWalk<Cell, S, Math, kUnits>>(shared_bytes, chip)
               : blocks_a_multiprocessor<BackwardWalk<Cell, S, Math, kUnits>>(shared_bytes, chip);
  }
};

template <class S>
int resident_blocks(CellKind cell, Pass pass, const Tiling& tiling, const Chip& chip) {
  switch (cell) {
#define FASTRNN_CELL(kind, name, type) \
  case CellKind::kind:                 \
    return with_tiling<S>(tiling, Residency<type, S>{pass, tiling.shared_bytes, chip});
    FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }
  return 0;
}

#define FASTRNN_INSTANTIATE_PERSISTENT(S)                                             \
  template void run_persistent<S>(const Forward<S>*, int, const Plan&, void*, Gpu&);  \
  template void run_persistent<S>(const Backward<S>*, int, const Plan&, void*, Gpu&); \
  template int resident_blocks<S>(CellKind, Pass, const Tiling&, const Chip&);

}  // namespace fastrnn::cuda
