// The order of a batch of sequences: the rows of a step, the order in which steps are computed, and
// the state before a step. All time loops (CPU, both CUDA schedules) and the products over all
// steps ask here.
//
// The steps of a batch are rows of [N, *] matrices. Step t owns the rows offset(t) ... offset(t) +
// rows(t) - 1, and its row b belongs to sequence b. A padded batch has rows(t) = B for all t; a
// packed one has rows(t) descending, so the active sequences of a step are the first ones. Rows of
// successive steps follow one another without gaps.
//
//      t = 0   1   2   3                     order:   forward   t = 0 ... T-1
//  b=0     x   x   x   x   <- last row                reverse   t = T-1 ... 0
//  b=1     x   x   x         ends early
//
// "Before" and "after" are meant in this order. A sequence starts from its initial state at its
// first step in this order, and leaves its final state at its last one.
#pragma once

#include <cstdint>

#include "cells/math.h"

namespace fastrnn {

// The rows of one step. Count: a type that holds a number of sequences.
template <class Count>
struct StepRowsOf {
  std::int64_t first;         // the first row in [N, *]
  std::int64_t first_before;  // the first row of the step before, if there is one
  Count rows;                 // number of rows
  Count first_starting;       // rows b from here on start at this step, from their initial state
  Count first_ending;         // rows b from here on end at this step

  template <class Other>
  FASTRNN_HD operator StepRowsOf<Other>() const {
    return {first, first_before, Other(rows), Other(first_starting), Other(first_ending)};
  }

  FASTRNN_HD bool starts(Count b) const { return b >= first_starting; }
  FASTRNN_HD bool ends(Count b) const { return b >= first_ending; }

  // The state from which row b of this step is computed: the one that the step before wrote, in
  // states [N, *], or the initial state in initial [B, *].
  template <class State>
  FASTRNN_HD const State* state_before(std::int64_t b, const State* states,
                                       std::int64_t states_stride, const State* initial,
                                       std::int64_t initial_stride) const {
    return starts(Count(b)) ? initial + b * initial_stride
                            : states + (first_before + b) * states_stride;
  }
};

using StepRows = StepRowsOf<std::int64_t>;

// A contiguous range of rows in [N, *].
struct RowRange {
  std::int64_t first, count;
};

// Always inlined: the program must not share a copy that was compiled for one instruction set.
struct Sequence {
  std::int64_t steps;               // T
  std::int64_t batch;               // B
  bool reverse;                     // steps are computed from T-1 to 0
  const std::int64_t* step_offset;  // [T] on the host
  const std::int64_t* step_rows;    // [T] on the host

  FASTRNN_HD std::int64_t offset(std::int64_t t) const { return step_offset[t]; }
  FASTRNN_HD std::int64_t rows(std::int64_t t) const { return step_rows[t]; }
  FASTRNN_HD std::int64_t total_rows() const {  // N
    return steps == 0 ? 0 : step_offset[steps - 1] + step_rows[steps - 1];
  }

  // The k-th step in order of computation.
  FASTRNN_HD std::int64_t step(std::int64_t k) const { return reverse ? steps - 1 - k : k; }

  FASTRNN_HD StepRows at(std::int64_t t) const {
    const bool has_earlier = t > 0, has_later = t + 1 < steps;
    const std::int64_t here = step_rows[t], later = has_later ? step_rows[t + 1] : 0;
    if (reverse)
      return {step_offset[t], has_later ? step_offset[t + 1] : 0, here, later,
              has_earlier ? here : 0};
    return {step_offset[t], has_earlier ? step_offset[t - 1] : 0, here, has_earlier ? here : 0,
            later};
  }

  // The step that owns a row of [N, *].
  FASTRNN_HD std::int64_t step_of(std::int64_t row) const {
    std::int64_t first = 0, last = steps - 1;
    while (first < last) {
      const std::int64_t middle = first + (last - first + 1) / 2;
      if (step_offset[middle] <= row) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }

  // The rows of the steps begin ... end - 1 in order of computation.
  FASTRNN_HD RowRange rows_between(std::int64_t begin, std::int64_t end) const {
    const std::int64_t low = reverse ? step(end - 1) : step(begin);
    const std::int64_t high = reverse ? step(begin) : step(end - 1);
    return {step_offset[low], step_offset[high] + step_rows[high] - step_offset[low]};
  }

  // Steps from the k-th on that have at most `most_rows` rows together, but at least one step.
  // Returns the k of the first step after them.
  FASTRNN_HD std::int64_t chunk_end(std::int64_t k, std::int64_t most_rows) const {
    std::int64_t count = step_rows[step(k++)];
    while (k < steps && count + step_rows[step(k)] <= most_rows) count += step_rows[step(k++)];
    return k;
  }
};

// Successive steps with the same number of rows. The last segment of a batch is {T, N, 0}.
struct Segment {
  std::int64_t first_step, first_row, rows;
};

// Gives the same answers as Sequence::at on a GPU, from segments. It reads memory only where the
// number of rows changes, so steps should be asked for one after the other. Batches have fewer than
// 2^31 sequences (plan.h rejects larger ones).
class SegmentedSequence {
 public:
  FASTRNN_HD SegmentedSequence(const Segment* segments, bool reverse)
      : segment_(segments), reverse_(reverse) {}

  FASTRNN_HD StepRowsOf<int> at(std::int64_t t) {
    if (t < here_.first_step || t >= end_) find(t);
    const int rows = int(here_.rows), later = t + 1 < end_ ? rows : rows_later_;
    const std::int64_t first = here_.first_row + (t - here_.first_step) * rows;
    if (reverse_) return {first, first + rows, rows, later, t == 0 ? 0 : rows};
    const int earlier = t > here_.first_step ? rows : rows_earlier_;
    return {first, first - earlier, rows, t == 0 ? 0 : rows, later};
  }

 private:
  FASTRNN_HD void find(std::int64_t t) {
    while (t < segment_->first_step) --segment_;
    while (t >= segment_[1].first_step) ++segment_;
    here_ = *segment_;
    end_ = segment_[1].first_step;
    rows_later_ = int(segment_[1].rows);
    rows_earlier_ = here_.first_step > 0 ? int(segment_[-1].rows) : 0;
  }

  const Segment* segment_;
  bool reverse_;
  Segment here_{};
  std::int64_t end_ = 0;                   // the first step after the segment
  int rows_later_ = 0, rows_earlier_ = 0;  // of the neighbouring segments
};

}  // namespace fastrnn
