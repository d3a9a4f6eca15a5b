// The backward walk of one rank: from the last step to the first,
//
//   dh_t    = carry + d_y_t                       (with a projection: dm_t = dh_t w_hr)
//   d_pre_t = the cell's backward step            for this rank's own units        -> barrier
//   carry   = direct part + d_pre_t[hidden side] w_hh   for this rank's own units of h
//
// carry starts as d_h_n and ends as d_h0; a row that a step does not have keeps what it carries.
// The gradients of the weights and of x are products over all steps, made by the layers above.
#pragma once

#include "cpu/kernels/product/panels.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
class BackwardWalk {
 public:
  BackwardWalk(const LayerBackward<T, T>& problem, const Plan& plan, const BackwardLayout& layout,
               T* workspace, Team& team, int rank)
      : p_(problem),
        shape_(problem.shape),
        plan_(plan),
        at_(layout),
        work_(workspace),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        rows_(shape_.batch, rank / plan.unit_groups, plan.row_groups),
        out_blocks_(layout.out_blocks, rank % plan.unit_groups, plan.unit_groups),
        unit_blocks_(layout.unit_blocks, rank % plan.unit_groups, plan.unit_groups),
        out_(shape_.output_size()),
        carry_stride_(layout.out_blocks * layout.out_block),
        columns_(kZero, 1, plan.back_vectors, kLanes),
        w_hh_({problem.weights.w_hh, problem.weights.w_hh_stride, false, 1, out_,
               Cell::kGates * shape_.hidden_size},
              workspace + layout.panels_h, plan.back_vectors, plan.packed),
        w_hr_(
            {problem.weights.w_hr, problem.weights.w_hr_stride, false, 1, shape_.hidden_size, out_},
            workspace + layout.panels_p, plan.back_vectors, plan.packed) {}

