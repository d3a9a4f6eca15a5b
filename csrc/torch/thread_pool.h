// torch's thread pool, as the kernels of the CPU call it.
#pragma once

#include "torch/errors.h"
#include "torch/stable.h"

namespace fastrnn {

inline void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  check_torch(torch_parallel_for(0, n, 1, body, context));
}
inline int threads() { return int(torch::stable::get_num_threads()); }

}  // namespace fastrnn
