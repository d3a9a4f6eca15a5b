// A recurrence that is linear in the state (cells/linear_scan.h), over T steps of B sequences of H
// independent units. A row of a matrix [T, B, H] is that of a step and a sequence.
#pragma once

#include <cstdint>

#include "cells/scan_registry.h"

namespace fastrnn {

inline constexpr int kMostScanInputs = 4;

// The order of the steps: step 0 is the first one in time, or the last one if `reverse`.
struct ScanShape {
  std::int64_t steps = 0, columns = 0;  // columns: B*H
  bool reverse = false;
  std::int64_t batch = 1;
  std::int64_t units = columns / batch;  // H; kept, because GPUs divide slowly

  // The time of a step.
  FASTRNN_HD std::int64_t row(std::int64_t step) const { return reverse ? steps - 1 - step : step; }
};

// Matrix [T, B, H] whose rows are contiguous; null: absent.
template <class S>
struct ScanMatrix {
  S* data = nullptr;
  std::int64_t stride = 0;  // from row to row
};
// An input of the cell. A bias [H] is added to it; null: none.
template <class S>
struct ScanInput {
  const S* data = nullptr;
  std::int64_t stride = 0;
  const S* bias = nullptr;
};

// Sequences that end before the last step, or begin again. At steps beyond a sequence's length its
// state stays, and what such a step returns is zero. A reset replaces the state before a step.
template <class S>
struct ScanMarks {
  const std::int64_t* lengths = nullptr;  // [B]; null: T
  const std::uint8_t* resets = nullptr;   // [T, B]; null: none
  const S* reset_h = nullptr;             // [1 or T, B, H]; null: zeros
  std::int64_t reset_stride = 0;          // of reset_h, from step to step

  FASTRNN_HD bool any() const { return lengths != nullptr || resets != nullptr; }
  FASTRNN_HD bool is_ended(std::int64_t time, std::int64_t sequence) const {
    return lengths != nullptr && time >= lengths[sequence];
  }
  FASTRNN_HD bool is_reset(const ScanShape& shape, std::int64_t time, std::int64_t sequence) const {
    return resets != nullptr && resets[time * shape.batch + sequence] != 0;
  }
  // The row of states after a reset.
  FASTRNN_HD const S* state(const ScanShape& shape, std::int64_t time,
                            std::int64_t sequence) const {
    return reset_h == nullptr ? nullptr : reset_h + time * reset_stride + sequence * shape.units;
  }
};

template <class S>
struct Scan {
  ScanShape shape;
  ScanCell cell;
  bool positive;
  ScanInput<S> in[kMostScanInputs];
  const S* h0;  // [B, H]; null: zeros
  S* h;         // [T, B, H], the states after each step; null: not needed
  S* y;         // [T, B, H], the output of a cell that has one
  S* h_n;       // [B, H], the state after the last step; null: not needed
  ScanMarks<S> marks;
};

// The type in which values of S are computed and added.
template <class S>
struct ScanSumOf {
  using Type = float;
};
template <>
struct ScanSumOf<double> {
  using Type = double;
};
template <class S>
using ScanSum = typename ScanSumOf<S>::Type;

template <class S>
struct ScanGradients {
  ScanShape shape;
  ScanCell cell;
  bool positive;
  ScanInput<S> in[kMostScanInputs];
  const S* d_y;    // the gradients at the output, or at h
  const S* d_h_n;  // null: zeros
  const S* h;      // as forward has written it
  const S* h0;     // null: zeros
  ScanMarks<S> marks;
  ScanMatrix<S> d_in[kMostScanInputs];
  S* d_h0;
  ScanSum<S>* d_reset_h;  // like reset_h, to add to; null: not needed

  // Row of the states before a step; null: zeros.
  FASTRNN_HD const S* before(std::int64_t step, std::int64_t sequence) const {
    const std::int64_t time = shape.row(step), units = shape.units;
    if (marks.is_reset(shape, time, sequence)) return marks.state(shape, time, sequence);
    // Against time, the steps beyond a sequence's length are the first ones.
    if (step == 0 || marks.is_ended(shape.row(step - 1), sequence))
      return h0 == nullptr ? nullptr : h0 + sequence * units;
    return h + (shape.row(step - 1) * shape.batch + sequence) * units;
  }
};

// h_t = a_t * h_{t-1} + b_t for matrices [T, N].
template <class S>
Scan<S> linear_scan(const ScanShape& shape, const S* a, const S* b, const S* h0, S* h) {
  const std::int64_t n = shape.columns;
  return {shape, ScanCell::kLinear, false, {{a, n}, {b, n}}, h0, h, nullptr, nullptr, {}};
}
template <class S>
ScanGradients<S> linear_scan_gradients(const ScanShape& shape, const S* d_h, const S* a, const S* h,
                                       const S* h0, S* d_a, S* d_b, S* d_h0) {
  const std::int64_t n = shape.columns;
  // b is not read
  return {shape, ScanCell::kLinear,    false, {{a, n}, {a, n}}, d_h, nullptr, h, h0,
          {},    {{d_a, n}, {d_b, n}}, d_h0,  nullptr};
}

}  // namespace fastrnn
