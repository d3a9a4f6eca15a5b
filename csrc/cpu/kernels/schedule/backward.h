// BackwardWalk: one pass of the backward time loop by one rank, from the last step to the first,
//
//   dh_t    = carry + d_y_t                       (with a projection: dm_t = dh_t w_hr)
//   d_pre_t = the cell's backward step            for this rank's own units        -> barrier
//   carry   = direct part + d_pre_t[hidden side] w_hh   for this rank's own units of h
//
// The carry of a row is d_h_n at the step where the row ends, and d_h0 after the step where it
// starts (csrc/problem/sequence.h). The gradient of the cell states is d_c_n at the step where the
// row ends, plus d_c_steps of every step. After a step whose state was replaced, the carry and the
// gradient of the cell states are those of the new state, and zero before. The gradients of the
// weights and of x are products over all steps, computed after this loop (gradients.h).
#pragma once

#include "cpu/kernels/product/weight_matrix.h"
#include "cpu/kernels/schedule/step_resets.h"
#include "cpu/kernels/vector/storage.h"

FASTRNN_KERNELS_BEGIN

// Recurrent: the format of w_hh (weight_matrix.h). If it multiplies another type than T, d_pre of a
// step is rounded to that type for the product.
template <class Cell, class T, class Recurrent = NativeFormat<T>>
class BackwardWalk {
  using Operand = typename Recurrent::Operand;
  static constexpr bool kRounds = !std::is_same_v<Operand, T>;

 public:
  BackwardWalk(const LayerBackward<T, T>& problem, const typename Recurrent::Source* w_hh,
               std::int64_t w_hh_stride, const Plan& plan, const BackwardLayout& layout,
               T* workspace, Team& team, int rank)
      : problem_(problem),
        shape_(problem.shape),
        plan_(plan),
        layout_(layout),
        workspace_(workspace),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        rows_(shape_.sequence, rank / plan.unit_groups, plan.row_groups),
        out_blocks_(layout.out_blocks, rank % plan.unit_groups, plan.unit_groups),
        unit_blocks_(layout.unit_blocks, rank % plan.unit_groups, plan.unit_groups),
        output_size_(shape_.output_size()),
        carry_stride_(layout.out_blocks * layout.out_block),
        columns_(kZero, 1, plan.back_vectors, kLanes),
        w_hh_({w_hh, w_hh_stride, false, 1, output_size_, Cell::kGates * shape_.hidden_size},
              workspace + layout.panels_h, plan.back_vectors, plan.packed),
        w_hr_({problem.weights.w_hr, problem.weights.w_hr_stride, false, 1, shape_.hidden_size,
               output_size_},
              workspace + layout.panels_p, plan.back_vectors, plan.packed) {}

