// What the products after the backward time loop read (gradients.h, bfloat16/gradients.h): the
// columns of d_pre that belong to a side of the cell, and the state before a row.
#pragma once

#include "problem/layer.h"

FASTRNN_KERNELS_BEGIN

// The gates of one side in runs whose columns of d_pre are contiguous.
template <class Cell>
class GateRuns {
 public:
  struct Run {
    int gate, pre, count;
  };

  explicit GateRuns(const int* pre) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      if (count_ > 0 && run_[count_ - 1].pre + run_[count_ - 1].count == pre[gate])
        ++run_[count_ - 1].count;
      else
        run_[count_++] = {gate, pre[gate], 1};
    }
  }
  const Run* begin() const { return run_; }
  const Run* end() const { return run_ + count_; }

 private:
  Run run_[Cell::kGates];
  int count_ = 0;
};

// The h [R] from which a row of [N, *] was computed. Fast if rows are asked for in ascending order.
template <class Value>
class StatesBefore {
 public:
  StatesBefore(const LayerShape& shape, const Value* y, std::int64_t y_stride, const Value* h0,
               const Resets<Value>& resets = {})
      : shape_(shape), y_(y), y_stride_(y_stride), h0_(h0), resets_(resets) {}

  const Value* of(std::int64_t row) {
    const Sequence& sequence = shape_.sequence;
    const auto owns = [&](std::int64_t step) {
      return row >= sequence.offset(step) && row < sequence.offset(step) + sequence.rows(step);
    };
    if (!owns(step_) && (++step_ == sequence.steps || !owns(step_))) step_ = sequence.step_of(row);
    const StepRows at = sequence.at(step_);
    if (resets_.mask != nullptr && resets_.mask[row] != 0)
      return resets_.h + step_ * resets_.h_stride + (row - at.first) * shape_.output_size();
    return at.state_before(row - at.first, y_, y_stride_, h0_, shape_.output_size());
  }

 private:
  const LayerShape& shape_;
  const Value* const y_;
  const std::int64_t y_stride_;
  const Value* const h0_;
  const Resets<Value> resets_;
  std::int64_t step_ = 0;
};

FASTRNN_KERNELS_END
