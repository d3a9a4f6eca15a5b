// The persistent schedule's kernels: blocks that walk all steps of a layer in one launch.
//
// A block owns `kUnits` hidden units (all their gates) and the row tiles of its group, of one
// direction. Its share of w_hh is packed into shared memory once. Then, for every step and row
// tile:
//
//   load       what the pointwise part reads that no other block writes       (all threads, early)
//   wait       until the blocks whose units a warp is to read have arrived    (each warp by itself)
//   multiply   partial sums of the warp's share of k                          -> shared memory
//   sum, cell  a thread a row and unit; h' goes into the exchange             <- shared memory
//   arrive     the tile's mark of this block becomes the number of steps that it has walked
//   store      y, what backward will need, the last states: nobody here waits for these
//
// The exchange has two slots that steps use in turn. Who writes slot k % 2 has, with its block,
// seen all blocks of the tile arrive at step k - 1, after which nobody reads what step k - 2 left
// in it. (A tile's first step waits for nothing: nobody has read its slots yet.) Tiles do not wait
// for one another: while one waits the block may have another to walk.
//
// Backward the same way round: the exchange holds the gradients of the gates, [unit][gate], and a
// block's columns are those of its units; k runs over all gates.
#pragma once

#include "cuda/math/fragment.h"
#include "cuda/schedules/step.h"

namespace fastrnn::cuda {

// What all walks are told, alike for both directions.
struct WalkShape {
  std::int64_t steps, hidden;
  int unit_blocks, row_groups;
};

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

// What a direction's walk has for itself.
struct WalkSide {
  bool reverse;
  const Segment* segments;
  Exchange exchange;
};

// Where a block stands.
struct BlockPlace {
  int unit_block, row_group, side;

  FASTRNN_HD BlockPlace(const WalkShape& shape, unsigned block)
      : unit_block(int(block) % shape.unit_blocks),
        row_group(int(block) / shape.unit_blocks % shape.row_groups),
        side(int(block) / (shape.unit_blocks * shape.row_groups)) {}
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

// A product that a block takes part in: a tile's rows of an exchange times the block's columns of
// the weights, which stay packed in its shared memory. kPerUnit: values of k that a unit brings;
// kUnits: units of a block that brings them.
template <class Math, class S, int kUnits, int kTiles, int kPerUnit, class Thread>
class BlockProduct {
 public:
  // Packs the weights into shared memory. The sums of warps that have no share stay zero for good.
  // The block has to meet before they are used.
  template <class Source>
  FASTRNN_DEVICE BlockProduct(Thread& thread, const Exchange& exchange, char* shared,
                              const Source& source)
      : thread_(thread), exchange_(exchange) {
    packed_ = reinterpret_cast<Quad*>(shared);
    partial_ = reinterpret_cast<float*>(packed_ + exchange.groups * kTiles * kWarp);
    warp_ = thread.uniform(int(thread.index()) / kWarp);
    share_ = share_of(warp_, exchange.groups);
    const int first = share_.begin * kGroupValues<S> / kPerUnit;
    const int last = (share_.end * kGroupValues<S> - 1) / kPerUnit;
    first_producer_ = first / kUnits;
    last_producer_ = last / kUnits;
    if (last_producer_ >= exchange.marks) last_producer_ = exchange.marks - 1;
    pack_weights<Math, S, kTiles>(thread, exchange.groups, packed_, source);
    for (int i = int(thread.index()); i < kWalkWarps * kPartial; i += kWalkThreads) partial_[i] = 0;
  }
  // The first byte of shared memory that it leaves.
  FASTRNN_DEVICE char* end() const {
    return reinterpret_cast<char*>(partial_ + kWalkWarps * kPartial);
  }

  // Waits for the tile's rows of `steps` steps, as far as this warp reads them.
  FASTRNN_DEVICE void wait(int tile, std::int64_t steps) {
    if (share_.begin == share_.end) return;
    const std::uint64_t* arrived = exchange_.arrived + std::int64_t(tile) * exchange_.marks;
    for (int i = first_producer_ + int(thread_.index()) % kWarp; i <= last_producer_; i += kWarp)
      thread_.wait(arrived + i, std::uint64_t(steps));
    thread_.sync_warp();
  }

