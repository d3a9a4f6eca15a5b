// The persistent schedule's backward pass. The exchange holds the gradients of the gates,
// [unit][gate], and k of the recurrent product runs over all gates.
//
//   stage       computes                                  owned by      waits for
//   outputs     d_h = d_gates_after w_hh + d_y            output        d_gates_after
//                                                         blocks
//   projection  d_h' = d_h w_hr                           unit blocks   d_h
//   cell        d_gates = cell(d_h')                      unit blocks
//
// Without a projection d_h is d_h', both are owned by the unit blocks, and there is one product.
#pragma once

#include <type_traits>

#include "cuda/schedules/persistent/resets.h"
#include "cuda/schedules/persistent/walk.h"

namespace fastrnn::cuda {

template <class S>
struct BackwardArguments : DirectionArguments<S> {
  const S* y;  // [N, R], y_stride apart
  const float* saved;
  const S* d_y;
  std::int64_t d_y_stride;
  const S* d_h_n;
  const S* d_c_n;
  const S* d_c_steps;
  S* d_pre;
  S* d_h_all;  // [N, P] (only with a projection)
  S* d_h0;
  S* d_c0;
  const S* w_unit;  // [E*H] or null
  float* d_h;       // [B, H] what reaches h around the product (only cells with such a way)
  float* d_c;       // [B, C*H]
};

// The stages of a step between the recurrent product and the cell.
template <class S, class Math, int kUnits, class Thread>
class BackwardProjection {
 public:
  FASTRNN_DEVICE BackwardProjection(Thread& thread, const WalkShape& shape,
                                    const BackwardArguments<S>& args, const BlockPlace& place,
                                    char* shared)
      : thread_(thread),
        args_(args),
        place_(place),
        outputs_(shape.outputs),
        product_(thread, args.projection_exchange, shared,
                 GateColumns<S, 1>{args.w_hr, args.w_hr_stride, shape.outputs, shape.hidden,
                                   place.first_unit(kUnits)}) {}

  // The part of d_h that no other block writes.
  FASTRNN_DEVICE float load(const StepRowsOf<int>& at, int b, std::int64_t output) const {
    float d_h = 0;
    if (at.ends(b) && args_.d_h_n != nullptr) d_h = widen(args_.d_h_n[b * outputs_ + output]);
    if (args_.d_y != nullptr) d_h += widen(args_.d_y[(at.first + b) * args_.d_y_stride + output]);
    return d_h;
  }

  // Passes d_h on to the other blocks; beyond the first step it is d_h0.
  FASTRNN_DEVICE void publish(float d_h, bool is_output, const StepRowsOf<int>& at, int tile, int b,
                              std::int64_t output, std::int64_t k) const {
    if (is_output && b < at.rows)
      args_.projection_exchange.template row<S>(k, b)[output] = Math::operand(d_h);
    args_.projection_exchange.arrive(thread_, tile, place_.unit_block, k + 1);
    if (is_output) {
      S* to = b < at.rows ? args_.d_h_all + (at.first + b) * outputs_ : args_.d_h0 + b * outputs_;
      to[output] = narrow<S>(d_h);
    }
  }

  FASTRNN_DEVICE void multiply(const StepRowsOf<int>& at, int tile, std::int64_t k) {
    const int first = tile * kRowTile;
    product_.wait(tile, k + 1);
    const char* d_h = args_.projection_exchange.slot(k);
    product_.multiply(TileRows{d_h, d_h, first, at.rows, args_.projection_exchange.row_bytes()},
                      at.rows - first);
  }
  FASTRNN_DEVICE float at(int row, int column) const { return product_.at(row, column); }

 private:
  Thread& thread_;
  const BackwardArguments<S>& args_;
  const BlockPlace& place_;
  std::int64_t outputs_;
  BlockProduct<Math, S, kUnits, kUnits / kColumnTile, 1, Thread> product_;
};

// All steps, and one more for the gradients at the initial states.
template <class Cell, class S, class Math, int kUnits, bool kProjected, bool kResets>
struct BackwardLoop {
  WalkShape shape;
  BackwardArguments<S> arguments[2];
  WalkResetsOf<S, kResets> resets[2];

