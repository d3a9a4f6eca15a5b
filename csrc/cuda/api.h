// The interface of the CUDA kernels: plan a call, size its workspace, run it, for all directions of
// a layer at once. Independent of torch: the caller provides the stream, the cuBLAS handle (set to
// that stream) and the memory.
//
// All work is queued on the stream of the current device and nothing waits for it, so a call can be
// captured in a CUDA graph. float32 products use TF32 if the caller allows it; half types are added
// in float32. The environment variable FASTRNN_SCHEDULE requests a schedule. Failures throw
// std::runtime_error.
#pragma once

#include <cstddef>

#include "cuda/plan.h"

namespace fastrnn::cuda {

struct Context {
  void* stream;  // cudaStream_t
  void* blas;    // cublasHandle_t; a call sets its math mode and restores it
  bool tf32;     // float32 products may round their factors to TF32
};

// One problem per direction, of the same shape except for `reverse`. S: Float16, BFloat16, float,
// double.
template <class S>
Plan plan(const Forward<S>* problems, int directions, const Context& context);
template <class S>
Plan plan(const Backward<S>* problems, int directions, const Context& context);

template <class S>
std::size_t workspace_bytes(const Forward<S>* problems, int directions, const Plan& plan);
template <class S>
std::size_t workspace_bytes(const Backward<S>* problems, int directions, const Plan& plan);

template <class S>
void run(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
         const Context& context);
template <class S>
void run(const Backward<S>* problems, int directions, const Plan& plan, void* workspace,
         const Context& context);

}  // namespace fastrnn::cuda