  FASTRNN_DEVICE void multiply(const TileRows& rows, int active) {
    if (share_.begin < share_.end)
      Math::template multiply<kTiles>(thread_, rows, active < kRowTile ? active : kRowTile, packed_,
                                      share_, partial_ + warp_ * kPartial);
    thread_.sync();
  }
  FASTRNN_DEVICE float at(int row, int column) const {
    const float* first = partial_ + partial_at(kTiles, row, column);
    float sum = 0;
    FASTRNN_UNROLL
    for (int warp = 0; warp < kWalkWarps; ++warp) sum += first[warp * kPartial];
    return sum;
  }

 private:
  static constexpr int kPartial = kRowTile * kTiles * kColumnTile;  // sums of a warp

  Thread& thread_;
  const Exchange& exchange_;
  Quad* packed_;    // [groups, kTiles, 32]
  float* partial_;  // [warps, kPartial]
  int warp_;
  WarpShare share_;
  int first_producer_, last_producer_;
};

// Gates' rows of a block's units: column gate * kUnits + u; k: a column of w_hh.
template <class S, int kUnits>
struct GateRows {
  const S* w;
  std::int64_t stride, hidden, columns, first_unit;

  FASTRNN_HD float operator()(int column, std::int64_t k) const {
    const std::int64_t unit = first_unit + column % kUnits;
    if (unit >= hidden || k >= columns) return 0;
    return widen(w[(column / kUnits * hidden + unit) * stride + k]);
  }
};
// Columns of w_hh; k = unit * kGates + gate: a row of it.
template <class S, int kGates>
struct GateColumns {
  const S* w;
  std::int64_t stride, hidden, columns, first_column;

  FASTRNN_HD float operator()(int column, std::int64_t k) const {
    const std::int64_t at = first_column + column, unit = k / kGates;
    if (at >= columns || unit >= hidden) return 0;
    return widen(w[(k % kGates * hidden + unit) * stride + at]);
  }
};

template <class S>
struct ForwardSide : WalkSide {
  const S* w_hh;  // [G*H, H]
  std::int64_t w_hh_stride;
  const S* b_ih;  // [G*H] or null
  const S* b_hh;  // [G*H] or null
  const S* h0;
  const S* c0;
  S* y;
  std::int64_t y_stride;
  S* h_n;
  S* c_n;
  float* saved;
  float* c;                // [B, H]
  const float* gates_x;    // [rows of the chunk, G*H]
  std::int64_t first_row;  // of the chunk
};

// Steps begin ... end - 1 in walking order.
template <class Cell, class S, class Math, int kUnits>
struct ForwardWalk {
  WalkShape shape;
  std::int64_t begin, end;
  ForwardSide<S> side[2];

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kTiles = Cell::kGates * kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const ForwardSide<S>& on = side[place.side];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit;
    BlockProduct<Math, S, kUnits, kTiles, 1, Thread> product(
        thread, on.exchange, thread.shared(),
        GateRows<S, kUnits>{on.w_hh, on.w_hh_stride, hidden, hidden,
                            std::int64_t(place.unit_block) * kUnits});
    thread.sync();

    ForwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.b_ih = on.b_ih;
    body.b_hh = on.b_hh;
    body.h_before_stride = body.h_stride = on.y_stride;
    body.h0 = on.h0;
    body.c0 = on.c0;
    body.c = on.c;
    body.h_n = on.h_n;
    body.c_n = on.c_n;
    typename ForwardStep<Cell, S>::Biases biases{};
    if (unit < hidden) biases = body.biases(unit);

