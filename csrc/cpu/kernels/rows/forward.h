// RowForward: the forward time loop of a cell whose step reduces over the units of a row, by one
// rank. A step has two parts with a barrier after each, as in recurrence/forward.h:
//
//   own units   x w_ih and h w_hh for all rows of the row group   -> barrier
//   own rows    the cell's forward                                -> barrier
//
// The pre-activations of a step lie between both parts in `gates_x`, by blocks of units as in
// schedule/forward.h.
#pragma once

#include "cpu/kernels/rows/row.h"
#include "cpu/kernels/schedule/forward_panels.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
struct ForwardRow : AnyRow<T> {
  using Value = Pack<T>;
  using AnyRow<T>::hidden, AnyRow<T>::kLanes;

  const T* pre;  // [unit_blocks, Q, unit_block], block_stride from one block to the next
  std::int64_t block_stride, unit_block;
  const T* h_before;
  const T* parameters;  // [E, H]
  T* saved;             // [S, H]
  T* h_after;
  T* y;
  T* h_n;  // null: the sequence does not end here
  T* c;    // [C, H] the states beside h, which the step replaces

  template <bool kWhole>
  struct Place : AnyPlace<T, kWhole> {
    const ForwardRow& row;
    const T* pre_here;

    FASTRNN_INLINE Place(const ForwardRow& of, const T* pre_there, std::int64_t unit)
        : AnyPlace<T, kWhole>{unit, of.hidden - unit}, row(of), pre_here(pre_there) {}

    FASTRNN_INLINE Value pre(int k) const { return Value::load(pre_here + k * row.unit_block); }
    FASTRNN_INLINE Value state(int k) const {
      return this->load(k == 0 ? row.h_before : row.c + (k - 1) * row.hidden);
    }
    FASTRNN_INLINE Value parameter(int k) const {
      return this->load(row.parameters + k * row.hidden);
    }
    FASTRNN_INLINE Value saved(int k) const { return this->load(row.saved + k * row.hidden); }
    FASTRNN_INLINE void set_saved(int k, Value value) const {
      this->store(value, row.saved + k * row.hidden);
    }
    FASTRNN_INLINE Value buffer(int k) const {
      return Value::load(row.buffers + k * row.buffer_stride + this->unit);
    }
    FASTRNN_INLINE void set_buffer(int k, Value value) const {
      value.store(row.buffers + k * row.buffer_stride + this->unit);
    }
    FASTRNN_INLINE void set_next_state(int k, Value value) const {
      if (k > 0) return this->store(value, row.c + (k - 1) * row.hidden);
      this->store(value, row.h_after);
      this->store(value, row.y);
      if (row.h_n != nullptr) this->store(value, row.h_n);
    }
  };

  template <class Body>
  FASTRNN_INLINE void for_units(Body&& body) const {
    const T* block = pre;
    for (std::int64_t first = 0; first < hidden; first += unit_block, block += block_stride) {
      for (std::int64_t u = 0; u < unit_block; u += kLanes) {
        const std::int64_t unit = first + u;
        if (unit + kLanes <= hidden)
          body(Place<true>(*this, block + u, unit));
        else if (unit < hidden)
          body(Place<false>(*this, block + u, unit));
      }
    }
  }
  FASTRNN_INLINE void set_saved(int k, Value value) const {
    value.store(saved + (Cell::kSaved - 1) * hidden + k, 1);
  }
};

// Apart from RowForward, so that it is compiled once for all formats of panels.
template <class Cell, class T>
void forward_row(const ForwardRow<Cell, T>& from) {
  const ForwardRow<Cell, T> row = from;  // its members cannot change while it computes
  Cell::forward(row);
}

template <class Cell, class T, class Panels>
class RowForward {
 public:
  RowForward(const LayerForward<T, T>& problem, const Plan& plan, const Panels& panels,
             const ForwardLayout& layout, T* scratch, Team& team, int rank)
      : problem_(problem),
        sequence_(problem.shape.sequence),
        plan_(plan),
        panels_(panels),
        panel_layout_(panels.layout),
        layout_(layout),
        scratch_(scratch),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        hidden_(problem.shape.hidden_size),
        width_(Cell::kPre * panel_layout_.unit_block),
        rows_(sequence_, rank / plan.unit_groups, plan.row_groups),
        share_(plan, rank),
        blocks_(panel_layout_.unit_blocks, rank % plan.unit_groups, plan.unit_groups),
        columns_x_(Cell::kPreX, Cell::kGates, plan.unit_vectors, kLanes),
        columns_h_(Cell::kPreH, Cell::kGates, plan.unit_vectors, kLanes) {}

