// RecurrenceForward: the forward time loop of problem/recurrence.h by one rank. A step has two
// parts with a barrier after each. In the first a rank multiplies its units of w_hh for all rows of
// its row group; in the second it computes whole rows, because layer norm needs all units of a row.
#pragma once

#include "cpu/kernels/recurrence/rows.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
class RecurrenceForward {
 public:
  RecurrenceForward(const Recurrence<T>& problem, const Plan& plan, const RecurrenceLayout& layout,
                    T* workspace, Team& team, int rank)
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
        blocks_(layout_.unit_blocks, rank % plan.unit_groups, plan.unit_groups),
        columns_(Cell::kPreH, Cell::kGates, plan.unit_vectors, kLanes),
        w_hh_({parts_.w_hh, hidden_, true, Cell::kGates, hidden_, hidden_},
              workspace + layout_.panels, plan.unit_vectors, true) {
    for (int gate = 0; gate < Cell::kGates; ++gate)
      for (int u = 0; u < plan.unit_vectors; ++u)
        columns_.at[gate * plan.unit_vectors + u] = int(gate * layout_.padded) + u * kLanes;
  }

  void run() {
    const std::int64_t steps = sequence_.steps;
    w_hh_.pack(blocks_.cut(rank_ / plan_.unit_groups, plan_.row_groups));
    if (steps > 0) start_rows(sequence_.at(sequence_.step(0)));
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    for (std::int64_t k = 0; k < steps; ++k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(2 * (steps - k));
      const StepRows at = sequence_.at(sequence_.step(k));
      const std::int64_t own = rows_.count(at.rows);
      multiply(own);
      synchronise();
      for (std::int64_t i = share_.first; i < own; i += share_.step) compute_row(at, rows_.row(i));
      if (k + 1 < steps) start_rows(sequence_.at(sequence_.step(k + 1)));
      synchronise();
    }
    if (steps == 0) finish_untouched();
  }

 protected:
  using Vec = Pack<T>;
  using Halves = cells::HalvesOf<Cell>;
  static constexpr int kLanes = Vec::kLanes;

  std::int64_t step_work() const {
    return 1 + rows_.count(sequence_.batch) * Cell::kGates * blocks_.size() * layout_.unit_block *
                   hidden_;
  }
  void arrive_for(std::int64_t times) {
    while (times-- > 0) barrier_.arrive(rank_);
  }
  void synchronise() {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
  }

  T* products(std::int64_t b) const {
    return workspace_ + layout_.products + b * Cell::kGates * layout_.padded;
  }
  T* operand(std::int64_t b) const { return workspace_ + layout_.operand + b * hidden_; }