    SegmentedSequence sequence(on.segments, on.reverse);
    for (std::int64_t k = begin; k < end; ++k) {
      const StepRowsOf<int> at = sequence.at(on.reverse ? shape.steps - 1 - k : k);
      body.at = at;
      body.gates_x = on.gates_x + (at.first - on.first_row) * Cell::kGates * hidden;
      body.h_before = on.y + at.first_before * on.y_stride;
      body.h = on.y + at.first * on.y_stride;
      if (on.saved != nullptr) body.saved = on.saved + at.first * Cell::kSaved * hidden;

      for (int tile = place.row_group; tile * kRowTile < at.rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_mine = mine.exists && b < at.rows && unit < hidden;
        typename ForwardStep<Cell, S>::Inputs inputs;
        if (is_mine) inputs = body.load(b, unit);

        if (at.first_starting > first) product.wait(tile, k);
        product.multiply(TileRows{on.exchange.slot(k - 1), on.exchange.initial(), first,
                                  at.first_starting, on.exchange.row_bytes()},
                         at.rows - first);

        typename ForwardStep<Cell, S>::Outputs outputs;
        if (is_mine) {
          float gates_h[Cell::kGates];
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            gates_h[gate] = product.at(mine.row, gate * kUnits + mine.column);
          outputs = body.compute(inputs, biases, gates_h, 1);
          on.exchange.template row<S>(k, b)[unit] = Math::operand(outputs.next_state[0]);
        }
        on.exchange.arrive(thread, tile, place.unit_block, k + 1);
        if (is_mine) body.store(outputs, b, unit);  // what no other block waits for
      }
    }
  }
};

template <class S>
struct BackwardSide : WalkSide {
  const S* w_hh;  // [G*H, H]
  std::int64_t w_hh_stride;
  const S* h0;
  const S* c0;
  const S* y;
  std::int64_t y_stride;
  const float* saved;
  const S* d_y;
  std::int64_t d_y_stride;
  const S* d_h_n;
  const S* d_c_n;
  S* d_pre;
  S* d_h0;
  S* d_c0;
  float* d_h;  // [B, H] what reaches h around the product (only cells with such a way)
  float* d_c;  // [B, H]
};

// All steps, and one more for the gradients at the initial states.
template <class Cell, class S, class Math, int kUnits>
struct BackwardWalk {
  WalkShape shape;
  BackwardSide<S> side[2];

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kTiles = kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const BackwardSide<S>& on = side[place.side];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit;
    BlockProduct<Math, S, kUnits, kTiles, Cell::kGates, Thread> product(
        thread, on.exchange, thread.shared(),
        GateColumns<S, Cell::kGates>{on.w_hh, on.w_hh_stride, hidden, hidden,
                                     std::int64_t(place.unit_block) * kUnits});
    thread.sync();

    BackwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.d_h = on.d_h;
    body.d_h_n = on.d_h_n;
    body.d_y_stride = on.d_y_stride;
    body.d_c = on.d_c;
    body.d_c_n = on.d_c_n;
    body.h_stride = on.y_stride;
    body.h0 = on.h0;
    body.c0 = on.c0;

    SegmentedSequence sequence(on.segments, on.reverse);
    int rows_after = 0;  // of the step that was walked last
    for (std::int64_t k = 0; k <= shape.steps; ++k) {
      StepRowsOf<int> at{};  // the last time round none is left
      if (k < shape.steps) {
        at = sequence.at(on.reverse ? k : shape.steps - 1 - k);
        body.at = at;
        body.h = on.y + at.first * on.y_stride;
        body.h_before = on.y + at.first_before * on.y_stride;
        if (on.d_y != nullptr) body.d_y = on.d_y + at.first * on.d_y_stride;
        if (on.saved != nullptr) {
          body.saved = on.saved + at.first * Cell::kSaved * hidden;
          body.saved_before = on.saved + at.first_before * Cell::kSaved * hidden;
        }
        body.d_pre = on.d_pre + at.first * Cell::kPre * hidden;
      }

      const int rows = at.rows > rows_after ? at.rows : rows_after;
      for (int tile = place.row_group; tile * kRowTile < rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_mine = mine.exists && b < rows && unit < hidden;
        const bool is_step = is_mine && b < at.rows;  // else the row's walk is over
        typename BackwardStep<Cell, S>::Inputs inputs;
        if (is_step) inputs = body.load(b, unit);
        float d_left = 0;
        if constexpr (Cell::kDirectPath) {
          if (is_mine && b < rows_after) d_left = on.d_h[b * hidden + unit];
        }

        if (rows_after > first) {
          product.wait(tile, k);
          const char* d_gates = on.exchange.slot(k - 1);
          product.multiply(TileRows{d_gates, d_gates, first, rows_after, on.exchange.row_bytes()},
                           rows_after - first);
          if (is_mine && b < rows_after) d_left += product.at(mine.row, mine.column);
        }

        typename BackwardStep<Cell, S>::Outputs outputs;
        if (is_step) {
          outputs = body.compute(inputs, d_left);
          S* to = on.exchange.template row<S>(k, b) + unit * Cell::kGates;
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            to[gate] = Math::operand(outputs.d_pre[gate]);
        }
        on.exchange.arrive(thread, tile, place.unit_block, k + 1);
        if (is_step) {
          body.store(outputs, b, unit);  // what no other block waits for
        } else if (is_mine) {
          on.d_h0[b * hidden + unit] = narrow<S>(d_left);
          if constexpr (Cell::kStates == 2)
            on.d_c0[b * hidden + unit] = narrow<S>(on.d_c[b * hidden + unit]);
        }
      }
      rows_after = at.rows;
    }
  }
};

}  // namespace fastrnn::cuda
