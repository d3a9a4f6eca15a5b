// How the blocks of a persistent kernel pass the operands of a product to each other.
#pragma once

#include <cstdint>

#include "cuda/math/fragment.h"

namespace fastrnn::cuda {

// Where blocks leave for one another what is multiplied next: two slots that steps use in turn, in
// some walks a third that is there from the beginning; and the marks of who has arrived.
struct Exchange {
  char* memory;            // [slots, rows, row_bytes]
  std::uint64_t* arrived;  // [row tiles, marks]
  std::int64_t rows;       // the batch in whole tiles
  int groups;              // of k
  int marks;               // blocks that write into it

  FASTRNN_HD std::int64_t row_bytes() const { return std::int64_t(groups) * kGroupBytes; }
  FASTRNN_HD char* slot(std::int64_t step) const {
    return memory + (step & 1) * rows * row_bytes();
  }
  FASTRNN_HD char* initial() const { return memory + 2 * rows * row_bytes(); }
  template <class S>
  FASTRNN_HD S* row(std::int64_t step, std::int64_t b) const {
    return reinterpret_cast<S*>(slot(step) + b * row_bytes());
  }

  // Tells the others that block `mark` has done with the tile what they need of `steps` steps.
  template <class Thread>
  FASTRNN_DEVICE void arrive(Thread& thread, std::int64_t tile, int mark,
                             std::int64_t steps) const {
    thread.sync();
    if (thread.index() == 0)
      thread.publish(arrived + std::int64_t(tile) * marks + mark, std::uint64_t(steps));
  }
};

}  // namespace fastrnn::cuda
