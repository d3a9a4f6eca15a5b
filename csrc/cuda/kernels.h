// The GPU's kernels as the layers above see them: one call a layer and direction. No torch in
// here; the caller brings the stream, the cuBLAS handle (set to that stream) and the memory.
//
// Everything is put on the stream and nothing waits for it, so a call can be captured in a CUDA
// graph. float32 products follow the handle's math mode (TF32 or not); half types are added in
// float32. Failures are thrown as std::runtime_error.
#pragma once

#include <cstddef>

#include "plan.h"
#include "value.h"

namespace fastrnn::cuda {

struct Context {
  void* stream;     // cudaStream_t
  void* blas;       // cublasHandle_t
  void* workspace;  // of forward_workspace / backward_workspace bytes, on the device
};

// Pointers of problems are device pointers; S: Float16, BFloat16, float or double.
template <class S>
using Forward = LayerForward<S, Accumulate<S>>;
template <class S>
using Backward = LayerBackward<S, Accumulate<S>, S>;

template <class S>
std::size_t forward_workspace(const LayerShape& shape);
template <class S>
std::size_t backward_workspace(const LayerShape& shape);

template <class S>
void forward(const Forward<S>& problem, const Context& context);
template <class S>
void backward(const Backward<S>& problem, const Context& context);

}  // namespace fastrnn::cuda
