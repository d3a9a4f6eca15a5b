// The persistent schedule on the host: prepares the workspace of the kernels and launches them.
//
//   forward    clears the exchanges, copies h0 into the third slot (in rows that are reset before
//              the first step, the state after the reset), uploads the table of steps; for each
//              chunk of steps: gates_x = x w_ih^T and one launch
//   backward   clears the exchanges, uploads the table; one launch
//
// The code is a template over the machine, which offers `multiply` and `for_each` (stepwise.h) and
//
//   machine.clear(memory, bytes)
//   machine.upload(to, from, count)      copies small host data; does not wait, safe in a graph
//   machine.blocks_per_multiprocessor<Body>(bytes, chip)
//                                        blocks resident at once with so many bytes of shared
//                                        memory each; 0 if Body cannot run
//   machine.walk(body, blocks, bytes)    runs body(thread) on kWalkThreads threads per block, with
//                                        all blocks resident; only for a Body that
//                                        blocks_per_multiprocessor has prepared
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cuda/machine/workspace.h"
#include "cuda/schedules/persistent/backward.h"
#include "cuda/schedules/persistent/forward.h"
#include "cuda/schedules/persistent/plan.h"

namespace fastrnn::cuda {

// The table of steps that SegmentedSequence reads.
inline std::vector<Segment> segments_of(const LayerShape& shape) {
  std::vector<Segment> segments;
  for (std::int64_t t = 0; t < shape.sequence.steps; ++t) {
    if (segments.empty() || segments.back().rows != shape.sequence.rows(t))
      segments.push_back({t, shape.sequence.offset(t), shape.sequence.rows(t)});
  }
  segments.push_back({shape.sequence.steps, shape.sequence.total_rows(), 0});
  return segments;
}
// Upper bound of their number: each has at least one step and fewer rows than the one before it.
inline std::int64_t most_segments(const LayerShape& shape) {
  return std::min(shape.sequence.batch, shape.sequence.steps) + 1;
}

// An exchange (exchange.h) in the workspace, one per direction.
struct ExchangeLayout {
  std::size_t memory, arrived;  // offsets of the first direction's
  std::int64_t bytes, marks;    // per direction
  std::int64_t rows;
  int groups, writers;
};

// The workspace of a call, for both directions. The exchanges and their marks come first, so that
// one operation clears them.
struct PersistentLayout {
  ExchangeLayout exchange, projection_exchange;  // the second one is empty without a projection
  std::size_t cleared;                           // bytes from the start
  std::int64_t chunk;                            // rows
  std::size_t segments, c, d_h, gates_x, bytes;

  PersistentLayout(const LayerShape& shape, int directions, const Plan& plan, Pass pass)
      : projection_exchange{} {
    const Tiling& tiling = plan.tiling;
    const CellInfo& cell = cell_info(shape.cell);
    const bool is_forward = pass == Pass::kForward;
    const std::int64_t state = directions * shape.sequence.batch * shape.hidden_size;
    chunk = std::min(std::max(plan.chunk_rows, shape.sequence.batch), shape.sequence.total_rows());
    WorkspaceBuilder builder;
    const auto add_exchange = [&](int slots, std::int64_t groups, int writers) {
      ExchangeLayout added{};
      added.groups = int(groups);
      added.writers = writers;
      added.rows = std::int64_t(kRowTile) * tiling.row_tiles;
      added.bytes = slots * added.rows * groups * kGroupBytes;
      added.marks = std::int64_t(tiling.row_tiles) * writers;
      added.memory = builder.add<char>(directions * added.bytes);
      added.arrived = builder.add<std::uint64_t>(directions * added.marks);
      return added;
    };
    const int output_blocks = tiling.output_blocks, unit_blocks = tiling.unit_blocks;
    exchange = is_forward ? add_exchange(3, tiling.groups, output_blocks)
                          : add_exchange(2, tiling.groups, unit_blocks);
    if (tiling.projection_groups > 0)
      projection_exchange =
          add_exchange(2, tiling.projection_groups, is_forward ? unit_blocks : output_blocks);
    cleared = builder.bytes();
    segments = builder.add<Segment>(most_segments(shape));
    c = builder.add<float>(cell.cell_states() * state);
    d_h = builder.add<float>(is_forward ? 0 : state);
    gates_x =
        builder.add<float>(is_forward ? directions * chunk * cell.gates * shape.hidden_size : 0);
    bytes = builder.bytes();
  }
};

// h0 in the form that products read.
template <class Math, class S>
struct CopyOperand {
  const S* from;  // [B, R]
  S* to;          // [B, *], to_stride apart
  std::int64_t outputs, to_stride;

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    to[b * to_stride + j] = Math::operand(widen(from[b * outputs + j]));
  }
};

