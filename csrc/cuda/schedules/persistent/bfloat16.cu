// The persistent kernels for bfloat16.
#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/persistent/persistent.h"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_SCHEDULE(Persistent, BFloat16, Gpu)

}  // namespace fastrnn::cuda
