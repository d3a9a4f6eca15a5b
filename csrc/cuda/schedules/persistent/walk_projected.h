// The persistent walks of an LSTM with a projection: two products and two waits a step.
//
//   forward    gates = gates_x + y_before w_hh^T     all blocks     waits for y
//              m = o tanh(c')                        its units   -> exchange of m
//              y = m w_hr^T                          its outputs -> exchange of y, waits for m
//
//   backward   d_h = d_gates_after w_hh + d_y        its outputs -> exchange of d_h, waits for
//   d_gates
//              d_m = d_h w_hr                        its units      waits for d_h
//              d_gates = cell(d_m)                               -> exchange of d_gates
//
// A block owns kUnits hidden units and as many outputs; there are fewer outputs than units, so the
// last blocks own none and pass over that product. Either exchange is written again only by those
// who have waited for all who read it, as in walk.h.
#pragma once

#include "cuda/schedules/persistent/walk.h"

namespace fastrnn::cuda {

// What a direction has for its projection.
template <class S>
struct ProjectionSide {
  const S* w_hr;  // [P, H]
  std::int64_t w_hr_stride;
  Exchange exchange;  // forward m, backward d_h
};

template <class Cell, class S, class Math, int kUnits>
struct ProjectedForwardWalk {
  WalkShape shape;
  std::int64_t begin, end;
  std::int64_t outputs;  // P
  ForwardSide<S> side[2];
  ProjectionSide<S> projection[2];

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kGateTiles = Cell::kGates * kUnits / kColumnTile;
    constexpr int kOutputTiles = kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const ForwardSide<S>& on = side[place.side];
    const ProjectionSide<S>& by = projection[place.side];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit, output = mine.unit;
    const std::int64_t first_unit = std::int64_t(place.unit_block) * kUnits;
    const bool has_outputs = first_unit < outputs;
    BlockProduct<Math, S, kUnits, kGateTiles, 1, Thread> gates(
        thread, on.exchange, thread.shared(),
        GateRows<S, kUnits>{on.w_hh, on.w_hh_stride, hidden, outputs, first_unit});
    BlockProduct<Math, S, kUnits, kOutputTiles, 1, Thread> projected(  // w_hr: as of one gate
        thread, by.exchange, gates.end(),
        GateRows<S, kUnits>{by.w_hr, by.w_hr_stride, outputs, hidden, first_unit});
    thread.sync();

    ForwardStep<Cell, S> body{};  // its h is m, which lives in the exchange alone
    body.hidden = hidden;
    body.b_ih = on.b_ih;
    body.b_hh = on.b_hh;
    body.c0 = on.c0;
    body.c = on.c;
    body.c_n = on.c_n;
    typename ForwardStep<Cell, S>::Biases biases{};
    if (unit < hidden) biases = body.biases(unit);

    SegmentedSequence sequence(on.segments, on.reverse);
    for (std::int64_t k = begin; k < end; ++k) {
      const StepRowsOf<int> at = sequence.at(on.reverse ? shape.steps - 1 - k : k);
      body.at = at;
      body.gates_x = on.gates_x + (at.first - on.first_row) * Cell::kGates * hidden;
      if (on.saved != nullptr) body.saved = on.saved + at.first * Cell::kSaved * hidden;

      for (int tile = place.row_group; tile * kRowTile < at.rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_row = mine.exists && b < at.rows, is_mine = is_row && unit < hidden;
        typename ForwardStep<Cell, S>::Inputs inputs;
        if (is_mine) inputs = body.load(b, unit);

        if (at.first_starting > first) gates.wait(tile, k);
        gates.multiply(TileRows{on.exchange.slot(k - 1), on.exchange.initial(), first,
                                at.first_starting, on.exchange.row_bytes()},
                       at.rows - first);

        if (is_mine) {
          float gates_h[Cell::kGates];
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            gates_h[gate] = gates.at(mine.row, gate * kUnits + mine.column);
          const auto cell = body.compute(inputs, biases, gates_h, 1);
          by.exchange.template row<S>(k, b)[unit] = Math::operand(cell.next_state[0]);
          body.store(cell, b, unit);
        }
        by.exchange.arrive(thread, tile, place.unit_block, k + 1);

        if (!has_outputs) continue;
        projected.wait(tile, k + 1);
        const char* m = by.exchange.slot(k);
        projected.multiply(TileRows{m, m, first, at.rows, by.exchange.row_bytes()},
                           at.rows - first);
        const bool is_output = is_row && output < outputs;
        float y = 0;
        if (is_output) {
          y = projected.at(mine.row, mine.column);
          on.exchange.template row<S>(k, b)[output] = Math::operand(y);
        }
        on.exchange.arrive(thread, tile, place.unit_block, k + 1);
        if (is_output) {
          on.y[(at.first + b) * on.y_stride + output] = narrow<S>(y);
          if (at.ends(b)) on.h_n[b * outputs + output] = narrow<S>(y);
        }
      }
    }
  }
};

