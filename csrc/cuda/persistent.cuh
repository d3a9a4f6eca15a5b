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

template <class S>
bool is_resident(const Forward<S>* problems, int directions, const Plan& plan, const Chip& chip) {
  Rehearsal rehearsal(chip.multiprocessors);
  persistent_forward<S>(problems, directions, plan, nullptr, rehearsal);
  return rehearsal.all_fit;
}
template <class S>
bool is_resident(const Backward<S>* problems, int directions, const Plan& plan, const Chip& chip) {
  Rehearsal rehearsal(chip.multiprocessors);
  persistent_backward<S>(problems, directions, plan, nullptr, rehearsal);
  return rehearsal.all_fit;
}

#define FASTRNN_INSTANTIATE_PERSISTENT(S)                                             \
  template void run_persistent<S>(const Forward<S>*, int, const Plan&, void*, Gpu&);  \
  template void run_persistent<S>(const Backward<S>*, int, const Plan&, void*, Gpu&); \
  template bool is_resident<S>(const Forward<S>*, int, const Plan&, const Chip&);     \
  template bool is_resident<S>(const Backward<S>*, int, const Plan&, const Chip&);

}  // namespace fastrnn::cuda
