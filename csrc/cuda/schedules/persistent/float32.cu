// The persistent kernels for float32 and TF32.
#include "cuda/schedules/persistent/instantiate.cuh"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_PERSISTENT(float)

}  // namespace fastrnn::cuda