  void run() {
    pack();
    start_carry();
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = shape_.steps - 1; k >= 0; --k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(k + 1);
      const std::int64_t t = shape_.step(k);
      const std::int64_t end = std::min(rows_.end, shape_.step_rows[t]);
      if (shape_.proj_size > 0) {
        put_output_gradients(t, end);
        meet();
        through_projection(t, end);
      } else {
        const Share own = own_out();
        for (std::int64_t b = rows_.begin; b < end; ++b) {
          const Row row(*this, t, b);
          for (std::int64_t unit = own.begin; unit < own.end; unit += kLanes)
            pointwise(row, unit, output_gradient(t, b, unit));
        }
      }
      meet();
      hand_on(t, end);
    }
    finish();
  }

 private:
  using P = Pack<T>;
  static constexpr int kLanes = P::kLanes;
  static constexpr int kZero[] = {0};

  // Multiply-adds of this rank in a step.
  std::int64_t step_work() const {
    return 1 +
           rows_.size() * Cell::kGates * shape_.hidden_size * out_blocks_.size() * at_.out_block;
  }
  // As often as in so many steps, see Team::gives_up.
  void arrive_for(std::int64_t steps) {
    if (shape_.proj_size > 0) steps *= 2;
    while (steps-- > 0) barrier_.arrive(rank_);
  }

  void meet() {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
  }

  // Row groups share the panels of their blocks, and the work of packing them.
  void pack() {
    const int row_group = rank_ / plan_.unit_groups;
    w_hh_.pack(out_blocks_.cut(row_group, plan_.row_groups));
    if (shape_.proj_size > 0) w_hr_.pack(unit_blocks_.cut(row_group, plan_.row_groups));
  }

  T* carry(std::int64_t b) const { return work_ + at_.carry + b * carry_stride_; }

  // The hidden units and the units of h that this rank computes.
  Share own_out() const { return out_blocks_.units(at_.out_block, out_); }
  Share own_hidden() const {
    return shape_.proj_size > 0 ? unit_blocks_.units(at_.unit_block, shape_.hidden_size)
                                : own_out();
  }

  void start_carry() {
    const std::int64_t begin = out_blocks_.begin * at_.out_block;
    const std::int64_t end = out_blocks_.end * at_.out_block;
    const Share hidden = own_hidden();
    for (std::int64_t b = rows_.begin; b < rows_.end; ++b) {
      for (std::int64_t j = begin; j < end; ++j)
        carry(b)[j] = p_.d_h_n != nullptr && j < out_ ? p_.d_h_n[b * out_ + j] : T(0);
      if constexpr (Cell::kStates == 2)
        for (std::int64_t j = hidden.begin; j < hidden.end; ++j)
          p_.d_c0[b * shape_.hidden_size + j] =
              p_.d_c_n != nullptr ? p_.d_c_n[b * shape_.hidden_size + j] : T(0);
    }
  }

  void finish() {
    const Share own = own_out();
    for (std::int64_t b = rows_.begin; b < rows_.end; ++b)
      for (std::int64_t j = own.begin; j < own.end; ++j) p_.d_h0[b * out_ + j] = carry(b)[j];
  }

  // carry + d_y at R-units from `unit` on.
  P output_gradient(std::int64_t t, std::int64_t b, std::int64_t unit) const {
    P d_h = P::load(carry(b) + unit);
    if (p_.d_y != nullptr) {
      const std::int64_t row = shape_.step_offset[t] + b;
      d_h = d_h + P::load(p_.d_y + row * p_.d_y_stride + unit,
                          std::min<std::int64_t>(kLanes, out_ - unit));
    }
    return d_h;
  }

  void put_output_gradients(std::int64_t t, std::int64_t end) {
    const Share own = own_out();
    for (std::int64_t b = rows_.begin; b < end; ++b) {
      T* to = p_.d_h_all + (shape_.step_offset[t] + b) * out_;
      for (std::int64_t unit = own.begin; unit < own.end; unit += kLanes)
        output_gradient(t, b, unit).store(to + unit, std::min<std::int64_t>(kLanes, out_ - unit));
    }
  }

  // dm = dh w_hr, then the cell.
  void through_projection(std::int64_t t, std::int64_t end) {
    alignas(64) T scratch[kTileRows * kTileVectors * kLanes];
    for (std::int64_t block = unit_blocks_.begin; block < unit_blocks_.end; ++block) {
      for_each_tile(rows_.begin, end, w_hh_.tile_height(), [&](std::int64_t row, int count) {
        for (std::int64_t i = 0; i < count * at_.unit_block; ++i) scratch[i] = T(0);
        w_hr_.multiply(block, count, p_.d_h_all + (shape_.step_offset[t] + row) * out_, out_,
                       scratch, at_.unit_block, columns_);
        for (int m = 0; m < count; ++m) {
          const Row pointers(*this, t, row + m);
          for (int u = 0; u < plan_.back_vectors; ++u) {
            const std::int64_t unit = block * at_.unit_block + u * kLanes;
            if (unit >= shape_.hidden_size) break;
            pointwise(pointers, unit, P::load(scratch + m * at_.unit_block + u * kLanes));
          }
        }
      });
    }
  }

  // Where the values of sequence b at step t lie: local copies, since what the pointwise text
  // stores could be any of the members, for all the compiler knows.
  struct Row {
    std::int64_t hidden;
    const T* saved;     // [S*H] of this step
    const T* y;         // [R]
    const T* h_before;  // [R] the states it started from
    const T* c_before;  // [H]
    T* d_c;             // [H]
    T* d_pre;           // [Q*H]
    T* d_h;             // [R] the carry, or null with a projection

    Row(const BackwardWalk& walk, std::int64_t t, std::int64_t b)
        : hidden(walk.shape_.hidden_size) {
      const auto& p = walk.p_;
      const std::int64_t row = walk.shape_.step_offset[t] + b;
      const std::int64_t before = walk.shape_.previous_row(t, b);
      saved = p.saved + row * Cell::kSaved * hidden;
      y = p.y + row * p.y_stride;
      h_before = before < 0 ? p.h0 + b * hidden : p.y + before * p.y_stride;
      if constexpr (Cell::kStates == 2) {
        c_before = before < 0 ? p.c0 + b * hidden
                              : p.saved + (before * Cell::kSaved + Cell::kSavedState) * hidden;
        d_c = p.d_c0 + b * hidden;
      }
      d_pre = p.d_pre + row * Cell::kPre * hidden;
      d_h = walk.shape_.proj_size > 0 ? nullptr : walk.carry(b);
    }
  };

  // The cell's text on a vector of hidden units.
  FASTRNN_INLINE void pointwise(const Row& row, std::int64_t unit, P d_h) {
    const std::int64_t lanes = std::min<std::int64_t>(kLanes, row.hidden - unit);
    P saved[std::max(Cell::kSaved, 1)], state[Cell::kStates] = {}, next_state[Cell::kStates] = {};
    P d_next_state[Cell::kStates], d_pre[Cell::kPre], d_state[Cell::kStates];
    d_next_state[0] = d_h;
    for (int s = 0; s < Cell::kSaved; ++s)
      saved[s] = P::load(row.saved + s * row.hidden + unit, lanes);
    if constexpr (Cell::kBackwardReadsNextH) next_state[0] = P::load(row.y + unit, lanes);
    if constexpr (Cell::kBackwardReadsH) state[0] = P::load(row.h_before + unit, lanes);
    if constexpr (Cell::kStates == 2) {
      state[1] = P::load(row.c_before + unit, lanes);
      d_next_state[1] = P::load(row.d_c + unit, lanes);
    }
    Cell::backward(cells::StepGradientInputs<P>{saved, state, next_state, d_next_state},
                   cells::StepGradientOutputs<P>{d_pre, d_state});
    for (int q = 0; q < Cell::kPre; ++q) d_pre[q].store(row.d_pre + q * row.hidden + unit, lanes);
    if constexpr (Cell::kStates == 2) d_state[1].store(row.d_c + unit, lanes);
    if (row.d_h != nullptr) (Cell::kDirectPath ? d_state[0] : P(T(0))).store(row.d_h + unit);
  }

  // carry += d_pre[hidden side] w_hh. The hidden side's columns of d_pre come first (kPreH = 0...).
  void hand_on(std::int64_t t, std::int64_t end) {
    const std::int64_t width = Cell::kPre * shape_.hidden_size;
    const T* d_pre = p_.d_pre + shape_.step_offset[t] * width;
    for (std::int64_t i = 0; i < out_blocks_.size(); ++i) {
      const std::int64_t block = out_blocks_.zigzag(i, t % 2 != 0);
      for_each_tile(rows_.begin, end, w_hh_.tile_height(), [&](std::int64_t row, int count) {
        T* c = carry(row) + block * at_.out_block;
        if (shape_.proj_size > 0)  // dh went through w_hr whole: nothing direct is left
          for (int m = 0; m < count; ++m)
            for (std::int64_t i = 0; i < at_.out_block; ++i) c[m * carry_stride_ + i] = T(0);
        w_hh_.multiply(block, count, d_pre + row * width, width, c, carry_stride_, columns_);
      });
    }
  }

  const LayerBackward<T, T>& p_;
  const LayerShape& shape_;
  const Plan& plan_;
  const BackwardLayout& at_;
  T* const work_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const Share rows_, out_blocks_, unit_blocks_;
  const std::int64_t out_, carry_stride_;
  const Columns columns_;
  const Weights<T> w_hh_, w_hr_;
};

FASTRNN_KERNELS_END
