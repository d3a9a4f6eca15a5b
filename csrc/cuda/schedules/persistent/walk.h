// The persistent schedule's kernels: blocks that walk all steps of a layer in one launch. A walk is
// one pass of the time loop by one block; forward.h and backward.h have the two kinds.
//
// A block owns `kUnits` hidden units (all their gates) and the row tiles of its group, of one
// direction. It packs its part of w_hh into shared memory once. Then, for every step and row tile:
//
//   load       what the pointwise part reads that no other block writes       (all threads, early)
//   wait       until the blocks whose units a warp reads have arrived         (each warp by itself)
//   multiply   partial sums of the warp's share of k                          -> shared memory
//   sum, cell  one thread per row and unit; h' goes into the exchange         <- shared memory
//   arrive     the tile's mark of this block becomes the number of steps that it has walked
//   store      y, what backward will need, the last states: no other block waits for these
//
// The exchange has two slots that steps use in turn. Before a block writes slot k % 2, it has seen
// all blocks of the tile arrive at step k - 1, after which no block reads what step k - 2 left in
// it. (A tile's first step waits for nothing: no block has read its slots yet.) Tiles do not wait
// for one another: while one waits, the block may have another to walk.
//
// With a projection (LSTM only) each step has a second product, with a wait and an exchange of its
// own. A block then also owns kUnits outputs. There are fewer outputs than units, so the last
// blocks own none and skip the product whose columns are outputs. A block that writes into either
// exchange has waited for all blocks that read it, as above.
#pragma once

#include <cstdint>

#include "cuda/schedules/persistent/block_product.h"
#include "problem/sequence.h"

namespace fastrnn::cuda {

// The arguments of a walk that are the same for both directions.
struct WalkShape {
  std::int64_t steps, hidden, outputs;  // T, H, R
  int unit_blocks, row_groups;
};

// The arguments of one direction that both passes have.
template <class S>
struct DirectionArguments {
  bool reverse;
  const Segment* segments;
  Exchange exchange;
  const S* w_hh;  // [G*H, R]
  std::int64_t w_hh_stride;
  const S* h0;  // [B, R]
  const S* c0;  // [B, C*H] or null
  std::int64_t y_stride;
  // only with a projection
  const S* w_hr;  // [P, H]
  std::int64_t w_hr_stride;
  Exchange projection_exchange;
};

// The part of a layer that a block computes.
struct BlockPlace {
  int unit_block, row_group, direction;

  FASTRNN_HD BlockPlace(const WalkShape& shape, unsigned block)
      : unit_block(int(block) % shape.unit_blocks),
        row_group(int(block) / shape.unit_blocks % shape.row_groups),
        direction(int(block) / (shape.unit_blocks * shape.row_groups)) {}

  FASTRNN_HD std::int64_t first_unit(int units) const { return std::int64_t(unit_block) * units; }
};

// A thread's row and unit in a tile of rows and a block of units; threads beyond have none.
template <int kUnits, class Thread>
class TileElement {
 public:
  FASTRNN_DEVICE TileElement(const Thread& thread, int unit_block)
      : row(int(thread.index()) / kUnits),
        column(int(thread.index()) % kUnits),
        unit(std::int64_t(unit_block) * kUnits + column),
        exists(thread.index() < kRowTile * kUnits) {}

  const int row, column;
  const std::int64_t unit;
  const bool exists;
};

// Takes the place of a pass's projection in layers without one.
struct NoProjection {
  template <class... Arguments>
  FASTRNN_HD explicit NoProjection(const Arguments&...) {}
};

}  // namespace fastrnn::cuda
