// The stepwise schedule on a GPU.
#include "cuda/schedules/stepwise/stepwise.h"

#include "cuda/machine/gpu.cuh"
#include "cuda/schedules/runner.h"

namespace fastrnn::cuda {

FASTRNN_INSTANTIATE_SCHEDULE(Stepwise, Float16, Gpu)
FASTRNN_INSTANTIATE_SCHEDULE(Stepwise, BFloat16, Gpu)
FASTRNN_INSTANTIATE_SCHEDULE(Stepwise, float, Gpu)
FASTRNN_INSTANTIATE_SCHEDULE(Stepwise, double, Gpu)

}  // namespace fastrnn::cuda