// h0 in this form, or the state after the reset in rows that are reset before the first step.
template <class Math, class S>
struct CopyFirstOperand {
  CopyOperand<Math, S> initial;
  ResetsOfStep<S> resets;

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    if (resets.mask[b] == 0) return initial(b, j);
    const float state = resets.h == nullptr ? 0 : widen(resets.h[b * initial.outputs + j]);
    initial.to[b * initial.to_stride + j] = Math::operand(state);
  }
};

// The types of the kernels.
template <class Cell, class S, class Math, int kUnits, bool kProjected, bool kResets>
using ForwardWalkOf = std::conditional_t<
    kResets,
    std::conditional_t<kProjected, ProjectedResetForwardWalk<Cell, S, Math, kUnits>,
                       ResetForwardWalk<Cell, S, Math, kUnits>>,
    std::conditional_t<kProjected, ProjectedForwardWalk<Cell, S, Math, kUnits>,
                       ForwardWalk<Cell, S, Math, kUnits>>>;
template <class Cell, class S, class Math, int kUnits, bool kProjected, bool kResets>
using BackwardWalkOf = std::conditional_t<
    kResets,
    std::conditional_t<kProjected, ProjectedResetBackwardWalk<Cell, S, Math, kUnits>,
                       ResetBackwardWalk<Cell, S, Math, kUnits>>,
    std::conditional_t<kProjected, ProjectedBackwardWalk<Cell, S, Math, kUnits>,
                       BackwardWalk<Cell, S, Math, kUnits>>>;

// Calls action.run<Cell, Math, kUnits, kProjected, kResets>() as the plan says.
template <class Cell, class S, bool kResets, class Action>
auto with_tiling(const Tiling& tiling, Action& action) {
  const auto with_math = [&](auto math, auto is_projected) {
    using Math = decltype(math);
    constexpr bool kProjected = decltype(is_projected)::value;
    return tiling.units == 8 ? action.template run<Cell, Math, 8, kProjected, kResets>()
                             : action.template run<Cell, Math, 16, kProjected, kResets>();
  };
  const auto with_projection = [&](auto is_projected) {
    if constexpr (!kResets || sizeof(S) == 4) {
      if (!tiling.tensor_cores) return with_math(CudaCores<S>{}, is_projected);
    }
    return with_math(TensorCores<S>{}, is_projected);
  };
  if constexpr (Cell::kProjects) {
    if (tiling.projection_groups > 0) return with_projection(std::true_type{});
  }
  return with_projection(std::false_type{});
}
template <CellKind kKind, class Cell, class S, class Action>
auto with_cell(const Plan& plan, Action& action) {
  if constexpr (has_reset_kernels(kKind)) {
    if (plan.has_resets) return with_tiling<Cell, S, true>(plan.tiling, action);
  }
  return with_tiling<Cell, S, false>(plan.tiling, action);
}
template <class S, class Action>
auto with_walk(CellKind cell, const Plan& plan, Action&& action) {
  switch (cell) {
#define FASTRNN_CELL(kind, name, type)                         \
  case CellKind::kind:                                         \
    if constexpr (has_persistent_kernels(CellKind::kind))      \
      return with_cell<CellKind::kind, type, S>(plan, action); \
    break;
    FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }
  throw std::logic_error("fastrnn: the persistent schedule has no kernels for this cell.");
}

// The number of blocks of a kernel that a multiprocessor holds.
template <class S, class Machine>
struct Residency {
  const Request& request;
  const Tiling& tiling;
  Machine& machine;

  template <class Cell, class Math, int kUnits, bool kProjected, bool kResets>
  int run() const {
    using Forward = ForwardWalkOf<Cell, S, Math, kUnits, kProjected, kResets>;
    using Backward = BackwardWalkOf<Cell, S, Math, kUnits, kProjected, kResets>;
    return request.pass == Pass::kForward ? machine.template blocks_per_multiprocessor<Forward>(
                                                tiling.shared_bytes, request.chip)
                                          : machine.template blocks_per_multiprocessor<Backward>(
                                                tiling.shared_bytes, request.chip);
  }
};

