// The persistent schedule on a GPU. Included by one source file a type, so that they compile side
// by side.
#pragma once

#include "cuda/machine/gpu.cuh"

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
Plan plan_persistent(const Request& request, Gpu& gpu) {
  return resident_plan<S>(request, gpu);
}

#define FASTRNN_INSTANTIATE_PERSISTENT(S)                                             \
  template void run_persistent<S>(const Forward<S>*, int, const Plan&, void*, Gpu&);  \
  template void run_persistent<S>(const Backward<S>*, int, const Plan&, void*, Gpu&); \
  template Plan plan_persistent<S>(const Request&, Gpu&);

}  // namespace fastrnn::cuda
