// Linear recurrences as the layers above see them.
#pragma once

#include "cpu/api.h"
#include "problem/bfloat16.h"
#include "problem/float16.h"
#include "problem/scan.h"

namespace fastrnn::cpu {

// How a scan is divided among threads: groups of columns, and chunks of steps of each group.
struct ScanPlan {
  int groups, chunks;
};
FASTRNN_EXPORT ScanPlan make_scan_plan(const ScanShape& shape, ScanCell cell, int element_bytes,
                                       int threads);

// Half types are computed in float. With more than one chunk the rounding of the results depends on
// the number of threads. (Overloads: a template of a type that the library does not export would
// not be exported.)
#define FASTRNN_DECLARE_SCAN(S)                                                            \
  FASTRNN_EXPORT void scan(const Scan<S>& problem, int threads, ParallelFor parallel_for); \
  FASTRNN_EXPORT void scan_gradients(const ScanGradients<S>& problem, int threads,         \
                                     ParallelFor parallel_for);
FASTRNN_DECLARE_SCAN(float)
FASTRNN_DECLARE_SCAN(double)
FASTRNN_DECLARE_SCAN(Bfloat16)
FASTRNN_DECLARE_SCAN(Float16Value)
#undef FASTRNN_DECLARE_SCAN

}  // namespace fastrnn::cpu