// The preparations that both passes share.
template <class S, class Problem, class Machine>
class PersistentPass {
 protected:
  PersistentPass(const Problem* problems, int directions, const Plan& plan, void* workspace,
                 Machine& machine, Pass pass)
      : problems_(problems),
        shape_(problems[0].shape),
        directions_(directions),
        plan_(plan),
        machine_(machine),
        layout_(shape_, directions, plan, pass),
        base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* part(std::size_t at) const {
    return reinterpret_cast<T*>(base_ + at);
  }

  WalkShape walk_shape() const {
    return {shape_.sequence.steps, shape_.hidden_size, shape_.output_size(),
            plan_.tiling.unit_blocks, plan_.tiling.row_groups};
  }

  Exchange exchange(const ExchangeLayout& layout, int direction) const {
    return {part<char>(layout.memory) + direction * layout.bytes,
            part<std::uint64_t>(layout.arrived) + direction * layout.marks, layout.rows,
            layout.groups, layout.writers};
  }
  // Sets the arguments that both passes have.
  void fill(DirectionArguments<S>& args, int direction) const {
    const Problem& problem = problems_[direction];
    args.reverse = problem.shape.sequence.reverse;
    args.segments = part<Segment>(layout_.segments);
    args.exchange = exchange(layout_.exchange, direction);
    args.w_hh = problem.weights.w_hh;
    args.w_hh_stride = problem.weights.w_hh_stride;
    args.h0 = problem.h0;
    args.c0 = problem.c0;
    args.y_stride = problem.y_stride;
    args.w_hr = problem.weights.w_hr;
    args.w_hr_stride = problem.weights.w_hr_stride;
    args.projection_exchange = exchange(layout_.projection_exchange, direction);
  }
  std::int64_t state_offset(int direction) const {
    return direction * shape_.sequence.batch * shape_.hidden_size;
  }
  // The running cell states of a direction, or their gradients: [B, C*H].
  float* cell_states(int direction) const {
    return part<float>(layout_.c) + cell_info(shape_.cell).cell_states() * state_offset(direction);
  }

  void prepare() {
    machine_.clear(base_, layout_.cleared);
    const std::vector<Segment> segments = segments_of(shape_);
    machine_.upload(part<Segment>(layout_.segments), segments.data(), segments.size());
  }
  template <class Walk>
  void walk(const Walk& body) {
    machine_.walk(body, plan_.tiling.blocks, plan_.tiling.shared_bytes);
  }

  const Problem* problems_;  // one per direction
  const LayerShape& shape_;
  int directions_;
  const Plan& plan_;
  Machine& machine_;
  PersistentLayout layout_;
  char* base_;
};

template <class S, class Machine>
class PersistentForward : PersistentPass<S, Forward<S>, Machine> {
  using Base = PersistentPass<S, Forward<S>, Machine>;

 public:
  PersistentForward(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                    Machine& machine)
      : Base(problems, directions, plan, workspace, machine, Pass::kForward) {}

  template <class Cell, class Math, int kUnits, bool kProjected, bool kResets>
  void run() {
    ForwardWalkOf<Cell, S, Math, kUnits, kProjected, kResets> body{};
    const std::int64_t batch = this->shape_.sequence.batch, outputs = this->shape_.output_size();
    body.shape = this->walk_shape();
    this->prepare();
    for (int d = 0; d < this->directions_; ++d) {
      const Forward<S>& problem = this->problems_[d];
      ForwardArguments<S>& args = body.arguments[d];
      this->fill(args, d);
      args.b_ih = problem.weights.b_ih;
      args.b_hh = problem.weights.b_hh;
      args.w_unit = problem.weights.w_unit;
      args.y = problem.y;
      args.h_n = problem.h_n;
      args.c_n = problem.c_n;
      args.saved = problem.saved;
      args.c = this->cell_states(d);
      args.gates_x = gates_x(d);
      S* initial = reinterpret_cast<S*>(args.exchange.initial());
      const CopyOperand<Math, S> copy{problem.h0, initial, outputs,
                                      args.exchange.row_bytes() / std::int64_t(sizeof(S))};
      if constexpr (kResets) {
        body.resets[d].states = problem.resets;
        const ResetsOfStep<S> first = body.resets[d].at(problem.shape.sequence.step(0), batch);
        this->machine_.for_each(batch, outputs, CopyFirstOperand<Math, S>{copy, first});
      } else {
        this->machine_.for_each(batch, outputs, copy);
      }
    }
    for (std::int64_t k = 0; k < this->shape_.sequence.steps; k = body.end) {
      body.begin = k;
      body.end = chunk_end(k);
      for (int d = 0; d < this->directions_; ++d)
        body.arguments[d].first_row = multiply_input(d, body.begin, body.end);
      this->walk(body);
    }
  }

