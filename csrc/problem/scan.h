// A linear recurrence over T steps of N independent columns (cells/linear_scan.h). Every matrix is
// [T, N] and contiguous, every state [N].
#pragma once

#include <cstdint>

namespace fastrnn {

// The order of the steps: step 0 is the first one in time, or the last one if `reverse`.
struct ScanShape {
  std::int64_t steps, columns;
  bool reverse;

  // The row of a step.
  std::int64_t row(std::int64_t step) const { return reverse ? steps - 1 - step : step; }
};

template <class S>
struct Scan {
  ScanShape shape;
  const S* a;
  const S* b;
  const S* h0;  // null: zeros
  S* h;         // the states after each step
};

template <class S>
struct ScanGradients {
  ScanShape shape;
  const S* d_h;
  const S* a;
  const S* h;   // as forward has written it
  const S* h0;  // null: zeros
  S* d_a;       // null: not needed
  S* d_b;
  S* d_h0;
};

}  // namespace fastrnn
