// The persistent kernels for bfloat16.
#include "cuda/schedules/persistent/instantiate.cuh"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_PERSISTENT(BFloat16)

}  // namespace fastrnn::cuda
