// RecurrenceBackward: the backward time loop of problem/recurrence.h by one rank, from the last
// step to the first, in two parts as forward:
//
//   whole rows       d_pre_x, d_a, and what reaches h and c around w_hh       -> barrier
//   units of w_hh    d_a w_hh, which the step before multiplies by mask_h     -> barrier
//
// With x^ = (x - mean) scale, layer norm v = gain x^ + bias of n values has the gradients
//   d_gain = d_v x^    d_bias = d_v    d_x = scale (d - mean(d) - x^ mean(d x^)),    d = gain d_v
#pragma once

#include "cpu/kernels/recurrence/rows.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
class RecurrenceBackward {
 public:
  RecurrenceBackward(const RecurrenceGradients<T>& problem, const Plan& plan,
                     const RecurrenceBackwardLayout& layout, T* workspace, Team& team, int rank)
      : problem_(problem),
        parts_(problem.parts),
        sequence_(problem.shape.sequence),
        plan_(plan),
        layout_(layout),
        kept_(cell_info(problem.shape.cell), problem.shape.hidden_size, parts_.gain_h != nullptr,
              parts_.zone_h != nullptr, parts_.zone_c != nullptr, parts_.clip_c != nullptr),
        workspace_(workspace),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        hidden_(problem.shape.hidden_size),
        rows_(sequence_, rank / plan.unit_groups, plan.row_groups),
        share_(plan, rank),
        blocks_(layout_.out_blocks, rank % plan.unit_groups, plan.unit_groups),
        columns_(kZero, 1, plan.back_vectors, kLanes),
        w_hh_({parts_.w_hh, hidden_, false, 1, hidden_, Cell::kGates * hidden_},
              workspace + layout_.panels, plan.back_vectors, true) {}

  void run() {
    const std::int64_t steps = sequence_.steps;
    w_hh_.pack(blocks_.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    std::fill(sums(rank_), sums(rank_) + 2 * layout_.sums_size, T(0));
    if (steps == 0) begin_rows(0, rows_.count(sequence_.batch));
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = steps - 1; k >= 0; --k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(2 * (k + 1) + 1);
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      begin_rows(rows_.count(at.first_ending), own);
      for (std::int64_t i = share_.first; i < own; i += share_.step) compute_row(at, rows_.row(i));
      synchronise();
      multiply(at, own);
      synchronise();
    }
    finish_rows();
    flush_sums();
    barrier_.arrive(rank_);
    if (rank_ != 0) return;
    barrier_.wait(rank_, 0, plan_.threads);
    add_sums();
  }

 protected:
  using Vec = Pack<T>;
  using Halves = cells::HalvesOf<Cell>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kZero[] = {0};
  static constexpr int kRowsPerSum = 64;  // limits the rounding error of sums over all rows

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

  T* products(std::int64_t b) const { return workspace_ + layout_.products + b * layout_.padded; }
  T* direct(std::int64_t b) const { return workspace_ + layout_.direct + b * layout_.padded; }
  // Of the last rows; those of all rows before follow.
  T* sums(int rank) const { return workspace_ + layout_.sums + rank * 2 * layout_.sums_size; }

  // Own rows from the i-th to before the end-th start with the gradients of the final states.
  void begin_rows(std::int64_t i, std::int64_t end) {
    for (i = share_.from(i); i < end; i += share_.step) {
      const std::int64_t b = rows_.row(i), padded = layout_.padded;
      std::fill(products(b), products(b) + padded, T(0));
      std::fill(direct(b) + hidden_, direct(b) + padded, T(0));
      load(problem_.d_h_n, b, direct(b));
      // d_c is kept in d_c0 between steps
      if constexpr (Cell::kStates > 1) load(problem_.d_c_n, b, problem_.d_c0 + b * hidden_);
    }
  }
  // Copies row b; null: zeros.
  void load(const T* from, std::int64_t b, T* to) const {
    if (from == nullptr)
      std::fill(to, to + hidden_, T(0));
    else
      std::copy(from + b * hidden_, from + (b + 1) * hidden_, to);
  }

