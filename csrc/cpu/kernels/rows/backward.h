// RowBackward: the backward time loop of a cell whose step reduces over the units of a row, by one
// rank, from the last step to the first, in two parts as forward:
//
//   own rows    the cell's backward: d_pre, and what reaches the states around w_hh   -> barrier
//   own units   carry += d_pre[hidden side] w_hh                                      -> barrier
//
// The carry and the gradients of the cell states are those of schedule/backward.h.
#pragma once

#include "cpu/kernels/rows/row.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
struct BackwardRow : AnyRow<T> {
  using Value = Pack<T>;
  using AnyRow<T>::hidden, AnyRow<T>::kLanes;

  const T* saved_values;  // [S, H]
  const T* h_before;
  const T* c_before;    // [C, H]
  const T* y;           // [H]
  const T* d_y;         // [H] or null: zero
  const T* parameters;  // [E, H]
  T* carry;             // [H], padded
  T* d_c;               // [C, H]
  T* d_pre_row;         // [Q + E, H]

  template <bool kWhole>
  struct Place : AnyPlace<T, kWhole> {
    const BackwardRow& row;

    FASTRNN_INLINE Place(const BackwardRow& of, std::int64_t unit)
        : AnyPlace<T, kWhole>{unit, of.hidden - unit}, row(of) {}

    FASTRNN_INLINE Value saved(int k) const {
      return this->load(row.saved_values + k * row.hidden);
    }
    FASTRNN_INLINE Value state(int k) const {
      return this->load(k == 0 ? row.h_before : row.c_before + (k - 1) * row.hidden);
    }
    FASTRNN_INLINE Value next_state(int) const { return this->load(row.y); }
    FASTRNN_INLINE Value parameter(int k) const {
      return this->load(row.parameters + k * row.hidden);
    }
    FASTRNN_INLINE Value d_next_state(int k) const {
      if (k > 0) return this->load(row.d_c + (k - 1) * row.hidden);
      const Value carry = Value::load(row.carry + this->unit);
      return row.d_y == nullptr ? carry : carry + this->load(row.d_y);
    }
    FASTRNN_INLINE Value d_pre(int k) const { return this->load(row.d_pre_row + k * row.hidden); }
    FASTRNN_INLINE Value d_parameter(int k) const { return d_pre(Cell::kPre + k); }
    FASTRNN_INLINE Value buffer(int k) const {
      return Value::load(row.buffers + k * row.buffer_stride + this->unit);
    }
    FASTRNN_INLINE void set_buffer(int k, Value value) const {
      value.store(row.buffers + k * row.buffer_stride + this->unit);
    }
    FASTRNN_INLINE void set_d_pre(int k, Value value) const {
      this->store(value, row.d_pre_row + k * row.hidden);
    }
    FASTRNN_INLINE void set_d_parameter(int k, Value value) const {
      set_d_pre(Cell::kPre + k, value);
    }
    FASTRNN_INLINE void set_d_state(int k, Value value) const {
      if (k > 0)
        this->store(value, row.d_c + (k - 1) * row.hidden);
      else
        value.store(row.carry + this->unit);
    }
  };

  template <class Body>
  FASTRNN_INLINE void for_units(Body&& body) const {
    std::int64_t unit = 0;
    for (; unit + kLanes <= hidden; unit += kLanes) body(Place<true>(*this, unit));
    if (unit < hidden) body(Place<false>(*this, unit));
  }
  FASTRNN_INLINE Value saved(int k) const {
    return Value(saved_values[(Cell::kSaved - 1) * hidden + k]);
  }
};

template <class Cell, class T>
void backward_row(const BackwardRow<Cell, T>& from) {
  const BackwardRow<Cell, T> row = from;  // its members cannot change while it computes
  Cell::backward(row);
}

template <class Cell, class T>
class RowBackward {
 public:
  RowBackward(const LayerBackward<T, T>& problem, const Plan& plan, const BackwardLayout& layout,
              T* workspace, Team& team, int rank)
      : problem_(problem),
        sequence_(problem.shape.sequence),
        plan_(plan),
        layout_(layout),
        workspace_(workspace),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        hidden_(problem.shape.hidden_size),
        padded_(layout.out_blocks * layout.out_block),
        rows_(sequence_, rank / plan.unit_groups, plan.row_groups),
        share_(plan, rank),
        blocks_(layout.out_blocks, rank % plan.unit_groups, plan.unit_groups),
        columns_(kZero, 1, plan.back_vectors, kLanes),
        w_hh_({problem.weights.w_hh, problem.weights.w_hh_stride, false, 1, hidden_,
               Cell::kGates * hidden_},
              workspace + layout.panels_h, plan.back_vectors, plan.packed) {}

