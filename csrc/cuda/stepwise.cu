// The stepwise schedule on a GPU: cuBLAS multiplies, a kernel a body does the pointwise parts.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "grid.h"
#include "stepwise.h"

namespace fastrnn::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fastrnn: CUDA failed to ") + what + ": " +
                             cudaGetErrorString(status) + ".");
}
void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("fastrnn: cuBLAS failed to ") + what + ": " +
                             cublasGetStatusString(status) + ".");
}

template <class Body>
__global__ void __launch_bounds__(kBlockThreads)
    for_each_kernel(const __grid_constant__ Body body, const __grid_constant__ Grid grid) {
  const Element at = element_of(grid, blockIdx.x, threadIdx.x, threadIdx.y);
  if (at.is_inside) body(at.row, at.column);
}

template <class S>
constexpr cudaDataType_t kDataType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kDataType<double> = CUDA_R_64F;
template <>
constexpr cudaDataType_t kDataType<Float16> = CUDA_R_16F;
template <>
constexpr cudaDataType_t kDataType<BFloat16> = CUDA_R_16BF;

class Gpu {
 public:
  explicit Gpu(const Context& context)
      : stream_(static_cast<cudaStream_t>(context.stream)),
        blas_(static_cast<cublasHandle_t>(context.blas)) {}

  // cuBLAS counts columns first: it is asked for c^T [n, m] = w' a^T.
  template <class S, class C>
  void multiply(const Product<S, C>& p) {
    using A = Accumulate<S>;
    if (p.m == 0 || p.n == 0) return;
    if (p.k == 0) {
      if (!p.add)
        check(cudaMemset2DAsync(p.c, p.c_stride * sizeof(C), 0, p.n * sizeof(C), p.m, stream_),
              "clear a product");
      return;
    }
    const A alpha = 1, beta = p.add ? 1 : 0;
    const cublasComputeType_t compute =
        std::is_same_v<A, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    check(cublasGemmEx_64(blas_, p.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, p.n, p.m,
                          p.k, &alpha, p.w, kDataType<S>, p.w_stride, p.a, kDataType<S>, p.a_stride,
                          &beta, p.c, kDataType<C>, p.c_stride, compute, CUBLAS_GEMM_DEFAULT),
          "multiply");
  }

  template <class Body>
  void for_each(std::int64_t rows, std::int64_t columns, const Body& body) {
    if (rows <= 0 || columns == 0) return;
    const Grid grid = grid_for(rows, columns);
    if (grid.blocks > 0x7fffffff)
      throw std::runtime_error("fastrnn: a step must have fewer than 2^31 blocks of units.");
    for_each_kernel<<<unsigned(grid.blocks), dim3(grid.width, grid.height), 0, stream_>>>(body,
                                                                                          grid);
    check(cudaGetLastError(), "launch a kernel");
  }

 private:
  cudaStream_t stream_;
  cublasHandle_t blas_;
};

}  // namespace

template <class S>
std::size_t forward_workspace(const LayerShape& shape) {
  return StepwiseForwardLayout<S>(shape, make_plan(shape, sizeof(S))).bytes;
}
template <class S>
std::size_t backward_workspace(const LayerShape& shape) {
  return StepwiseBackwardLayout<S>(shape, make_plan(shape, sizeof(S))).bytes;
}

template <class S>
void forward(const Forward<S>& problem, const Context& context) {
  const Plan plan = make_plan(problem.shape, sizeof(S));
  Gpu gpu(context);
  switch (plan.schedule->schedule) {
    case Schedule::kStepwise:
      return stepwise_forward<S>(problem, plan, context.workspace, gpu);
  }
}
template <class S>
void backward(const Backward<S>& problem, const Context& context) {
  const Plan plan = make_plan(problem.shape, sizeof(S));
  Gpu gpu(context);
  switch (plan.schedule->schedule) {
    case Schedule::kStepwise:
      return stepwise_backward<S>(problem, plan, context.workspace, gpu);
  }
}

#define FASTRNN_INSTANTIATE(S)                                   \
  template std::size_t forward_workspace<S>(const LayerShape&);  \
  template std::size_t backward_workspace<S>(const LayerShape&); \
  template void forward<S>(const Forward<S>&, const Context&);   \
  template void backward<S>(const Backward<S>&, const Context&);
FASTRNN_INSTANTIATE(Float16)
FASTRNN_INSTANTIATE(BFloat16)
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
#undef FASTRNN_INSTANTIATE

}  // namespace fastrnn::cuda
