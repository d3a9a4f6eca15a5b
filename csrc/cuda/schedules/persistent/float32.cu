// The persistent kernels for float32 and TF32.
#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/persistent/persistent.h"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_SCHEDULE(Persistent, float, Gpu)

}  // namespace fastrnn::cuda
