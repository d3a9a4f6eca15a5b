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

#include "cuda/schedules/persistent/resets.h"
#include "cuda/schedules/persistent/walk.h"

namespace fastrnn::cuda {

template <class S>
struct ForwardArguments : DirectionArguments<S> {
  const S* b_ih;    // [G*H] or null
  const S* b_hh;    // [G*H] or null
  const S* w_unit;  // [E*H] or null
  S* y;             // [N, R], y_stride apart
  S* h_n;           // [B, R]
  S* c_n;           // [B, C*H] or null
  float* saved;
  float* c;                // [B, C*H]
  const float* gates_x;    // [rows of the chunk, G*H]
  std::int64_t first_row;  // of the chunk
};

// The second stage of a step.
template <class S, class Math, int kUnits, bool kResets, class Thread>
class ForwardProjection {
 public:
  FASTRNN_DEVICE ForwardProjection(Thread& thread, const WalkShape& shape,
                                   const ForwardArguments<S>& args, const BlockPlace& place,
                                   char* shared)
      : thread_(thread),
        args_(args),
        place_(place),
        outputs_(shape.outputs),
        has_outputs_(place.first_unit(kUnits) < shape.outputs),
        product_(thread, args.projection_exchange, shared,  // w_hr: as of one gate
                 GateRows<S, kUnits>{args.w_hr, args.w_hr_stride, shape.outputs, shape.hidden,
                                     place.first_unit(kUnits)}) {}

  FASTRNN_DEVICE void run(const TileElement<kUnits, Thread>& mine, const StepRowsOf<int>& at,
                          int tile, std::int64_t k, const ResetsOfStep<S>& next) {
    if (!has_outputs_) return;
    const int first = tile * kRowTile, b = first + mine.row;
    PassedState<S, kResets> passed;
    if constexpr (kResets) {
      if (mine.exists && b < at.rows && mine.unit < outputs_)
        passed.load(next, b, outputs_, mine.unit);
    }
    product_.wait(tile, k + 1);
    const char* h = args_.projection_exchange.slot(k);
    product_.multiply(TileRows{h, h, first, at.rows, args_.projection_exchange.row_bytes()},
                      at.rows - first);
    const bool is_output = mine.exists && b < at.rows && mine.unit < outputs_;
    float y = 0;
    if (is_output) {
      y = product_.at(mine.row, mine.column);
      args_.exchange.template row<S>(k, b)[mine.unit] = Math::operand(passed.of(y));
    }
    args_.exchange.arrive(thread_, tile, place_.unit_block, k + 1);
    if (is_output) {
      args_.y[(at.first + b) * args_.y_stride + mine.unit] = narrow<S>(y);
      if (at.ends(b)) args_.h_n[b * outputs_ + mine.unit] = narrow<S>(y);
    }
  }

 private:
  Thread& thread_;
  const ForwardArguments<S>& args_;
  const BlockPlace& place_;
  std::int64_t outputs_;
  bool has_outputs_;
  BlockProduct<Math, S, kUnits, kUnits / kColumnTile, 1, Thread> product_;
};

// Steps begin ... end - 1 in walking order.
template <class Cell, class S, class Math, int kUnits, bool kProjected, bool kResets>
struct ForwardLoop {
  WalkShape shape;
  std::int64_t begin, end;
  ForwardArguments<S> arguments[2];
  WalkResetsOf<S, kResets> resets[2];

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kTiles = Cell::kGates * kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const ForwardArguments<S>& args = arguments[place.direction];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit;
    BlockProduct<Math, S, kUnits, kTiles, 1, Thread> gates(
        thread, args.exchange, thread.shared(),
        GateRows<S, kUnits>{args.w_hh, args.w_hh_stride, hidden,
                            kProjected ? shape.outputs : hidden, place.first_unit(kUnits)});
    using Projection =
        std::conditional_t<kProjected, ForwardProjection<S, Math, kUnits, kResets, Thread>,
                           NoProjection>;
    Projection projection(thread, shape, args, place, gates.end());
    thread.sync();
    // for the product that reads h' next
    const Exchange& exchange = kProjected ? args.projection_exchange : args.exchange;

    using Step = ForwardStepOf<Cell, S, kResets>;
    Step body{};  // with a projection its h is in the exchange only
    body.hidden = hidden;
    body.b_ih = args.b_ih;
    body.b_hh = args.b_hh;
    body.w_unit = args.w_unit;
    body.c0 = args.c0;
    body.c = args.c;
    body.c_n = args.c_n;
    if constexpr (!kProjected) {
      body.h_before_stride = body.h_stride = args.y_stride;
      body.h0 = args.h0;
      body.h_n = args.h_n;
    }
    typename Step::Constants constants{};
    if (unit < hidden) constants = body.constants(unit);

    SegmentedSequence sequence(args.segments, args.reverse);
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t t = args.reverse ? shape.steps - 1 - k : k;
      const StepRowsOf<int> at = sequence.at(t);
      body.at = at;
      ResetsOfStep<S> next;
      if constexpr (kResets) {
        body.resets = resets[place.direction].at(t, at.rows);
        if (k + 1 < shape.steps)
          next = resets[place.direction].at(args.reverse ? t - 1 : t + 1, at.rows);
      }
      body.gates_x = args.gates_x + (at.first - args.first_row) * Cell::kGates * hidden;
      if constexpr (!kProjected) {
        body.h_before = args.y + at.first_before * args.y_stride;
        body.h = args.y + at.first * args.y_stride;
      }
      if (args.saved != nullptr) body.saved = args.saved + at.first * Cell::kSaved * hidden;

      for (int tile = place.row_group; tile * kRowTile < at.rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_mine = mine.exists && b < at.rows && unit < hidden;
        typename Step::Inputs inputs;
        PassedState<S, kResets && !kProjected> passed;
        if (is_mine) {
          inputs = body.load(b, unit);
          if constexpr (kResets && !kProjected) passed.load(next, b, hidden, unit);
        }

        if (at.first_starting > first) gates.wait(tile, k);
        gates.multiply(TileRows{args.exchange.slot(k - 1), args.exchange.initial(), first,
                                at.first_starting, args.exchange.row_bytes()},
                       at.rows - first);

        typename Step::Outputs outputs;
        if (is_mine) {
          float gates_h[Cell::kGates];
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            gates_h[gate] = gates.at(mine.row, gate * kUnits + mine.column);
          outputs = body.compute(inputs, constants, gates_h, 1);
          exchange.template row<S>(k, b)[unit] = Math::operand(passed.of(outputs.next_state[0]));
          if constexpr (kProjected) body.store(outputs, b, unit);  // later takes more registers
        }
        exchange.arrive(thread, tile, place.unit_block, k + 1);
        if constexpr (kProjected)
          projection.run(mine, at, tile, k, next);
        else if (is_mine)
          body.store(outputs, b, unit);  // no other block waits for this
      }
    }
  }
};

template <class Cell, class S, class Math, int kUnits>
struct ForwardWalk : ForwardLoop<Cell, S, Math, kUnits, false, false> {};
template <class Cell, class S, class Math, int kUnits>
struct ProjectedForwardWalk : ForwardLoop<Cell, S, Math, kUnits, true, false> {};
template <class Cell, class S, class Math, int kUnits>
struct ResetForwardWalk : ForwardLoop<Cell, S, Math, kUnits, false, true> {};
template <class Cell, class S, class Math, int kUnits>
struct ProjectedResetForwardWalk : ForwardLoop<Cell, S, Math, kUnits, true, true> {};

}  // namespace fastrnn::cuda