template <class Cell, class S, class Math, int kUnits>
struct ProjectedBackwardWalk {
  WalkShape shape;
  std::int64_t outputs;  // P
  BackwardSide<S> side[2];
  ProjectionSide<S> projection[2];
  S* d_h_all[2];  // [N, P]

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kTiles = kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const BackwardSide<S>& on = side[place.side];
    const ProjectionSide<S>& by = projection[place.side];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit, output = mine.unit;
    const std::int64_t first_unit = std::int64_t(place.unit_block) * kUnits;
    const bool has_outputs = first_unit < outputs;
    BlockProduct<Math, S, kUnits, kTiles, Cell::kGates, Thread> recurrent(
        thread, on.exchange, thread.shared(),
        GateColumns<S, Cell::kGates>{on.w_hh, on.w_hh_stride, hidden, outputs, first_unit});
    BlockProduct<Math, S, kUnits, kTiles, 1, Thread> projected(
        thread, by.exchange, recurrent.end(),
        GateColumns<S, 1>{by.w_hr, by.w_hr_stride, outputs, hidden, first_unit});
    thread.sync();

    BackwardStep<Cell, S> body{};  // without d_y and d_h_n: they are part of d_h
    body.hidden = hidden;
    body.d_c = on.d_c;
    body.d_c_n = on.d_c_n;
    body.c0 = on.c0;

    SegmentedSequence sequence(on.segments, on.reverse);
    int rows_after = 0;  // of the step that was walked last
    for (std::int64_t k = 0; k <= shape.steps; ++k) {
      StepRowsOf<int> at{};  // the last time round none is left
      if (k < shape.steps) {
        at = sequence.at(on.reverse ? k : shape.steps - 1 - k);
        body.at = at;
        if (on.saved != nullptr) {
          body.saved = on.saved + at.first * Cell::kSaved * hidden;
          body.saved_before = on.saved + at.first_before * Cell::kSaved * hidden;
        }
        body.d_pre = on.d_pre + at.first * Cell::kPre * hidden;
      }

      const int rows = at.rows > rows_after ? at.rows : rows_after;
      for (int tile = place.row_group; tile * kRowTile < rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_row = mine.exists && b < rows;
        const bool is_mine = is_row && unit < hidden, is_step = is_mine && b < at.rows;
        typename BackwardStep<Cell, S>::Inputs inputs;
        if (is_step) inputs = body.load(b, unit);

        if (has_outputs) {
          const bool is_output = is_row && output < outputs;
          float d_h = 0;
          if (is_output && b < at.rows) {
            if (at.ends(b) && on.d_h_n != nullptr) d_h = widen(on.d_h_n[b * outputs + output]);
            if (on.d_y != nullptr) d_h += widen(on.d_y[(at.first + b) * on.d_y_stride + output]);
          }
          if (rows_after > first) {
            recurrent.wait(tile, k);
            const char* d_gates = on.exchange.slot(k - 1);
            recurrent.multiply(
                TileRows{d_gates, d_gates, first, rows_after, on.exchange.row_bytes()},
                rows_after - first);
            if (is_output && b < rows_after) d_h += recurrent.at(mine.row, mine.column);
          }
          if (is_output && b < at.rows)
            by.exchange.template row<S>(k, b)[output] = Math::operand(d_h);
          by.exchange.arrive(thread, tile, place.unit_block, k + 1);
          if (is_output) {
            S* to = b < at.rows ? d_h_all[place.side] + (at.first + b) * outputs
                                : on.d_h0 + b * outputs;
            to[output] = narrow<S>(d_h);
          }
        }

        if (at.rows > first) {
          projected.wait(tile, k + 1);
          const char* d_h = by.exchange.slot(k);
          projected.multiply(TileRows{d_h, d_h, first, at.rows, by.exchange.row_bytes()},
                             at.rows - first);
        }
        typename BackwardStep<Cell, S>::Outputs cell;
        if (is_step) {
          cell = body.compute(inputs, projected.at(mine.row, mine.column));
          S* to = on.exchange.template row<S>(k, b) + unit * Cell::kGates;
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            to[gate] = Math::operand(cell.d_pre[gate]);
        }
        on.exchange.arrive(thread, tile, place.unit_block, k + 1);
        if (is_step)
          body.store(cell, b, unit);
        else if (is_mine)
          on.d_c0[b * hidden + unit] = narrow<S>(on.d_c[b * hidden + unit]);
      }
      rows_after = at.rows;
    }
  }
};

}  // namespace fastrnn::cuda
