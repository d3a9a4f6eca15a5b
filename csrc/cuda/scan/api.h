// Linear recurrences on a GPU, as the layers above see them (cuda/api.h has the layers with a
// recurrent product). All work is queued on the stream of the current device and nothing waits for
// it. Failures throw std::runtime_error.
#pragma once

#include <cstddef>

#include "cuda/scan/plan.h"

namespace fastrnn::cuda {

// Problem: a Scan or ScanGradients of Float16, BFloat16, float or double, with device pointers.
template <class Problem>
ScanPlan plan_scan(const Problem& problem);
template <class Problem>
std::size_t scan_workspace_bytes(const Problem& problem, const ScanPlan& plan);
// stream: cudaStream_t
template <class Problem>
void run_scan(const Problem& problem, const ScanPlan& plan, void* workspace, void* stream);

}  // namespace fastrnn::cuda
