// The persistent schedule's forward pass.
//
//   stage       computes                                  owned by      waits for
//   gates       h' = cell(gates_x + h w_hh^T)             unit blocks   h, the exchange of outputs
//   projection  y = h' w_hr^T                             output        h', the exchange of h'
//                                                         blocks
//
// Without a projection h' is the output and there is one stage.
#pragma once

#include <type_traits>

#include "cuda/schedules/persistent/walk.h"
#include "cuda/schedules/step.h"

namespace fastrnn::cuda {

template <class S>
struct ForwardSide : WalkSide<S> {
  const S* b_ih;  // [G*H] or null
  const S* b_hh;  // [G*H] or null
  S* y;           // [N, R], y_stride apart
  S* h_n;         // [B, R]
  S* c_n;         // [B, H] or null
  float* saved;
  float* c;                // [B, H]
  const float* gates_x;    // [rows of the chunk, G*H]
  std::int64_t first_row;  // of the chunk
};

// The second stage of a step.
template <class S, class Math, int kUnits, class Thread>
class ForwardProjection {
 public:
  FASTRNN_DEVICE ForwardProjection(Thread& thread, const WalkShape& shape, const ForwardSide<S>& on,
                                   const BlockPlace& place, char* shared)
      : thread_(thread),
        on_(on),
        place_(place),
        outputs_(shape.outputs),
        has_outputs_(place.first_unit(kUnits) < shape.outputs),
        product_(thread, on.projection_exchange, shared,  // w_hr: as of one gate
                 GateRows<S, kUnits>{on.w_hr, on.w_hr_stride, shape.outputs, shape.hidden,
                                     place.first_unit(kUnits)}) {}

  FASTRNN_DEVICE void run(const TileElement<kUnits, Thread>& mine, const StepRowsOf<int>& at,
                          int tile, std::int64_t k) {
    if (!has_outputs_) return;
    const int first = tile * kRowTile, b = first + mine.row;
    product_.wait(tile, k + 1);
    const char* h = on_.projection_exchange.slot(k);
    product_.multiply(TileRows{h, h, first, at.rows, on_.projection_exchange.row_bytes()},
                      at.rows - first);
    const bool is_output = mine.exists && b < at.rows && mine.unit < outputs_;
    float y = 0;
    if (is_output) {
      y = product_.at(mine.row, mine.column);
      on_.exchange.template row<S>(k, b)[mine.unit] = Math::operand(y);
    }
    on_.exchange.arrive(thread_, tile, place_.unit_block, k + 1);
    if (is_output) {
      on_.y[(at.first + b) * on_.y_stride + mine.unit] = narrow<S>(y);
      if (at.ends(b)) on_.h_n[b * outputs_ + mine.unit] = narrow<S>(y);
    }
  }

 private:
  Thread& thread_;
  const ForwardSide<S>& on_;
  const BlockPlace& place_;
  std::int64_t outputs_;
  bool has_outputs_;
  BlockProduct<Math, S, kUnits, kUnits / kColumnTile, 1, Thread> product_;
};

// Steps begin ... end - 1 in walking order.
template <class Cell, class S, class Math, int kUnits, bool kProjected>
struct ForwardLoop {
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
    BlockProduct<Math, S, kUnits, kTiles, 1, Thread> gates(
        thread, on.exchange, thread.shared(),
        GateRows<S, kUnits>{on.w_hh, on.w_hh_stride, hidden, kProjected ? shape.outputs : hidden,
                            place.first_unit(kUnits)});
    using Projection =
        std::conditional_t<kProjected, ForwardProjection<S, Math, kUnits, Thread>, NoProjection>;
    Projection projection(thread, shape, on, place, gates.end());
    thread.sync();
    // for the product that reads h' next
    const Exchange& exchange = kProjected ? on.projection_exchange : on.exchange;

    ForwardStep<Cell, S> body{};  // with a projection its h is in the exchange only
    body.hidden = hidden;
    body.b_ih = on.b_ih;
    body.b_hh = on.b_hh;
    body.c0 = on.c0;
    body.c = on.c;
    body.c_n = on.c_n;
    if constexpr (!kProjected) {
      body.h_before_stride = body.h_stride = on.y_stride;
      body.h0 = on.h0;
      body.h_n = on.h_n;
    }
    typename ForwardStep<Cell, S>::Biases biases{};
    if (unit < hidden) biases = body.biases(unit);

    SegmentedSequence sequence(on.segments, on.reverse);
    for (std::int64_t k = begin; k < end; ++k) {
      const StepRowsOf<int> at = sequence.at(on.reverse ? shape.steps - 1 - k : k);
      body.at = at;
      body.gates_x = on.gates_x + (at.first - on.first_row) * Cell::kGates * hidden;
      if constexpr (!kProjected) {
        body.h_before = on.y + at.first_before * on.y_stride;
        body.h = on.y + at.first * on.y_stride;
      }
      if (on.saved != nullptr) body.saved = on.saved + at.first * Cell::kSaved * hidden;

      for (int tile = place.row_group; tile * kRowTile < at.rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_mine = mine.exists && b < at.rows && unit < hidden;
        typename ForwardStep<Cell, S>::Inputs inputs;
        if (is_mine) inputs = body.load(b, unit);

        if (at.first_starting > first) gates.wait(tile, k);
        gates.multiply(TileRows{on.exchange.slot(k - 1), on.exchange.initial(), first,
                                at.first_starting, on.exchange.row_bytes()},
                       at.rows - first);

        typename ForwardStep<Cell, S>::Outputs outputs;
        if (is_mine) {
          float gates_h[Cell::kGates];
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            gates_h[gate] = gates.at(mine.row, gate * kUnits + mine.column);
          outputs = body.compute(inputs, biases, gates_h, 1);
          exchange.template row<S>(k, b)[unit] = Math::operand(outputs.next_state[0]);
          if constexpr (kProjected) body.store(outputs, b, unit);  // later takes more registers
        }
        exchange.arrive(thread, tile, place.unit_block, k + 1);
        if constexpr (kProjected)
          projection.run(mine, at, tile, k);
        else if (is_mine)
          body.store(outputs, b, unit);  // no other block waits for this
      }
    }
  }
};

template <class Cell, class S, class Math, int kUnits>
struct ForwardWalk : ForwardLoop<Cell, S, Math, kUnits, false> {};
template <class Cell, class S, class Math, int kUnits>
struct ProjectedForwardWalk : ForwardLoop<Cell, S, Math, kUnits, true> {};

}  // namespace fastrnn::cuda