  void run() {
    pack();
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = shape_.sequence.steps - 1; k >= 0; --k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(k + 1);
      const StepRows at = shape_.sequence.at(shape_.sequence.step(k));
      const std::int64_t own = rows_.count(at.rows);
      if constexpr (kRounds) rounded_ = rounded(k % 2);
      resets_ = StepResets<T>(problem_.resets, shape_.sequence, k);
      begin_rows(at, own);
      add_step_gradients(at, own);
      if (shape_.proj_size > 0) {
        store_output_gradients(at, own);
        synchronise();
        through_projection(at, own);
      } else {
        const IndexRange units = own_out();
        for (std::int64_t i = 0; i < own; ++i) {
          const std::int64_t b = rows_.row(i);
          const Row row(*this, at, b);
          for (std::int64_t unit = units.begin; unit < units.end; unit += kLanes)
            pointwise(row, unit, output_gradient(at, b, unit));
        }
      }
      synchronise();
      if constexpr (Cell::kDenseRecurrence) propagate(k, at, own);
      if (resets_.mask != nullptr) finish_resets(shape_.sequence.step(k), own);
      finish_rows(at, own);
    }
    if (shape_.sequence.steps == 0) finish_untouched();
  }

 private:
  using Vec = Pack<T>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kZero[] = {0};
  static constexpr int kCellStates = cells::kCellStates<Cell>;
  static constexpr int kColumns = cells::kGradientColumns<Cell>;  // of d_pre, per unit
  static constexpr std::int64_t kPartDepth = 4 * kTilePiece;      // 256 KB of a panel of float32

  // Multiply-adds of this rank in a step.
  std::int64_t step_work() const {
    return 1 + rows_.count(shape_.sequence.batch) * Cell::kGates * shape_.hidden_size *
                   out_blocks_.size() * layout_.out_block;
  }
  // Arrives as often as in `steps` steps, see Team::gives_up.
  void arrive_for(std::int64_t steps) {
    if (shape_.proj_size > 0) steps *= 2;
    while (steps-- > 0) barrier_.arrive(rank_);
  }

  void synchronise() {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
  }

  // Row groups share the panels of their blocks and the work of packing them.
  void pack() {
    const int row_group = rank_ / plan_.unit_groups;
    if constexpr (Cell::kDenseRecurrence) w_hh_.pack(out_blocks_.cut(row_group, plan_.row_groups));
    if (shape_.proj_size > 0) w_hr_.pack(unit_blocks_.cut(row_group, plan_.row_groups));
  }

  // d_pre [B, G*H] of a step, for the product. Other ranks still read that of the step before.
  Operand* rounded(int parity) const {
    return reinterpret_cast<Operand*>(workspace_ + layout_.rounded) +
           parity * shape_.sequence.batch * Cell::kGates * shape_.hidden_size;
  }

  T* carry(std::int64_t b) const { return workspace_ + layout_.carry + b * carry_stride_; }

  // The hidden units and the units of h that this rank computes.
  IndexRange own_out() const { return out_blocks_.units(layout_.out_block, output_size_); }
  IndexRange own_hidden() const {
    return shape_.proj_size > 0 ? unit_blocks_.units(layout_.unit_block, shape_.hidden_size)
                                : own_out();
  }

  // Rows that end at this step start with the gradients of the final states.
  void begin_rows(const StepRows& at, std::int64_t own) {
    const IndexRange hidden = own_hidden();
    const std::int64_t last = out_blocks_.end * layout_.out_block;
    for (std::int64_t i = rows_.count(at.first_ending); i < own; ++i) {
      const std::int64_t b = rows_.row(i);
      load_state(problem_.d_h_n, b, output_size_, own_out(), carry(b));
      std::fill(carry(b) + own_out().end, carry(b) + last, T(0));  // units that pad the last block
      load_cell_states(b, hidden);
    }
  }
  // d_c += d_c_steps of this step, for the units whose d_c this rank reads next.
  void add_step_gradients(const StepRows& at, std::int64_t own) {
    if (kCellStates == 0 || problem_.d_c_steps == nullptr) return;
    const IndexRange units = own_hidden();
    for (std::int64_t i = 0; i < own; ++i) {
      const std::int64_t b = rows_.row(i);
      for (std::int64_t s = 0; s < kCellStates; ++s) {
        const T* from =
            problem_.d_c_steps + ((at.first + b) * kCellStates + s) * shape_.hidden_size;
        T* to = problem_.d_c0 + (b * kCellStates + s) * shape_.hidden_size;
        for (std::int64_t j = units.begin; j < units.end; ++j) to[j] += from[j];
      }
    }
  }
  // Moves the gradients of the states before step t to those of the states that replaced them.
  void finish_resets(std::int64_t t, std::int64_t own) {
    const Resets<T>& all = problem_.resets;
    T* d_h = problem_.d_reset_h == nullptr ? nullptr : problem_.d_reset_h + t * all.h_stride;
    T* d_c = problem_.d_reset_c == nullptr ? nullptr : problem_.d_reset_c + t * all.c_stride;
    const std::int64_t hidden = shape_.hidden_size;
    for (std::int64_t i = 0; i < own; ++i) {
      const std::int64_t b = rows_.row(i);
      if (!resets_.at(b)) continue;
      move_gradient(carry(b), own_out(), d_h == nullptr ? nullptr : d_h + b * output_size_);
      for (std::int64_t s = b * kCellStates; s < (b + 1) * kCellStates; ++s)
        move_gradient(problem_.d_c0 + s * hidden, own_hidden(),
                      d_c == nullptr ? nullptr : d_c + s * hidden);
    }
  }
  // to += from, unless it is null, and from = 0.
  static void move_gradient(T* from, const IndexRange& units, T* to) {
    for (std::int64_t j = units.begin; j < units.end; ++j) {
      if (to != nullptr) to[j] += from[j];
      from[j] = T(0);
    }
  }
  // For rows that start at this step, the carry is the gradient of the initial state. (d_c is kept
  // in d_c0.)
  void finish_rows(const StepRows& at, std::int64_t own) {
    for (std::int64_t i = rows_.count(at.first_starting); i < own; ++i) {
      const std::int64_t b = rows_.row(i);
      load_state(carry(b), 0, output_size_, own_out(), problem_.d_h0 + b * output_size_);
    }
  }
  // Without steps the initial states are the final ones.
  void finish_untouched() {
    for (std::int64_t i = 0; i < rows_.count(shape_.sequence.batch); ++i) {
      const std::int64_t b = rows_.row(i);
      load_state(problem_.d_h_n, b, output_size_, own_out(), problem_.d_h0 + b * output_size_);
      load_cell_states(b, own_hidden());
    }
  }
  void load_cell_states(std::int64_t b, const IndexRange& units) {
    for (std::int64_t s = b * kCellStates; s < (b + 1) * kCellStates; ++s)
      load_state(problem_.d_c_n, s, shape_.hidden_size, units,
                 problem_.d_c0 + s * shape_.hidden_size);
  }

  // Copies units of row b of from [*, size]; a null `from` means zeros.
  static void load_state(const T* from, std::int64_t b, std::int64_t size, const IndexRange& units,
                         T* to) {
    for (std::int64_t j = units.begin; j < units.end; ++j)
      to[j] = from == nullptr ? T(0) : from[b * size + j];
  }

  // carry + d_y for one vector of units of h, from `unit` on.
  Vec output_gradient(const StepRows& at, std::int64_t b, std::int64_t unit) const {
    Vec d_h = Vec::load(carry(b) + unit);
    if (problem_.d_y != nullptr) {
      d_h = d_h + Vec::load(problem_.d_y + (at.first + b) * problem_.d_y_stride + unit,
                            std::min<std::int64_t>(kLanes, output_size_ - unit));
    }
    return d_h;
  }

  void store_output_gradients(const StepRows& at, std::int64_t own) {
    const IndexRange units = own_out();
    for (std::int64_t i = 0; i < own; ++i) {
      const std::int64_t b = rows_.row(i);
      T* to = problem_.d_h_all + (at.first + b) * output_size_;
      for (std::int64_t unit = units.begin; unit < units.end; unit += kLanes)
        output_gradient(at, b, unit)
            .store(to + unit, std::min<std::int64_t>(kLanes, output_size_ - unit));
    }
  }

  // dm = dh w_hr, then the cell.
  void through_projection(const StepRows& at, std::int64_t own) {
    alignas(64) T scratch[kTileRows * kTileVectors * kLanes];
    for (std::int64_t block = unit_blocks_.begin; block < unit_blocks_.end; ++block) {
      for_each_tile(0, own, w_hr_.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        for (std::int64_t i = 0; i < count * layout_.unit_block; ++i) scratch[i] = T(0);
        w_hr_.multiply(block, count, problem_.d_h_all + (at.first + row) * output_size_,
                       rows_.stride * output_size_, scratch, layout_.unit_block, columns_);
        for (int m = 0; m < count; ++m) {
          const Row pointers(*this, at, row + m * rows_.stride);
          for (int u = 0; u < plan_.back_vectors; ++u) {
            const std::int64_t unit = block * layout_.unit_block + u * kLanes;
            if (unit >= shape_.hidden_size) break;
            pointwise(pointers, unit, Vec::load(scratch + m * layout_.unit_block + u * kLanes));
          }
        }
      });
    }
  }

  // Pointers to the values of sequence b at step t. They are local copies: the compiler must assume
  // that the stores of the pointwise code change any member.
  struct Row {
    std::int64_t hidden;
    const T* saved;     // [S*H] of this step
    const T* y;         // [R]
    const T* h_before;  // [R] the state before the step
    const T* c_before;  // [C*H]
    T* d_c;             // [C*H]
    T* d_pre;           // [(Q+E)*H]
    Operand* rounded;   // [G*H] the hidden side of d_pre
    const T* w_unit;    // [E*H]
    T* d_h;             // [R] the carry, or null with a projection

    Row(const BackwardWalk& walk, const StepRows& at, std::int64_t b)
        : hidden(walk.shape_.hidden_size) {
      const auto& p = walk.problem_;
      const std::int64_t row = at.first + b;
      saved = p.saved + row * Cell::kSaved * hidden;
      y = p.y + row * p.y_stride;
      const StepResets<T>& resets = walk.resets_;
      h_before = resets.at(b) ? resets.h + b * walk.output_size_
                              : at.state_before(b, p.y, p.y_stride, p.h0, walk.output_size_);
      if constexpr (kCellStates > 0) {
        c_before = resets.at(b)
                       ? resets.c + b * kCellStates * hidden
                       : at.state_before(b, p.saved + Cell::kSavedState * hidden,
                                         Cell::kSaved * hidden, p.c0, kCellStates * hidden);
        d_c = p.d_c0 + b * kCellStates * hidden;
      }
      d_pre = p.d_pre + row * kColumns * hidden;
      if constexpr (kRounds) rounded = walk.rounded_ + b * Cell::kGates * hidden;
      if constexpr (Cell::kParameters > 0) w_unit = p.weights.w_unit;
      d_h = walk.shape_.proj_size > 0 ? nullptr : walk.carry(b);
    }
  };

  // The cell's backward step for a vector of hidden units.
  FASTRNN_INLINE void pointwise(const Row& row, std::int64_t unit, Vec d_h) {
    const std::int64_t lanes = std::min<std::int64_t>(kLanes, row.hidden - unit);
    Vec saved[cells::kSavedLength<Cell>], state[Cell::kStates] = {};
    Vec next_state[Cell::kStates] = {}, parameters[cells::kParametersLength<Cell>];
    Vec d_next_state[Cell::kStates], d_pre[kColumns], d_state[Cell::kStates];
    d_next_state[0] = d_h;
    for (int s = 0; s < Cell::kSaved; ++s)
      saved[s] = Vec::load(row.saved + s * row.hidden + unit, lanes);
    if constexpr (Cell::kBackwardReadsNextH) next_state[0] = Vec::load(row.y + unit, lanes);
    if constexpr (Cell::kBackwardReadsH) state[0] = Vec::load(row.h_before + unit, lanes);
    for (int s = 0; s < kCellStates; ++s) {
      state[s + 1] = Vec::load(row.c_before + s * row.hidden + unit, lanes);
      d_next_state[s + 1] = Vec::load(row.d_c + s * row.hidden + unit, lanes);
    }
    for (int k = 0; k < Cell::kParameters; ++k)
      parameters[k] = Vec::load(row.w_unit + k * row.hidden + unit, lanes);
    Cell::backward(
        cells::StepGradientInputs<Vec>{saved, state, next_state, d_next_state, parameters},
        cells::StepGradientOutputs<Vec>{d_pre, d_state, d_pre + Cell::kPre});
    for (int q = 0; q < kColumns; ++q) d_pre[q].store(row.d_pre + q * row.hidden + unit, lanes);
    if constexpr (kRounds)
      for (int q = 0; q < Cell::kGates; ++q)
        store_values(d_pre[q], row.rounded + q * row.hidden + unit, lanes);
    for (int s = 0; s < kCellStates; ++s)
      d_state[s + 1].store(row.d_c + s * row.hidden + unit, lanes);
    if (row.d_h != nullptr) (Cell::kDirectPath ? d_state[0] : Vec(T(0))).store(row.d_h + unit);
  }

  // What the product with w_hh reads: rows of d_pre, `width` apart, or rounded ones.
  const Operand* operand(const StepRows& at, std::int64_t width) const {
    if constexpr (kRounds)
      return rounded_;
    else
      return problem_.d_pre + at.first * width;
  }

  // carry += d_pre[hidden side] w_hh. The columns of the hidden side come first in d_pre (kPreH =
  // 0...). Where the panels come from a slow cache, all rows use a part of a panel that fits in the
  // private cache before the next part, which is loaded meanwhile.
  void propagate(std::int64_t k, const StepRows& at, std::int64_t own) {
    const std::int64_t width = kColumns * shape_.hidden_size, depth = w_hh_.k_count();
    const std::int64_t part = plan_.prefetch ? std::min(kPartDepth, depth) : depth;
    const std::int64_t a_row = kRounds ? depth : width;
    const Operand* d_pre = operand(at, width);
    const std::int64_t a_stride = rows_.stride * a_row, c_stride = rows_.stride * carry_stride_;
    const int height = w_hh_.tile_height();
    const std::int64_t tiles = tile_count(0, own, height);
    for (std::int64_t i = 0; i < out_blocks_.size(); ++i) {
      const std::int64_t block = out_blocks_.zigzag(i, k % 2 != 0);
      const std::int64_t next =
          out_blocks_.zigzag(std::min(i + 1, out_blocks_.size() - 1), k % 2 != 0);
      for (std::int64_t first = 0; first < depth; first += part) {
        const std::int64_t last = std::min(first + part, depth);
        std::int64_t index = 0;
        for_each_tile(0, own, height, [&](std::int64_t first_row, int count) {
          const std::int64_t row = rows_.row(first_row);
          T* c = carry(row) + block * layout_.out_block;
          if (shape_.proj_size > 0 && first == 0)  // all of dh went through w_hr: no direct part
            for (int m = 0; m < count; ++m)
              for (std::int64_t j = 0; j < layout_.out_block; ++j) c[m * c_stride + j] = T(0);
          const Operand* a = d_pre + row * a_row;
          if (kRounds || !plan_.prefetch) {
            w_hh_.multiply(block, count, a, a_stride, c, c_stride, columns_);
            return;
          }
          if constexpr (!kRounds) {
            const Prefetch prefetch = last < depth ? w_hh_.panel_part(block, index, tiles, last,
                                                                      std::min(last + part, depth))
                                                   : w_hh_.panel_part(next, index, tiles, 0, part);
            w_hh_.multiply_part(block, first, last, count, a, a_stride, c, c_stride, columns_,
                                prefetch);
          }
          ++index;
        });
      }
    }
  }

  const LayerBackward<T, T>& problem_;
  const LayerShape& shape_;
  const Plan& plan_;
  const BackwardLayout& layout_;
  T* const workspace_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const OwnRows rows_;
  const IndexRange out_blocks_, unit_blocks_;
  const std::int64_t output_size_, carry_stride_;
  const Columns columns_;
  const WeightMatrix<T, Recurrent> w_hh_;
  const WeightMatrix<T> w_hr_;
  Operand* rounded_ = nullptr;  // of this step
  StepResets<T> resets_;        // before this step
};

FASTRNN_KERNELS_END
