// How the blocks of a persistent kernel pass the operands of a product to each other.
#pragma once

#include <cstdint>

#include "cuda/math/fragment.h"

namespace fastrnn::cuda {

// The operand of the next product, written by some blocks and read by others: two slots that steps
// use in turn, forward a third with the initial states; and one mark per row tile and writing
// block, the number of steps that the block has written.
struct Exchange {
  char* memory;            // [slots, rows, row_bytes]
  std::uint64_t* arrived;  // [row tiles, writers]
  std::int64_t rows;       // the batch in whole tiles
  int groups;              // of k
  int writers;             // blocks that write into it

  FASTRNN_HD std::int64_t row_bytes() const { return std::int64_t(groups) * kGroupBytes; }
  FASTRNN_HD char* slot(std::int64_t step) const {
    return memory + (step & 1) * rows * row_bytes();
  }
  FASTRNN_HD char* initial() const { return memory + 2 * rows * row_bytes(); }
  template <class S>
  FASTRNN_HD S* row(std::int64_t step, std::int64_t b) const {
    return reinterpret_cast<S*>(slot(step) + b * row_bytes());
  }

  // Publishes that this block, writer number `writer`, has written `steps` steps of the tile.
  template <class Thread>
  FASTRNN_DEVICE void arrive(Thread& thread, std::int64_t tile, int writer,
                             std::int64_t steps) const {
    thread.sync();
    if (thread.index() == 0)
      thread.publish(arrived + std::int64_t(tile) * writers + writer, std::uint64_t(steps));
  }
};

}  // namespace fastrnn::cuda
