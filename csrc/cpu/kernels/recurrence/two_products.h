// The time loops of cells with two products per step (cells/two_products.h). A step has four parts
// with a barrier after each; forward:
//
//   units of w_hh    the first rows times h                                -> barrier
//   whole rows       the first gates, and the operand                      -> barrier
//   units of w_hh    the other rows times the operand                      -> barrier
//   whole rows       the last gate and h', which the next step multiplies  -> barrier
//
// Backward goes the other way.
#pragma once

#include "cpu/kernels/recurrence/backward.h"
#include "cpu/kernels/recurrence/forward.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
class TwoProductsForward : RecurrenceForward<Cell, T> {
  using Base = RecurrenceForward<Cell, T>;
  using Base::kept_, Base::workspace_, Base::rank_, Base::hidden_, Base::rows_, Base::share_;
  using Base::kLanes, Base::problem_, Base::parts_, Base::sequence_, Base::plan_, Base::layout_;
  using typename Base::Statistics;
  using typename Base::Vec;

 public:
  TwoProductsForward(const Recurrence<T>& problem, const Plan& plan, const RecurrenceLayout& layout,
                     T* workspace, Team& team, int rank)
      : Base(problem, plan, layout, workspace, team, rank),
        second_blocks_(layout.second_blocks, rank % plan.unit_groups, plan.unit_groups),
        one_gate_(kZero, 1, plan.back_vectors, kLanes),
        first_({parts_.w_hh, hidden_, true, 1, kFirst * hidden_, hidden_},
               workspace + layout.panels, plan.back_vectors, true),
        second_({parts_.w_hh + kFirst * hidden_ * hidden_, hidden_, true, 1, kSecond * hidden_,
                 hidden_},
                workspace + layout.second_panels, plan.back_vectors, true) {}

  void run() {
    const std::int64_t steps = sequence_.steps;
    const IndexRange& first_blocks = Base::blocks_;
    first_.pack(first_blocks.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    second_.pack(second_blocks_.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    if (steps > 0) Base::start_rows(sequence_.at(sequence_.step(0)));
    Base::barrier_.arrive(rank_);
    Base::barrier_.wait(rank_, 0, plan_.threads);
    const std::int64_t work = 1 + rows_.count(sequence_.batch) * hidden_ * layout_.unit_block *
                                      (first_blocks.size() + second_blocks_.size());
    for (std::int64_t k = 0; k < steps; ++k) {
      if (Base::team_.gives_up(rank_, work)) return Base::arrive_for(4 * (steps - k));
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      multiply(first_, first_blocks, own);
      Base::synchronise();
      for (std::int64_t i = share_.first; i < own; i += share_.step) gates(at, rows_.row(i));
      Base::synchronise();
      multiply(second_, second_blocks_, own);
      Base::synchronise();
      for (std::int64_t i = share_.first; i < own; i += share_.step) output(at, rows_.row(i));
      if (k + 1 < steps) Base::start_rows(sequence_.at(sequence_.step(k + 1)));
      Base::synchronise();
    }
    if (steps == 0) Base::finish_untouched();
  }

 private:
  static constexpr int kZero[] = {0};
  static constexpr int kFirst = cells::kFirstGates<Cell>, kSecond = Cell::kGates - kFirst;
  static_assert(kSecond == 1, "the second product has one gate");

  T* products(std::int64_t b) const {
    return workspace_ + layout_.products + b * layout_.product_row;
  }
  // What the cell saves of row b of a step.
  T* saved_row(std::int64_t n, std::int64_t b) const {
    return problem_.saved != nullptr ? problem_.saved + n * kept_.width
                                     : workspace_ + layout_.gates + b * Cell::kSaved * hidden_;
  }

  void multiply(const WeightMatrix<T>& w, const IndexRange& blocks, std::int64_t own) {
    const std::int64_t stride = rows_.stride * layout_.product_row;
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
      for_each_tile(0, own, w.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        T* to = products(row) + block * layout_.unit_block;
        for (int m = 0; m < count; ++m)
          for (std::int64_t j = 0; j < layout_.unit_block; j += kLanes)
            Vec(T(0)).store(to + m * stride + j);
        w.multiply(block, count, Base::operand(row), rows_.stride * hidden_, to, stride, one_gate_);
      });
    }
  }