  void run() {
    const std::int64_t steps = sequence_.steps;
    if (steps > 0) start_rows(sequence_.at(sequence_.step(0)), 0);
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);  // all row groups have packed their part of the panels
    std::int64_t chunk_end = 0;              // steps before this one have their gates_x
    for (std::int64_t k = 0; k < steps; ++k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(2 * (steps - k));
      if (!plan_.input_fused && k == chunk_end) chunk_end = project_ahead(k);
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      multiply(at, own, k % 2);
      synchronise();
      for (std::int64_t i = share_.first; i < own; i += share_.step)
        compute_row(at, rows_.row(i), k % 2);
      if (k + 1 < steps) start_rows(sequence_.at(sequence_.step(k + 1)), (k + 1) % 2);
      synchronise();
    }
    if (steps == 0) finish_untouched();
  }

 private:
  using Vec = Pack<T>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kCellStates = cells::kCellStates<Cell>;

  std::int64_t step_work() const {
    return 1 + rows_.count(sequence_.batch) * width_ * blocks_.size() *
                   (problem_.shape.input_size + hidden_);
  }
  void arrive_for(std::int64_t times) {
    while (times-- > 0) barrier_.arrive(rank_);
  }
  void synchronise() {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
  }

  T* h(int parity) const { return scratch_ + layout_.h + parity * sequence_.batch * hidden_; }
  static void copy(const T* from, T* to, std::int64_t b, std::int64_t size) {
    std::copy(from + b * size, from + (b + 1) * size, to + b * size);
  }
  // The initial states of own rows that start at a step.
  void start_rows(const StepRows& at, int parity) {
    const std::int64_t end = rows_.count(at.rows);
    for (std::int64_t i = share_.from(rows_.count(at.first_starting)); i < end; i += share_.step)
      copy_states(rows_.row(i), h(parity));
  }
  // Without steps the initial states are the final ones.
  void finish_untouched() {
    const std::int64_t end = rows_.count(sequence_.batch);
    for (std::int64_t i = share_.first; i < end; i += share_.step)
      copy_states(rows_.row(i), problem_.h_n);
  }
  void copy_states(std::int64_t b, T* to) const {
    copy(problem_.h0, to, b, hidden_);
    if constexpr (kCellStates > 0) copy(problem_.c0, problem_.c_n, b, kCellStates * hidden_);
  }

  // Rows of a block in gates_x: those of a chunk of steps, or of one step.
  std::int64_t block_stride() const {
    return (plan_.input_fused ? sequence_.batch : plan_.chunk_rows) * width_;
  }
  T* pre(const StepRows& at, std::int64_t block, std::int64_t b) const {
    const std::int64_t row = plan_.input_fused ? b : at.first + b - chunk_first_row_;
    return scratch_ + layout_.gates_x + block * block_stride() + row * width_;
  }
  void copy_bias(std::int64_t block, T* to) const {
    const T* bias = panels_.bias(block);
    for (std::int64_t i = 0; i < width_; i += kLanes) Vec::load(bias + i).store(to + i);
  }
  // Writes the bias and x w_ih of `count` rows, `apart` rows apart, from a row of x on.
  void multiply_input(std::int64_t block, std::int64_t row, std::int64_t apart, int count, T* to) {
    for (int m = 0; m < count; ++m) copy_bias(block, to + m * apart * width_);
    panels_.w_ih.multiply(block, count, problem_.x + row * problem_.x_stride,
                          apart * problem_.x_stride, to, apart * width_, columns_x_);
  }

  // The input product of own blocks for the steps from k on that fit in a chunk. Returns the first
  // step after them.
  std::int64_t project_ahead(std::int64_t k) {
    const std::int64_t end = sequence_.chunk_end(k, plan_.chunk_rows);
    const RowRange chunk = sequence_.rows_between(k, end);
    chunk_first_row_ = chunk.first;
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      T* to = scratch_ + layout_.gates_x + block * block_stride();
      for_each_tile(chunk.first, chunk.first + chunk.count, panels_.w_ih.tile_height(),
                    [&](std::int64_t row, int count) {
                      multiply_input(block, row, 1, count, to + (row - chunk.first) * width_);
                    });
    }
    return end;
  }

  void multiply(const StepRows& at, std::int64_t own, int parity) {
    const int height = std::min(panels_.w_ih.tile_height(), panels_.w_hh.tile_height());
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for_each_tile(0, own, height, [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first), apart = rows_.stride;
        T* to = pre(at, block, row);
        if (plan_.input_fused) multiply_input(block, at.first + row, apart, count, to);
        panels_.w_hh.multiply(block, count, h(parity) + row * hidden_, apart * hidden_, to,
                              apart * width_, columns_h_);
      });
    }
  }

  void compute_row(const StepRows& at, std::int64_t b, int parity) const {
    const std::int64_t n = at.first + b;
    T* scratch = scratch_ + layout_.rows + rank_ * layout_.row_size;
    ForwardRow<Cell, T> row;
    row.hidden = hidden_;
    row.buffers = scratch;
    row.buffer_stride = panel_layout_.unit_blocks * panel_layout_.unit_block;
    row.pre = pre(at, 0, b);
    row.block_stride = block_stride();
    row.unit_block = panel_layout_.unit_block;
    row.h_before = h(parity) + b * hidden_;
    row.parameters = problem_.weights.w_unit;
    row.saved = problem_.saved != nullptr ? problem_.saved + n * Cell::kSaved * hidden_
                                          : scratch + Cell::kForwardBuffers * row.buffer_stride;
    row.h_after = h(1 - parity) + b * hidden_;
    row.y = problem_.y + n * problem_.y_stride;
    row.h_n = at.ends(b) ? problem_.h_n + b * hidden_ : nullptr;
    row.c = kCellStates > 0 ? problem_.c_n + b * kCellStates * hidden_ : nullptr;
    forward_row(row);
  }

  const LayerForward<T, T>& problem_;
  const Sequence& sequence_;
  const Plan& plan_;
  const Panels panels_;
  const PanelLayout& panel_layout_;
  const ForwardLayout& layout_;
  T* const scratch_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const std::int64_t hidden_;
  const std::int64_t width_;  // Q*U: a row of a block
  const OwnRows rows_;
  const RowShare share_;
  const IndexRange blocks_;
  const Columns columns_x_, columns_h_;
  std::int64_t chunk_first_row_ = 0;
};

FASTRNN_KERNELS_END
