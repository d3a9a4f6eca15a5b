// Linear recurrences on a GPU.
#include "cuda/scan/scan.h"

#include "cuda/machine/gpu.cuh"
#include "cuda/scan/api.h"

namespace fastrnn::cuda {

template <class Problem>
ScanPlan plan_scan(const Problem& problem) {
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "find the current device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "describe the device");
  return make_scan_plan(problem.shape, multiprocessors, shares_results(problem));
}

template <class S>
struct ScanTypeOf;
template <class S>
struct ScanTypeOf<Scan<S>> {
  using Type = S;
};
template <class S>
struct ScanTypeOf<ScanGradients<S>> {
  using Type = S;
};

template <class Problem>
std::size_t scan_workspace_bytes(const Problem& problem, const ScanPlan& plan) {
  return ScanLayout<Accumulate<typename ScanTypeOf<Problem>::Type>>(problem.shape, plan).bytes;
}

template <class Problem>
void run_scan(const Problem& problem, const ScanPlan& plan, void* workspace, void* stream) {
  Gpu gpu(stream, nullptr);
  run_scan_on(problem, plan, workspace, gpu);
}

#define FASTRNN_INSTANTIATE_FOR(Problem)                                      \
  template ScanPlan plan_scan(const Problem&);                                \
  template std::size_t scan_workspace_bytes(const Problem&, const ScanPlan&); \
  template void run_scan(const Problem&, const ScanPlan&, void*, void*);
#define FASTRNN_INSTANTIATE(S)     \
  FASTRNN_INSTANTIATE_FOR(Scan<S>) \
  FASTRNN_INSTANTIATE_FOR(ScanGradients<S>)
FASTRNN_INSTANTIATE(Float16)
FASTRNN_INSTANTIATE(BFloat16)
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_INSTANTIATE_FOR

}  // namespace fastrnn::cuda
