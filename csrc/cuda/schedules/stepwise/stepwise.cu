// The stepwise schedule on a GPU: cuBLAS multiplies, a kernel a body does the pointwise parts.
#include "cuda/machine/gpu.cuh"

namespace fastrnn::cuda {

template <class S>
void run_stepwise(const Forward<S>& problem, const Plan& plan, void* workspace, Gpu& gpu) {
  stepwise_forward<S>(problem, plan, workspace, gpu);
}
template <class S>
void run_stepwise(const Backward<S>& problem, const Plan& plan, void* workspace, Gpu& gpu) {
  stepwise_backward<S>(problem, plan, workspace, gpu);
}

#define FASTRNN_INSTANTIATE(S)                                                \
  template void run_stepwise<S>(const Forward<S>&, const Plan&, void*, Gpu&); \
  template void run_stepwise<S>(const Backward<S>&, const Plan&, void*, Gpu&);
FASTRNN_INSTANTIATE(Float16)
FASTRNN_INSTANTIATE(BFloat16)
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
#undef FASTRNN_INSTANTIATE

}  // namespace fastrnn::cuda
