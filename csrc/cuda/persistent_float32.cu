// The persistent kernels for float32 and TF32.
#include "persistent.cuh"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_PERSISTENT(float)

}  // namespace fastrnn::cuda
