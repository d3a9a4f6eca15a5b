// How a linear recurrence is divided among the threads of a GPU. Plain C++, so that plans can be
// made where there is no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem/scan.h"

namespace fastrnn::cuda {

// A thread runs a column, the unit of a sequence, or a chunk of its steps.
struct ScanPlan {
  std::int64_t chunks;
};

// Threads per multiprocessor below which steps are divided into chunks. (An estimate: half of those
// that fit. No GPU has measured it.)
constexpr std::int64_t kScanThreads = 1024;
// With chunks the inputs are read twice.
constexpr std::int64_t kMinScanChunks = 3, kMostScanChunks = 256;
constexpr std::int64_t kMinScanChunkSteps = 64;

// shares_results: chunks would add to the same gradients.
inline ScanPlan make_scan_plan(const ScanShape& shape, int multiprocessors, bool shares_results) {
  if (shares_results || shape.columns == 0) return {1};
  const std::int64_t wanted = multiprocessors * kScanThreads / shape.columns;
  const std::int64_t chunks = std::min({wanted, shape.steps / kMinScanChunkSteps, kMostScanChunks});
  return {chunks < kMinScanChunks ? 1 : chunks};
}

template <class S>
bool shares_results(const Scan<S>&) {
  return false;
}
template <class S>
bool shares_results(const ScanGradients<S>& problem) {
  return problem.d_reset_h != nullptr;
}

}  // namespace fastrnn::cuda
