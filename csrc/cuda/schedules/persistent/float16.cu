// The persistent kernels for float16.
#include "cuda/schedules/persistent/instantiate.cuh"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_PERSISTENT(Float16)

}  // namespace fastrnn::cuda