  // The initial states of own rows that start at a step.
  void start_rows(const StepRows& at) {
    const std::int64_t end = rows_.count(at.rows);
    for (std::int64_t i = share_.from(rows_.count(at.first_starting)); i < end; i += share_.step) {
      const std::int64_t b = rows_.row(i);
      const T* h = problem_.h0 + b * hidden_;
      for (std::int64_t unit = 0; unit < hidden_; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden_ - unit);
        store_operand(Vec::load(h + unit, lanes), b, unit, lanes);
      }
      if constexpr (Cell::kStates > 1) copy(problem_.c0, problem_.c_n, b);
    }
  }
  void finish_untouched() {
    const std::int64_t end = rows_.count(sequence_.batch);
    for (std::int64_t i = share_.first; i < end; i += share_.step) {
      copy(problem_.h0, problem_.h_n, rows_.row(i));
      if constexpr (Cell::kStates > 1) copy(problem_.c0, problem_.c_n, rows_.row(i));
    }
  }
  void copy(const T* from, T* to, std::int64_t b) const {
    std::copy(from + b * hidden_, from + (b + 1) * hidden_, to + b * hidden_);
  }
  FASTRNN_INLINE void store_operand(Vec h, std::int64_t b, std::int64_t unit, std::int64_t lanes) {
    if (parts_.mask_h != nullptr) h = h * Vec::load(parts_.mask_h + b * hidden_ + unit, lanes);
    h.store(operand(b) + unit, lanes);
  }

  // w_hh h of own units for the first `own` rows of the row group.
  void multiply(std::int64_t own) {
    const std::int64_t stride = rows_.stride * Cell::kGates * layout_.padded;
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for_each_tile(0, own, w_hh_.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        T* to = products(row) + block * layout_.unit_block;
        for (int m = 0; m < count; ++m)
          for (int v = 0; v < Cell::kGates * plan_.unit_vectors; ++v)
            Vec(T(0)).store(to + m * stride + columns_.at[v]);
        w_hh_.multiply(block, count, operand(row), rows_.stride * hidden_, to, stride, columns_);
      });
    }
  }

  struct Statistics {
    T mean = T(0), scale = T(0);  // scale: 1 / deviation
  };
  // Of `count` vectors of H values each, `apart` values from one to the next.
  Statistics statistics(const T* from, int count, std::int64_t apart) const {
    Vec sum(T(0)), squares(T(0));
    const T values = T(count * hidden_);
    for (int i = 0; i < count; ++i)
      for (std::int64_t unit = 0; unit < hidden_; unit += kLanes)
        sum = sum + Vec::load(from + i * apart + unit, hidden_ - unit);
    const T mean = sum.total() / values;
    for (int i = 0; i < count; ++i)
      for (std::int64_t unit = 0; unit < hidden_; unit += kLanes) {
        const Vec d = first_lanes_of(Vec::load(from + i * apart + unit, hidden_ - unit) - Vec(mean),
                                     hidden_ - unit);
        squares = squares + d * d;
      }
    return {mean, T(1) / square_root(squares.total() / values + parts_.epsilon)};
  }

  // A step of one row. In the halves of a cell a first loop updates c, a second one computes h.
  void compute_row(const StepRows& at, std::int64_t b) {
    // Local copies: the compiler must assume that the stores below change any member.
    const std::int64_t n = at.first + b, hidden = hidden_, padded = layout_.padded;
    const RecurrenceParts<T> parts = parts_;
    const bool saves = problem_.saved != nullptr;
    T* saved_row = saves ? problem_.saved + n * kept_.width : nullptr;
    T* cell_saved = saves ? saved_row : workspace_ + layout_.rank_row + rank_ * layout_.row_size;
    const T* a = products(b);
    const T* x = problem_.pre_x + n * Cell::kGates * hidden;
    const T* h_before = at.state_before(b, problem_.y, hidden, problem_.h0, hidden);
    T* c = Cell::kStates > 1 ? problem_.c_n + b * hidden : nullptr;
    const Statistics of_a =
        parts.gain_h != nullptr ? statistics(a, Cell::kGates, padded) : Statistics{};
    for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      Vec pre[Cell::kPre];
      for (int q = 0; q < Cell::kPre; ++q) pre[q] = Vec(T(0));
      for (int gate = 0; gate < Cell::kGates; ++gate) {
        const std::int64_t column = gate * hidden + unit;
        Vec side = Vec::load(a + gate * padded + unit);
        if (parts.gain_h != nullptr) {
          side = (side - Vec(of_a.mean)) * Vec(of_a.scale);
          if (saves) side.store(saved_row + kept_.normalised + column, lanes);
          side = side * Vec::load(parts.gain_h + column, lanes);
        }
        if (parts.b_hh != nullptr) side = side + Vec::load(parts.b_hh + column, lanes);
        pre[Cell::kPreH[gate]] = pre[Cell::kPreH[gate]] + side;
        Vec side_x = Vec::load(x + column, lanes);
        if (parts.b_x != nullptr) side_x = side_x + Vec::load(parts.b_x + column, lanes);
        pre[Cell::kPreX[gate]] = pre[Cell::kPreX[gate]] + side_x;
      }
      Vec saved[cells::kSavedLength<Cell>];
      if constexpr (Halves::kExist) {
        const Vec before = Vec::load(c + unit, lanes);
        Vec next = Halves::update(pre, before, saved);
        if (parts.clip_c != nullptr) {
          if (saves) next.store(saved_row + kept_.unclipped + unit, lanes);
          next = cells::clamp(next, Vec(-*parts.clip_c), Vec(*parts.clip_c));
          saved[Cell::kSavedState] = next;
        }
        if (parts.zone_c != nullptr) {
          const Vec zone = Vec::load(parts.zone_c + n * parts.zone_c_stride + unit, lanes);
          next = zone * before + (Vec(T(1)) - zone) * next;
          if (saves) next.store(saved_row + kept_.state + unit, lanes);
        }
        next.store(c + unit, lanes);
      } else {
        Vec state[1] = {}, next_state[1];
        if constexpr (Cell::kForwardReadsH) state[0] = Vec::load(h_before + unit, lanes);
        Cell::forward(cells::StepInputs<Vec>{pre, state, nullptr},
                      cells::StepOutputs<Vec>{saved, next_state});
        store_h(at, b, unit, lanes, next_state[0], h_before, saved_row);
      }
      for (int s = 0; s < Cell::kSaved; ++s) saved[s].store(cell_saved + s * hidden + unit, lanes);
    }
    [[maybe_unused]] Statistics of_c;
    if constexpr (Halves::kExist) {
      const T* fresh = cell_saved + Cell::kSavedState * hidden;
      if (parts.gain_c != nullptr) of_c = statistics(fresh, 1, 0);
      for (std::int64_t unit = 0; unit < hidden; unit += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
        Vec normal = Vec::load(fresh + unit, lanes);
        if (parts.gain_c != nullptr) {
          normal = (normal - Vec(of_c.mean)) * Vec(of_c.scale);
          normal = normal * Vec::load(parts.gain_c + unit, lanes);
          if (parts.bias_c != nullptr) normal = normal + Vec::load(parts.bias_c + unit, lanes);
        }
        const Vec o = Vec::load(cell_saved + Halves::kOutputGate * hidden + unit, lanes);
        store_h(at, b, unit, lanes, Halves::output(o, normal), h_before, saved_row);
      }
    }
    if (saves) {
      T* to = saved_row + kept_.statistics;
      to[0] = of_a.scale, to[1] = of_c.mean, to[2] = of_c.scale;
    }
  }

  // Stores h after a step, which the next one multiplies, from the cell's h'.
  FASTRNN_INLINE void store_h(const StepRows& at, std::int64_t b, std::int64_t unit,
                              std::int64_t lanes, Vec h, const T* h_before, T* saved_row) {
    const std::int64_t n = at.first + b;
    if (parts_.zone_h != nullptr) {
      if (Cell::kSaved == 0 && saved_row != nullptr) h.store(saved_row + kept_.fresh + unit, lanes);
      const Vec zone = Vec::load(parts_.zone_h + n * parts_.zone_h_stride + unit, lanes);
      h = zone * Vec::load(h_before + unit, lanes) + (Vec(T(1)) - zone) * h;
    }
    h.store(problem_.y + n * hidden_ + unit, lanes);
    if (at.ends(b)) h.store(problem_.h_n + b * hidden_ + unit, lanes);
    store_operand(h, b, unit, lanes);
  }

  const Recurrence<T>& problem_;
  const RecurrenceParts<T>& parts_;
  const Sequence& sequence_;
  const Plan& plan_;
  const RecurrenceLayout& layout_;
  const RecurrenceSaved kept_;
  T* const workspace_;
  Team& team_;
  Barrier& barrier_;
  const int rank_, group_first_;
  const std::int64_t hidden_;
  const OwnRows rows_;
  const RowShare share_;
  const IndexRange blocks_;
  Columns columns_;
  const WeightMatrix<T> w_hh_;
};

FASTRNN_KERNELS_END