 private:
  float* gates_x(int d) const {
    return this->template part<float>(this->layout_.gates_x) +
           d * this->layout_.chunk * cell_info(this->shape_.cell).gates * this->shape_.hidden_size;
  }

  // The end of the longest chunk whose rows fit into the workspace in every direction.
  std::int64_t chunk_end(std::int64_t begin) const {
    std::int64_t end = this->shape_.sequence.steps;
    for (int d = 0; d < this->directions_; ++d)
      end = std::min(end, this->problems_[d].shape.sequence.chunk_end(begin, this->layout_.chunk));
    return end;
  }

  // Returns the first row of the chunk, whose rows are contiguous.
  std::int64_t multiply_input(int d, std::int64_t begin, std::int64_t end) {
    const Forward<S>& problem = this->problems_[d];
    const RowRange chunk = problem.shape.sequence.rows_between(begin, end);
    this->machine_.multiply(input_product(problem, chunk.first, chunk.count, gates_x(d)));
    return chunk.first;
  }
};

template <class S, class Machine>
class PersistentBackward : PersistentPass<S, Backward<S>, Machine> {
  using Base = PersistentPass<S, Backward<S>, Machine>;

 public:
  PersistentBackward(const Backward<S>* problems, int directions, const Plan& plan, void* workspace,
                     Machine& machine)
      : Base(problems, directions, plan, workspace, machine, Pass::kBackward) {}

  template <class Cell, class Math, int kUnits, bool kProjected, bool kResets>
  void run() {
    BackwardWalkOf<Cell, S, Math, kUnits, kProjected, kResets> body{};
    body.shape = this->walk_shape();
    this->prepare();
    for (int d = 0; d < this->directions_; ++d) {
      const Backward<S>& problem = this->problems_[d];
      BackwardArguments<S>& args = body.arguments[d];
      this->fill(args, d);
      args.y = problem.y;
      args.saved = problem.saved;
      args.d_y = problem.d_y;
      args.d_y_stride = problem.d_y_stride;
      args.d_h_n = problem.d_h_n;
      args.d_c_n = problem.d_c_n;
      args.d_c_steps = problem.d_c_steps;
      args.d_pre = problem.d_pre;
      args.d_h_all = problem.d_h_all;
      args.d_h0 = problem.d_h0;
      args.d_c0 = problem.d_c0;
      args.d_h = this->template part<float>(this->layout_.d_h) + this->state_offset(d);
      args.d_c = this->cell_states(d);
      args.w_unit = problem.weights.w_unit;
      if constexpr (kResets)
        body.resets[d] = {problem.resets, problem.d_reset_h, problem.d_reset_c};
    }
    this->walk(body);
  }
};

template <class S>
std::size_t Persistent::workspace_bytes(const LayerShape& shape, int directions, const Plan& plan,
                                        Pass pass) {
  return PersistentLayout(shape, directions, plan, pass).bytes;
}

// Blocks wait for each other, so all of them must be resident at once.
template <class S, class Machine>
bool Persistent::can_launch(const Request& request, const Plan& plan, Machine& machine) {
  const int resident =
      with_walk<S>(request.shape.cell, plan, Residency<S, Machine>{request, plan.tiling, machine});
  return plan.tiling.blocks <= request.chip.multiprocessors * resident;
}

template <class S, class Machine>
void Persistent::forward(const Forward<S>* problems, int directions, const Plan& plan,
                         void* workspace, Machine& machine) {
  with_walk<S>(problems[0].shape.cell, plan,
               PersistentForward<S, Machine>(problems, directions, plan, workspace, machine));
}

template <class S, class Machine>
void Persistent::backward(const Backward<S>* problems, int directions, const Plan& plan,
                          void* workspace, Machine& machine) {
  with_walk<S>(problems[0].shape.cell, plan,
               PersistentBackward<S, Machine>(problems, directions, plan, workspace, machine));
}

}  // namespace fastrnn::cuda