  // The gradient at h of row b after the steps so far.
  FASTRNN_INLINE Vec gradient_at_h(std::int64_t b, std::int64_t unit, std::int64_t lanes) const {
    Vec product = Vec::load(products(b) + unit);
    if (parts_.mask_h != nullptr)
      product = product * Vec::load(parts_.mask_h + b * hidden_ + unit, lanes);
    return Vec::load(direct(b) + unit) + product;
  }
  void finish_rows() {
    const std::int64_t end = rows_.count(sequence_.batch);
    for (std::int64_t i = share_.first; i < end; i += share_.step) {
      const std::int64_t b = rows_.row(i);
      for (std::int64_t unit = 0; unit < hidden_; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden_ - unit);
        gradient_at_h(b, unit, lanes).store(problem_.d_h0 + b * hidden_ + unit, lanes);
      }
    }
  }

  void multiply(const StepRows& at, std::int64_t own) {
    const std::int64_t depth = Cell::kGates * hidden_, stride = rows_.stride * layout_.padded;
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for_each_tile(0, own, w_hh_.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        T* to = products(row) + block * layout_.out_block;
        for (int m = 0; m < count; ++m)
          for (std::int64_t j = 0; j < layout_.out_block; j += kLanes)
            Vec(T(0)).store(to + m * stride + j);
        w_hh_.multiply(block, count, problem_.d_a + (at.first + row) * depth, rows_.stride * depth,
                       to, stride, columns_);
      });
    }
  }

  void compute_row(const StepRows& at, std::int64_t b) {
    const std::int64_t n = at.first + b, hidden = hidden_;
    const RecurrenceParts<T> parts = parts_;
    const T* saved = problem_.saved + n * kept_.width;
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    if constexpr (Halves::kExist) {
      output_backward(at, b, saved);
      update_backward(at, b, saved);
    } else {
      for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
        Vec around, d_next[1] = {split(at, b, unit, lanes, around)};
        Vec values[cells::kSavedLength<Cell>], state[1] = {}, next[1] = {};
        for (int s = 0; s < Cell::kSaved; ++s)
          values[s] = Vec::load(saved + s * hidden + unit, lanes);
        if constexpr (Cell::kBackwardReadsH) state[0] = Vec::load(h_before + unit, lanes);
        if constexpr (Cell::kBackwardReadsNextH)
          next[0] = Vec::load(
              (parts.zone_h != nullptr ? saved + kept_.fresh : problem_.y + n * hidden) + unit,
              lanes);
        Vec d_pre[Cell::kPre], d_state[1] = {Vec(T(0))};
        Cell::backward(cells::StepGradientInputs<Vec>{values, state, next, d_next, nullptr},
                       cells::StepGradientOutputs<Vec>{d_pre, d_state, nullptr});
        if constexpr (Cell::kDirectPath) around = around + d_state[0];
        around.store(direct(b) + unit);
        store_gates(n, unit, lanes, d_pre);
      }
    }
    if (parts.gain_h != nullptr || parts.b_hh != nullptr || problem_.d_a != problem_.d_pre_x)
      normalisation_backward(n, saved);
    if (++rows_in_sum_ == kRowsPerSum) flush_sums();
  }

  // The hidden side is not the input side (GRU).
  static constexpr bool kSeparateSides = Cell::kPre != Cell::kGates;

  // The gradient at the cell's h' of row b. around: what zoneout passes to the state before.
  FASTRNN_INLINE Vec split(const StepRows& at, std::int64_t b, std::int64_t unit,
                           std::int64_t lanes, Vec& around) const {
    const std::int64_t n = at.first + b;
    Vec d_h = gradient_at_h(b, unit, lanes);
    if (problem_.d_y != nullptr) d_h = d_h + Vec::load(problem_.d_y + n * hidden_ + unit, lanes);
    if (parts_.zone_h == nullptr) {
      around = Vec(T(0));
      return d_h;
    }
    const Vec zone = Vec::load(parts_.zone_h + n * parts_.zone_h_stride + unit, lanes);
    around = zone * d_h;
    return (Vec(T(1)) - zone) * d_h;
  }

  // Stores the gradients of both sides; those of the hidden side at what is added to pre.
  FASTRNN_INLINE void store_gates(std::int64_t n, std::int64_t unit, std::int64_t lanes,
                                  const Vec* d_pre) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const std::int64_t column = (n * Cell::kGates + gate) * hidden_ + unit;
      d_pre[Cell::kPreX[gate]].store(problem_.d_pre_x + column, lanes);
      if constexpr (kSeparateSides) d_pre[Cell::kPreH[gate]].store(problem_.d_a + column, lanes);
    }
  }

  // From h' to o and to the normalised c'. Leaves d_pre_o in d_pre_x, the rest in the rank's row.
  void output_backward(const StepRows& at, std::int64_t b, const T* saved) {
    if constexpr (Halves::kExist) {
      const std::int64_t n = at.first + b, hidden = hidden_;
      const bool normalises = parts_.gain_c != nullptr;
      const T* c_row = saved + Cell::kSavedState * hidden;
      const T* o_row = saved + Halves::kOutputGate * hidden;
      T* d_o_row = problem_.d_pre_x + (n * Cell::kGates + Halves::kOutputGate) * hidden;
      T* d_row = rank_row();
      T* d_gain = sums(rank_) + 2 * Cell::kGates * hidden;
      T* d_bias = d_gain + hidden;
      const Vec mean(saved[kept_.statistics + 1]), scale(saved[kept_.statistics + 2]);
      Vec sum(T(0)), sum_x(T(0));
      for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
        Vec around, d_pre_o, d;
        const Vec d_h = split(at, b, unit, lanes, around);
        around.store(direct(b) + unit);
        const Vec o = Vec::load(o_row + unit, lanes);
        Vec normal = Vec::load(c_row + unit, lanes);
        if (normalises) {
          const Vec x = (normal - mean) * scale, gain = Vec::load(parts_.gain_c + unit, lanes);
          normal = x * gain;
          if (parts_.bias_c != nullptr) normal = normal + Vec::load(parts_.bias_c + unit, lanes);
          Halves::output_backward(o, normal, d_h, d_pre_o, d);
          add_to(d_gain + unit, d * x, lanes);
          add_to(d_bias + unit, d, lanes);
          d = d * gain;
          sum = sum + d;
          sum_x = sum_x + d * x;
        } else {
          Halves::output_backward(o, normal, d_h, d_pre_o, d);
        }
        d_pre_o.store(d_o_row + unit, lanes);
        d.store(d_row + unit, lanes);
      }
      if (!normalises) return;
      const Vec mean_d(sum.total() / T(hidden)), mean_dx(sum_x.total() / T(hidden));
      for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
        const Vec x = (Vec::load(c_row + unit, lanes) - mean) * scale;
        (scale * (Vec::load(d_row + unit, lanes) - mean_d - x * mean_dx))
            .store(d_row + unit, lanes);
      }
    }
  }

  // From c' to the other gates and to c.
  void update_backward(const StepRows& at, std::int64_t b, const T* saved) {
    if constexpr (Halves::kExist) {
      const std::int64_t n = at.first + b, hidden = hidden_;
      const std::int64_t state =
          parts_.zone_c != nullptr ? kept_.state : Cell::kSavedState * hidden;
      const T* c_before =
          at.state_before(b, problem_.saved + state, kept_.width, problem_.c0, hidden);
      T* d_c_row = problem_.d_c0 + b * hidden;
      const T* d_row = rank_row();
      for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
        Vec values[Cell::kSaved], d_pre[Cell::kPre];
        for (int s = 0; s < Cell::kSaved; ++s)
          values[s] = Vec::load(saved + s * hidden + unit, lanes);
        const std::int64_t o = (n * Cell::kGates + Halves::kOutputGate) * hidden + unit;
        d_pre[Halves::kOutputGate] = Vec::load(problem_.d_pre_x + o, lanes);
        Vec d_c = Vec::load(d_c_row + unit, lanes), around(T(0));
        if (parts_.zone_c != nullptr) {
          const Vec zone = Vec::load(parts_.zone_c + n * parts_.zone_c_stride + unit, lanes);
          around = zone * d_c;
          d_c = (Vec(T(1)) - zone) * d_c;
        }
        d_c = d_c + Vec::load(d_row + unit, lanes);
        if (parts_.clip_c != nullptr) {
          const Vec limit(*parts_.clip_c), zero(T(0));
          const Vec unclipped = Vec::load(saved + kept_.unclipped + unit, lanes);
          d_c = select(limit >= unclipped, select(unclipped >= -limit, d_c, zero), zero);
        }
        const Vec before = Vec::load(c_before + unit, lanes);
        (Halves::update_backward(values, before, d_c, d_pre) + around).store(d_c_row + unit, lanes);
        store_gates(n, unit, lanes, d_pre);
      }
    }
  }

  // From what is added to pre to a, both on the hidden side.
  void normalisation_backward(std::int64_t n, const T* saved) {
    normalisation_backward(n, saved, 0, Cell::kGates * hidden_, kept_.statistics);
  }
  // Of `width` columns from `first` on, whose 1/deviation is at saved[scale_at].
  FASTRNN_INLINE void normalisation_backward(std::int64_t n, const T* saved, std::int64_t first,
                                             std::int64_t width, std::int64_t scale_at) {
    const std::int64_t all = Cell::kGates * hidden_, row = n * all + first;
    const T* from = (kSeparateSides ? problem_.d_a : problem_.d_pre_x) + row;
    T* to = problem_.d_a + row;
    T* d_bias = sums(rank_) + first;
    T* d_gain = d_bias + all;
    if (parts_.gain_h == nullptr) {
      for (std::int64_t i = 0; i < width; i += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, width - i);
        const Vec d = Vec::load(from + i, lanes);
        add_to(d_bias + i, d, lanes);
        if (from != to) d.store(to + i, lanes);
      }
      return;
    }
    const T* x_row = saved + kept_.normalised + first;
    const T* gain_h = parts_.gain_h + first;
    Vec sum(T(0)), sum_x(T(0));
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, width - i);
      const Vec x = Vec::load(x_row + i, lanes), d_v = Vec::load(from + i, lanes);
      add_to(d_bias + i, d_v, lanes);
      add_to(d_gain + i, d_v * x, lanes);
      const Vec d = d_v * Vec::load(gain_h + i, lanes);
      sum = sum + d;
      sum_x = sum_x + d * x;
      d.store(to + i, lanes);
    }
    const Vec mean_d(sum.total() / T(width)), mean_dx(sum_x.total() / T(width));
    const Vec scale(saved[scale_at]);
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, width - i);
      const Vec x = Vec::load(x_row + i, lanes), d = Vec::load(to + i, lanes);
      (scale * (d - mean_d - x * mean_dx)).store(to + i, lanes);
    }
  }

  T* rank_row() const { return workspace_ + layout_.rank_row + rank_ * layout_.padded; }

  void flush_sums() {
    T* from = sums(rank_);
    T* to = from + layout_.sums_size;
    for (std::int64_t i = 0; i < layout_.sums_size; i += kLanes) {
      (Vec::load(to + i) + Vec::load(from + i)).store(to + i);
      Vec(T(0)).store(from + i);
    }
    rows_in_sum_ = 0;
  }
  void add_sums() {
    const std::int64_t count =
        recurrence_vectors(cell_info(problem_.shape.cell), problem_.shape.hidden_size);
    for (std::int64_t i = 0; i < count; ++i) {
      T sum = T(0);
      for (int rank = 0; rank < plan_.threads; ++rank) sum += sums(rank)[layout_.sums_size + i];
      problem_.d_vectors[i] = sum;
    }
  }

  const RecurrenceGradients<T>& problem_;
  const RecurrenceParts<T>& parts_;
  const Sequence& sequence_;
  const Plan& plan_;
  const RecurrenceBackwardLayout& layout_;
  const RecurrenceSaved kept_;
  T* const workspace_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const std::int64_t hidden_;
  const OwnRows rows_;
  const RowShare share_;
  const IndexRange blocks_;
  const Columns columns_;
  const WeightMatrix<T> w_hh_;
  int rows_in_sum_ = 0;
};

FASTRNN_KERNELS_END