  // The pre-activation of a unit, gate `column / H` of the row n, from column `at` of a product.
  FASTRNN_INLINE Vec pre_activation(std::int64_t n, const T* product, std::int64_t at,
                                    std::int64_t column, std::int64_t lanes,
                                    const Statistics& of_a) const {
    Vec side = Vec::load(product + at, lanes);
    if (parts_.gain_h != nullptr) {
      side = (side - Vec(of_a.mean)) * Vec(of_a.scale);
      if (problem_.saved != nullptr)
        side.store(problem_.saved + n * kept_.width + kept_.normalised + column, lanes);
      side = side * Vec::load(parts_.gain_h + column, lanes);
    }
    if (parts_.b_hh != nullptr) side = side + Vec::load(parts_.b_hh + column, lanes);
    Vec side_x = Vec::load(problem_.pre_x + n * Cell::kGates * hidden_ + column, lanes);
    if (parts_.b_x != nullptr) side_x = side_x + Vec::load(parts_.b_x + column, lanes);
    return side + side_x;
  }
  // Of the `count` gates of a product, whose scale backward needs.
  Statistics statistics_of(std::int64_t n, const T* product, int count, int index) const {
    if (parts_.gain_h == nullptr) return {};
    const Statistics of_a = Base::statistics(product, count, hidden_);
    if (problem_.saved != nullptr)
      problem_.saved[n * kept_.width + kept_.statistics + index] = of_a.scale;
    return of_a;
  }

  void gates(const StepRows& at, std::int64_t b) {
    const std::int64_t n = at.first + b, hidden = hidden_;
    const T* a = products(b);
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    T* to = saved_row(n, b);
    const Statistics of_a = statistics_of(n, a, kFirst, 0);
    for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      Vec pre[kFirst], saved[Cell::kSaved];
      for (int gate = 0; gate < kFirst; ++gate) {
        const std::int64_t column = gate * hidden + unit;
        pre[gate] = pre_activation(n, a, column, column, lanes, of_a);
      }
      const Vec operand = Cell::gates(pre, Vec::load(h_before + unit, lanes), saved);
      for (int gate = 0; gate < kFirst; ++gate) saved[gate].store(to + gate * hidden + unit, lanes);
      Base::store_operand(operand, b, unit, lanes);
    }
  }

  void output(const StepRows& at, std::int64_t b) {
    const std::int64_t n = at.first + b, hidden = hidden_;
    const T* a = products(b);
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    T* row = saved_row(n, b);
    const Statistics of_a = statistics_of(n, a, kSecond, 1);
    for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      Vec saved[Cell::kSaved];
      for (int gate = 0; gate < kFirst; ++gate)
        saved[gate] = Vec::load(row + gate * hidden + unit, lanes);
      const std::int64_t column = kFirst * hidden + unit;
      const Vec pre = pre_activation(n, a, unit, column, lanes, of_a);
      const Vec h = Cell::output(pre, Vec::load(h_before + unit, lanes), saved);
      saved[kFirst].store(row + column, lanes);
      Base::store_h(at, b, unit, lanes, h, h_before, row);
    }
  }

  const IndexRange second_blocks_;
  const Columns one_gate_;
  const WeightMatrix<T> first_, second_;
};

template <class Cell, class T>
class TwoProductsBackward : RecurrenceBackward<Cell, T> {
  using Base = RecurrenceBackward<Cell, T>;
  using Base::kept_, Base::rank_, Base::hidden_, Base::rows_, Base::share_, Base::w_hh_;
  using Base::kLanes, Base::problem_, Base::parts_, Base::sequence_, Base::plan_, Base::layout_;
  using typename Base::Vec;

 public:
  using Base::Base;

  void run() {
    const std::int64_t steps = sequence_.steps;
    w_hh_.pack(Base::blocks_.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    std::fill(Base::sums(rank_), Base::sums(rank_) + 2 * layout_.sums_size, T(0));
    if (steps == 0) Base::begin_rows(0, rows_.count(sequence_.batch));
    Base::barrier_.arrive(rank_);
    Base::barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = steps - 1; k >= 0; --k) {
      if (Base::team_.gives_up(rank_, Base::step_work())) return Base::arrive_for(4 * (k + 1) + 1);
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      Base::begin_rows(rows_.count(at.first_ending), own);
      for (std::int64_t i = share_.first; i < own; i += share_.step) output(at, rows_.row(i));
      Base::synchronise();
      multiply(at, own, kFirst, Cell::kGates);
      Base::synchronise();
      for (std::int64_t i = share_.first; i < own; i += share_.step) gates(at, rows_.row(i));
      Base::synchronise();
      multiply(at, own, 0, kFirst);
      Base::synchronise();
    }
    Base::finish_rows();
    Base::flush_sums();
    Base::barrier_.arrive(rank_);
    if (rank_ != 0) return;
    Base::barrier_.wait(rank_, 0, plan_.threads);
    Base::add_sums();
  }

