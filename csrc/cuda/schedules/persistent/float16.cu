// The persistent kernels for float16.
#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/persistent/persistent.h"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_SCHEDULE(Persistent, Float16, Gpu)

}  // namespace fastrnn::cuda
