// The persistent kernels for float16: one source file per type, so that they compile in parallel.
#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/persistent/persistent.h"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_SCHEDULE(Persistent, Float16, Gpu)

}  // namespace fastrnn::cuda