 private:
  static constexpr int kFirst = cells::kFirstGates<Cell>;

  // d_a w_hh of the gates from `begin` to before `end`.
  void multiply(const StepRows& at, std::int64_t own, int begin, int end) {
    const std::int64_t depth = Cell::kGates * hidden_, stride = rows_.stride * layout_.padded;
    for (std::int64_t block = Base::blocks_.begin; block < Base::blocks_.end; ++block) {
      for_each_tile(0, own, w_hh_.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        T* to = Base::products(row) + block * layout_.out_block;
        for (int m = 0; m < count; ++m)
          for (std::int64_t j = 0; j < layout_.out_block; j += kLanes)
            Vec(T(0)).store(to + m * stride + j);
        w_hh_.multiply_part(block, begin * hidden_, end * hidden_, count,
                            problem_.d_a + (at.first + row) * depth, rows_.stride * depth, to,
                            stride, Base::columns_, {});
      });
    }
  }

  FASTRNN_INLINE void load_gates(const T* from, std::int64_t unit, std::int64_t lanes, Vec* values,
                                 int count) const {
    for (int gate = 0; gate < count; ++gate)
      values[gate] = Vec::load(from + gate * hidden_ + unit, lanes);
  }

  // From h' to n, and what reaches the first gates and h around the operand.
  void output(const StepRows& at, std::int64_t b) {
    const std::int64_t n = at.first + b, hidden = hidden_;
    const T* saved = problem_.saved + n * kept_.width;
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    T* d_pre_row = problem_.d_pre_x + n * Cell::kGates * hidden;
    for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      Vec around, values[Cell::kSaved], d_pre[Cell::kGates];
      const Vec d_next = Base::split(at, b, unit, lanes, around);
      load_gates(saved, unit, lanes, values, Cell::kSaved);
      const Vec h = Vec::load(h_before + unit, lanes);
      (around + Cell::output_backward(values, h, d_next, d_pre)).store(Base::direct(b) + unit);
      for (int gate = 0; gate < Cell::kGates; ++gate)
        d_pre[gate].store(d_pre_row + gate * hidden + unit, lanes);
    }
    add_up(n, saved, kFirst, Cell::kGates, 1);
  }

  // From the operand to the first gates and h.
  void gates(const StepRows& at, std::int64_t b) {
    const std::int64_t n = at.first + b, hidden = hidden_;
    const T* saved = problem_.saved + n * kept_.width;
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    T* d_pre_row = problem_.d_pre_x + n * Cell::kGates * hidden;
    for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      Vec values[Cell::kSaved], d_pre[kFirst];
      Vec d_operand = Vec::load(Base::products(b) + unit);
      if (parts_.mask_h != nullptr)
        d_operand = d_operand * Vec::load(parts_.mask_h + b * hidden + unit, lanes);
      load_gates(saved, unit, lanes, values, Cell::kSaved);
      load_gates(d_pre_row, unit, lanes, d_pre, kFirst);
      const Vec h = Vec::load(h_before + unit, lanes);
      const Vec d_h = Cell::gates_backward(values, h, d_operand, d_pre);
      (Vec::load(Base::direct(b) + unit) + d_h).store(Base::direct(b) + unit);
      for (int gate = 0; gate < kFirst; ++gate)
        d_pre[gate].store(d_pre_row + gate * hidden + unit, lanes);
    }
    add_up(n, saved, 0, kFirst, 0);
    if (++Base::rows_in_sum_ == Base::kRowsPerSum) Base::flush_sums();
  }

  // The gradients of b_hh and gain_h, and d_a, of the gates of a product.
  void add_up(std::int64_t n, const T* saved, int begin, int end, int index) {
    if (parts_.gain_h != nullptr || parts_.b_hh != nullptr)
      Base::normalisation_backward(n, saved, begin * hidden_, (end - begin) * hidden_,
                                   kept_.statistics + index);
  }
};

FASTRNN_KERNELS_END
