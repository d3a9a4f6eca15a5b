// Calls of a layer on a GPU: describes the GPU, chooses a schedule (plan.h) and runs it.
#include <cstdlib>
#include <type_traits>

#include "cuda/api.h"
#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {
namespace {

Chip current_chip() {
  int device = 0, cooperative = 0;
  Chip chip{};
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, device), "describe the device");
  };
  check(cudaGetDevice(&device), "find the current device");
  ask(chip.major, cudaDevAttrComputeCapabilityMajor);
  ask(chip.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(chip.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(cooperative, cudaDevAttrCooperativeLaunch);
  if (cooperative == 0) chip.multiprocessors = 0;  // rules out persistent plans
  return chip;
}

template <class S>
Arithmetic arithmetic(const Context& context) {
  if constexpr (std::is_same_v<S, Float16>) {
    return Arithmetic::kFloat16;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return Arithmetic::kBFloat16;
  } else if constexpr (std::is_same_v<S, double>) {
    return Arithmetic::kFloat64;
  } else {
    return context.tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat32;
  }
}

// Sets the math mode of the products of a call. The handle is torch's, so its mode is restored.
class MathMode {
 public:
  MathMode(const Context& context, cublasMath_t mode)
      : blas_(static_cast<cublasHandle_t>(context.blas)) {
    check(cublasGetMathMode(blas_, &before_), "read its math mode");
    if (mode != before_) check(cublasSetMathMode(blas_, mode), "set its math mode");
  }
  ~MathMode() { cublasSetMathMode(blas_, before_); }
  MathMode(const MathMode&) = delete;
  MathMode& operator=(const MathMode&) = delete;

 private:
  cublasHandle_t blas_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

// Half types are added in float32, even if cuBLAS splits k.
template <class S>
cublasMath_t math_mode(const Context& context) {
  if constexpr (sizeof(S) == 2) return CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  if constexpr (std::is_same_v<S, float>)
    return context.tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH;
  return CUBLAS_DEFAULT_MATH;
}

template <class S>
Plan choose(const LayerShape& shape, int directions, Pass pass, const Context& context,
            bool has_resets, bool has_step_gradients = false) {
  const Request request{shape,
                        directions,
                        pass,
                        arithmetic<S>(context),
                        current_chip(),
                        choice_named(std::getenv("FASTRNN_SCHEDULE")),
                        has_step_gradients,
                        has_resets};
  Gpu gpu(context.stream, context.blas);
  return make_plan_on<S>(request, gpu);
}

}  // namespace

template <class S>
Plan plan(const Forward<S>* problems, int directions, const Context& context) {
  return choose<S>(problems[0].shape, directions, Pass::kForward, context,
                   problems[0].resets.mask != nullptr);
}
template <class S>
Plan plan(const Backward<S>* problems, int directions, const Context& context) {
  return choose<S>(problems[0].shape, directions, Pass::kBackward, context,
                   problems[0].resets.mask != nullptr, problems[0].d_c_steps != nullptr);
}

template <class S>
std::size_t workspace_bytes(const Forward<S>* problems, int directions, const Plan& plan) {
  return runner_of<S, Gpu>(plan).workspace_bytes(problems[0].shape, directions, plan,
                                                 Pass::kForward);
}
template <class S>
std::size_t workspace_bytes(const Backward<S>* problems, int directions, const Plan& plan) {
  return runner_of<S, Gpu>(plan).workspace_bytes(problems[0].shape, directions, plan,
                                                 Pass::kBackward);
}

template <class S>
void run(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
         const Context& context) {
  const MathMode mode(context, math_mode<S>(context));
  Gpu gpu(context.stream, context.blas);
  runner_of<S, Gpu>(plan).forward(problems, directions, plan, workspace, gpu);
}
template <class S>
void run(const Backward<S>* problems, int directions, const Plan& plan, void* workspace,
         const Context& context) {
  const MathMode mode(context, math_mode<S>(context));
  Gpu gpu(context.stream, context.blas);
  runner_of<S, Gpu>(plan).backward(problems, directions, plan, workspace, gpu);
}

#define FASTRNN_INSTANTIATE_FOR(Problem)                                  \
  template Plan plan(const Problem*, int, const Context&);                \
  template std::size_t workspace_bytes(const Problem*, int, const Plan&); \
  template void run(const Problem*, int, const Plan&, void*, const Context&);
#define FASTRNN_INSTANTIATE(S)        \
  FASTRNN_INSTANTIATE_FOR(Forward<S>) \
  FASTRNN_INSTANTIATE_FOR(Backward<S>)
FASTRNN_INSTANTIATE(Float16)
FASTRNN_INSTANTIATE(BFloat16)
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_INSTANTIATE_FOR

}  // namespace fastrnn::cuda