  void run() {
    const std::int64_t steps = sequence_.steps;
    w_hh_.pack(blocks_.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = steps - 1; k >= 0; --k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(2 * (k + 1));
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      begin_rows(rows_.count(at.first_ending), own);
      for (std::int64_t i = share_.first; i < own; i += share_.step) {
        add_step_gradients(at, rows_.row(i));
        compute_row(at, rows_.row(i));
      }
      synchronise();
      multiply(at, own);
      synchronise();
      finish_rows(rows_.count(at.first_starting), own);
    }
    if (steps > 0) return;
    begin_rows(0, rows_.count(sequence_.batch));
    finish_rows(0, rows_.count(sequence_.batch));
  }

 private:
  using Vec = Pack<T>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kZero[] = {0};
  static constexpr int kCellStates = cells::kCellStates<Cell>;
  static constexpr int kColumns = cells::kGradientColumns<Cell>;  // of d_pre, per unit

  std::int64_t step_work() const {
    return 1 + rows_.count(sequence_.batch) * Cell::kGates * hidden_ * blocks_.size() *
                   layout_.out_block;
  }
  void arrive_for(std::int64_t times) {
    while (times-- > 0) barrier_.arrive(rank_);
  }
  void synchronise() {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
  }

  T* carry(std::int64_t b) const { return workspace_ + layout_.carry + b * padded_; }

  // Own rows from the i-th to before the end-th start with the gradients of the final states.
  void begin_rows(std::int64_t i, std::int64_t end) {
    for (i = share_.from(i); i < end; i += share_.step) {
      const std::int64_t b = rows_.row(i);
      load(problem_.d_h_n, b, hidden_, carry(b));
      std::fill(carry(b) + hidden_, carry(b) + padded_, T(0));
      if constexpr (kCellStates > 0)  // d_c is kept in d_c0 between steps
        load(problem_.d_c_n, b, kCellStates * hidden_, problem_.d_c0 + b * kCellStates * hidden_);
    }
  }
  void finish_rows(std::int64_t i, std::int64_t end) {
    for (i = share_.from(i); i < end; i += share_.step) {
      const std::int64_t b = rows_.row(i);
      load(carry(b), 0, hidden_, problem_.d_h0 + b * hidden_);
    }
  }
  // Copies row b of from [*, size]; null: zeros.
  static void load(const T* from, std::int64_t b, std::int64_t size, T* to) {
    if (from == nullptr)
      std::fill(to, to + size, T(0));
    else
      std::copy(from + b * size, from + (b + 1) * size, to);
  }
  void add_step_gradients(const StepRows& at, std::int64_t b) const {
    if (kCellStates == 0 || problem_.d_c_steps == nullptr) return;
    const std::int64_t size = kCellStates * hidden_;
    const T* from = problem_.d_c_steps + (at.first + b) * size;
    T* to = problem_.d_c0 + b * size;
    for (std::int64_t j = 0; j < size; ++j) to[j] += from[j];
  }

  void compute_row(const StepRows& at, std::int64_t b) const {
    const auto& p = problem_;
    const std::int64_t n = at.first + b;
    BackwardRow<Cell, T> row;
    row.hidden = hidden_;
    row.buffers = workspace_ + layout_.rows + rank_ * layout_.row_size;
    row.buffer_stride = padded_;
    row.saved_values = p.saved + n * Cell::kSaved * hidden_;
    row.h_before = at.state_before(b, p.y, p.y_stride, p.h0, hidden_);
    row.c_before = nullptr;
    row.d_c = nullptr;
    if constexpr (kCellStates > 0) {
      row.c_before = at.state_before(b, p.saved + Cell::kSavedState * hidden_,
                                     Cell::kSaved * hidden_, p.c0, kCellStates * hidden_);
      row.d_c = p.d_c0 + b * kCellStates * hidden_;
    }
    row.y = p.y + n * p.y_stride;
    row.d_y = p.d_y == nullptr ? nullptr : p.d_y + n * p.d_y_stride;
    row.parameters = p.weights.w_unit;
    row.carry = carry(b);
    row.d_pre_row = p.d_pre + n * kColumns * hidden_;
    backward_row(row);
  }

  void multiply(const StepRows& at, std::int64_t own) {
    const std::int64_t width = kColumns * hidden_, stride = rows_.stride * padded_;
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for_each_tile(0, own, w_hh_.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        w_hh_.multiply(block, count, problem_.d_pre + (at.first + row) * width,
                       rows_.stride * width, carry(row) + block * layout_.out_block, stride,
                       columns_);
      });
    }
  }

  const LayerBackward<T, T>& problem_;
  const Sequence& sequence_;
  const Plan& plan_;
  const BackwardLayout& layout_;
  T* const workspace_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const std::int64_t hidden_, padded_;
  const OwnRows rows_;
  const RowShare share_;
  const IndexRange blocks_;
  const Columns columns_;
  const WeightMatrix<T> w_hh_;
};

FASTRNN_KERNELS_END