  template <class Thread>
  FASTRNN_DEVICE void operator()(Thread& thread) const {
    constexpr int kTiles = kUnits / kColumnTile;
    const BlockPlace place(shape, thread.block());
    const BackwardArguments<S>& args = arguments[place.direction];
    const TileElement<kUnits, Thread> mine(thread, place.unit_block);
    const std::int64_t hidden = shape.hidden, unit = mine.unit;
    const std::int64_t outputs = kProjected ? shape.outputs : hidden;
    const bool has_outputs = !kProjected || place.first_unit(kUnits) < outputs;
    BlockProduct<Math, S, kUnits, kTiles, Cell::kGates, Thread> recurrent(
        thread, args.exchange, thread.shared(),
        GateColumns<S, Cell::kGates>{args.w_hh, args.w_hh_stride, hidden, outputs,
                                     place.first_unit(kUnits)});
    using Projection =
        std::conditional_t<kProjected, BackwardProjection<S, Math, kUnits, Thread>, NoProjection>;
    Projection projection(thread, shape, args, place, recurrent.end());
    thread.sync();

    using Step = BackwardStepOf<Cell, S, kResets>;
    Step body{};  // with a projection d_y and d_h_n are part of d_h
    body.hidden = hidden;
    body.d_c = args.d_c;
    body.d_c_n = args.d_c_n;
    body.c0 = args.c0;
    body.w_unit = args.w_unit;
    if constexpr (!kProjected) {
      body.d_h = args.d_h;
      body.d_h_n = args.d_h_n;
      body.d_y_stride = args.d_y_stride;
      body.h_stride = body.h_before_stride = args.y_stride;
      body.h0 = args.h0;
    }

    SegmentedSequence sequence(args.segments, args.reverse);
    int rows_after = 0;  // of the step that was walked last
    for (std::int64_t k = 0; k <= shape.steps; ++k) {
      StepRowsOf<int> at{};  // no rows in the last round
      ResetsOfStep<S> after;
      if constexpr (kResets) after = body.resets;
      if (k < shape.steps) {
        const std::int64_t t = args.reverse ? k : shape.steps - 1 - k;
        at = sequence.at(t);
        body.at = at;
        if constexpr (kResets) body.resets = resets[place.direction].at(t, at.rows);
        if constexpr (!kProjected) {
          body.h = args.y + at.first * args.y_stride;
          body.h_before = args.y + at.first_before * args.y_stride;
          if (args.d_y != nullptr) body.d_y = args.d_y + at.first * args.d_y_stride;
        }
        if (args.saved != nullptr) {
          body.saved = args.saved + at.first * Cell::kSaved * hidden;
          body.saved_before = args.saved + at.first_before * Cell::kSaved * hidden;
        }
        if constexpr (!kProjected) {  // plan.h rejects them with a projection
          if (args.d_c_steps != nullptr)
            body.d_c_steps = args.d_c_steps + at.first * cells::kCellStates<Cell> * hidden;
        }
        body.d_pre = args.d_pre + at.first * cells::kGradientColumns<Cell> * hidden;
      }

      const int rows = at.rows > rows_after ? at.rows : rows_after;
      for (int tile = place.row_group; tile * kRowTile < rows; tile += shape.row_groups) {
        const int first = tile * kRowTile, b = first + mine.row;
        const bool is_row = mine.exists && b < rows;
        const bool is_mine = is_row && unit < hidden, is_output = is_row && unit < outputs;
        const bool is_step = is_mine && b < at.rows;  // else the row has no more steps
        typename Step::Inputs inputs;
        if (is_step) inputs = body.load(b, unit);
        bool is_reset_after = false;
        if constexpr (kResets) {
          if (is_output && b < rows_after) is_reset_after = after.mask[b] != 0;
        }

        float d_h = 0;
        if (has_outputs) {
          if constexpr (kProjected) {
            if (is_output && b < at.rows) d_h = projection.load(at, b, unit);
          } else if constexpr (Cell::kDirectPath) {
            if (is_output && b < rows_after) d_h = args.d_h[b * hidden + unit];
          }
          if (rows_after > first) {
            recurrent.wait(tile, k);
            const char* d_gates = args.exchange.slot(k - 1);
            recurrent.multiply(
                TileRows{d_gates, d_gates, first, rows_after, args.exchange.row_bytes()},
                rows_after - first);
            if constexpr (kResets) {
              if (is_output && b < rows_after)
                d_h += resets[place.direction].pass_h(is_reset_after,
                                                      recurrent.at(mine.row, mine.column),
                                                      after.step, b * outputs + unit);
            } else {
              if (is_output && b < rows_after) d_h += recurrent.at(mine.row, mine.column);
            }
          }
          if constexpr (kProjected) projection.publish(d_h, is_output, at, tile, b, unit, k);
        }
        if constexpr (kProjected) {
          if (at.rows > first) projection.multiply(at, tile, k);
        }

        typename Step::Outputs gradients;
        if (is_step) {
          if constexpr (kProjected) d_h = projection.at(mine.row, mine.column);
          gradients = body.compute(inputs, d_h);
          S* to = args.exchange.template row<S>(k, b) + unit * Cell::kGates;
          FASTRNN_UNROLL
          for (int gate = 0; gate < Cell::kGates; ++gate)
            to[gate] = Math::operand(gradients.d_pre[gate]);
        }
        args.exchange.arrive(thread, tile, place.unit_block, k + 1);
        if (is_step) {  // no other block waits for this
          if constexpr (kResets)
            resets[place.direction].template pass_states<Cell>(inputs.is_reset, gradients.d_state,
                                                               body.resets.step, b, unit, hidden);
          body.store(gradients, b, unit);
        } else if (is_mine) {
          if constexpr (!kProjected) args.d_h0[b * hidden + unit] = narrow<S>(d_h);
          for (int s = 0; s < cells::kCellStates<Cell>; ++s) {
            const std::int64_t i = (b * cells::kCellStates<Cell> + s) * hidden + unit;
            args.d_c0[i] = narrow<S>(args.d_c[i]);
          }
        }
      }
      rows_after = at.rows;
    }
  }
};

template <class Cell, class S, class Math, int kUnits>
struct BackwardWalk : BackwardLoop<Cell, S, Math, kUnits, false, false> {};
template <class Cell, class S, class Math, int kUnits>
struct ProjectedBackwardWalk : BackwardLoop<Cell, S, Math, kUnits, true, false> {};
template <class Cell, class S, class Math, int kUnits>
struct ResetBackwardWalk : BackwardLoop<Cell, S, Math, kUnits, false, true> {};
template <class Cell, class S, class Math, int kUnits>
struct ProjectedResetBackwardWalk : BackwardLoop<Cell, S, Math, kUnits, true, true> {};

}  // namespace fastrnn::cuda
