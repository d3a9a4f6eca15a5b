// The persistent schedule: what is prepared for its walks (walk.h), and their launch.
//
//   forward    the exchange is cleared, h0 put into its third slot, the table of steps written;
//              gates_x = x w_ih^T for a chunk of many steps, one launch for its steps; next chunk
//   backward   the exchange is cleared, the table written; one launch
//
// The text is a template over the machine, as the stepwise schedule's; beside `multiply` and
// `for_each` it brings
//
//   machine.clear(memory, bytes)
//   machine.upload(to, from, count)      small host data, without waiting and safe in a graph
//   machine.blocks_a_multiprocessor<Body>(bytes, chip)
//                                        that are resident at once with so many bytes of shared
//                                        memory each; 0 where Body cannot run
//   machine.walk(body, blocks, bytes)    body(thread), kWalkThreads a block, all blocks resident;
//                                        Body has been asked about before
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

// The steps of a layer, for SegmentedSequence.
inline std::vector<Segment> segments_of(const LayerShape& shape) {
  std::vector<Segment> segments;
  for (std::int64_t t = 0; t < shape.sequence.steps; ++t) {
    if (segments.empty() || segments.back().rows != shape.sequence.rows(t))
      segments.push_back({t, shape.sequence.offset(t), shape.sequence.rows(t)});
  }
  segments.push_back({shape.sequence.steps, shape.sequence.total_rows(), 0});
  return segments;
}
// No more than these: a segment has fewer rows than the one before it, and at least one step.
inline std::int64_t most_segments(const LayerShape& shape) {
  return std::min(shape.sequence.batch, shape.sequence.steps) + 1;
}

// Where everything lies in the workspace, for both directions. The exchanges and their marks of
// arrival come first, to be cleared at once.
struct PersistentLayout {
  std::int64_t first_bytes, first_marks;    // of a direction's exchange,
  std::int64_t second_bytes, second_marks;  // and of the second one with a projection
  std::int64_t chunk;                       // rows
  std::size_t first, first_arrived, second, second_arrived, cleared;
  std::size_t segments, c, d_h, gates_x, bytes;

  PersistentLayout(const LayerShape& shape, int directions, const Plan& plan, Pass pass) {
    const Tiling& tiling = plan.tiling;
    const CellInfo& cell = cell_info(shape.cell);
    const bool is_forward = pass == Pass::kForward;
    const std::int64_t state = directions * shape.sequence.batch * shape.hidden_size;
    const std::int64_t rows = std::int64_t(kRowTile) * tiling.row_tiles;
    first_bytes = (is_forward ? 3 : 2) * rows * tiling.groups * kGroupBytes;
    second_bytes = 2 * rows * tiling.second_groups * kGroupBytes;
    first_marks =
        std::int64_t(tiling.row_tiles) * (is_forward ? tiling.output_blocks : tiling.unit_blocks);
    second_marks =
        std::int64_t(tiling.row_tiles) * (is_forward ? tiling.unit_blocks : tiling.output_blocks);
    if (tiling.second_groups == 0) second_marks = 0;
    chunk = std::min(std::max(plan.chunk_rows, shape.sequence.batch), shape.sequence.total_rows());
    Parts parts;
    first = parts.add<char>(directions * first_bytes);
    first_arrived = parts.add<std::uint64_t>(directions * first_marks);
    second = parts.add<char>(directions * second_bytes);
    second_arrived = parts.add<std::uint64_t>(directions * second_marks);
    cleared = parts.bytes();
    segments = parts.add<Segment>(most_segments(shape));
    c = parts.add<float>(cell.states == 2 ? state : 0);
    d_h = parts.add<float>(is_forward ? 0 : state);
    gates_x =
        parts.add<float>(is_forward ? directions * chunk * cell.gates * shape.hidden_size : 0);
    bytes = parts.bytes();
  }
};

// h0 as it is multiplied.
template <class Math, class S>
struct CopyOperand {
  const S* from;  // [B, R]
  S* to;          // [B, *], to_stride apart
  std::int64_t outputs, to_stride;

  FASTRNN_HD void operator()(std::int64_t b, std::int64_t j) const {
    to[b * to_stride + j] = Math::operand(widen(from[b * outputs + j]));
  }
};

// The kernels' types.
template <class Cell, class S, class Math, int kUnits, bool kProjected>
using ForwardWalkOf = std::conditional_t<kProjected, ProjectedForwardWalk<Cell, S, Math, kUnits>,
                                         ForwardWalk<Cell, S, Math, kUnits>>;
template <class Cell, class S, class Math, int kUnits, bool kProjected>
using BackwardWalkOf = std::conditional_t<kProjected, ProjectedBackwardWalk<Cell, S, Math, kUnits>,
                                          BackwardWalk<Cell, S, Math, kUnits>>;

// Calls action.run<Cell, Math, kUnits, kProjected>() with what the tiling names.
template <class Cell, class S, class Action>
auto with_tiling(const Tiling& tiling, Action& action) {
  const auto with_math = [&](auto math, auto is_projected) {
    using Math = decltype(math);
    constexpr bool kProjected = decltype(is_projected)::value;
    return tiling.units == 8 ? action.template run<Cell, Math, 8, kProjected>()
                             : action.template run<Cell, Math, 16, kProjected>();
  };
  const auto with_projection = [&](auto is_projected) {
    return tiling.tensor_cores ? with_math(TensorCores<S>{}, is_projected)
                               : with_math(CudaCores<S>{}, is_projected);
  };
  if constexpr (Cell::kStates == 2) {
    if (tiling.second_groups > 0) return with_projection(std::true_type{});
  }
  return with_projection(std::false_type{});
}
template <class S, class Action>
auto with_walk(CellKind cell, const Tiling& tiling, Action&& action) {
  switch (cell) {
#define FASTRNN_CELL(kind, name, type) \
  case CellKind::kind:                 \
    return with_tiling<type, S>(tiling, action);
    FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }
  throw std::logic_error("fastrnn: no such cell.");
}

// How many blocks of a walk a multiprocessor holds.
template <class S, class Machine>
struct Residency {
  const Request& request;
  const Tiling& tiling;
  Machine& machine;

  template <class Cell, class Math, int kUnits, bool kProjected>
  int run() const {
    using Forward = ForwardWalkOf<Cell, S, Math, kUnits, kProjected>;
    using Backward = BackwardWalkOf<Cell, S, Math, kUnits, kProjected>;
    return request.pass == Pass::kForward ? machine.template blocks_a_multiprocessor<Forward>(
                                                tiling.shared_bytes, request.chip)
                                          : machine.template blocks_a_multiprocessor<Backward>(
                                                tiling.shared_bytes, request.chip);
  }
};

// What both passes prepare alike.
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
        at_(shape_, directions, plan, pass),
        base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* part(std::size_t at) const {
    return reinterpret_cast<T*>(base_ + at);
  }

  WalkShape walk_shape() const {
    return {shape_.sequence.steps, shape_.hidden_size, shape_.output_size(),
            plan_.tiling.unit_blocks, plan_.tiling.row_groups};
  }

  Exchange exchange(std::size_t memory, std::int64_t bytes, std::size_t arrived, std::int64_t marks,
                    std::int64_t groups, int direction) const {
    return {part<char>(memory) + direction * bytes,
            part<std::uint64_t>(arrived) + direction * marks,
            std::int64_t(kRowTile) * plan_.tiling.row_tiles, int(groups),
            int(marks / plan_.tiling.row_tiles)};
  }
  void fill_side(WalkSide<S>& side, int d) const {
    const Problem& p = problems_[d];
    side.reverse = p.shape.sequence.reverse;
    side.segments = part<Segment>(at_.segments);
    side.exchange = exchange(at_.first, at_.first_bytes, at_.first_arrived, at_.first_marks,
                             plan_.tiling.groups, d);
    side.w_hh = p.weights.w_hh;
    side.w_hh_stride = p.weights.w_hh_stride;
    side.h0 = p.h0;
    side.c0 = p.c0;
    side.y_stride = p.y_stride;
    side.w_hr = p.weights.w_hr;
    side.w_hr_stride = p.weights.w_hr_stride;
    side.projection_exchange = exchange(at_.second, at_.second_bytes, at_.second_arrived,
                                        at_.second_marks, plan_.tiling.second_groups, d);
  }
  std::int64_t state_offset(int direction) const {
    return direction * shape_.sequence.batch * shape_.hidden_size;
  }

  void prepare() {
    machine_.clear(base_, at_.cleared);
    const std::vector<Segment> segments = segments_of(shape_);
    machine_.upload(part<Segment>(at_.segments), segments.data(), segments.size());
  }
  template <class Walk>
  void walk(const Walk& body) {
    machine_.walk(body, plan_.tiling.blocks, plan_.tiling.shared_bytes);
  }

  const Problem* problems_;  // one a direction
  const LayerShape& shape_;
  int directions_;
  const Plan& plan_;
  Machine& machine_;
  PersistentLayout at_;
  char* base_;
};

template <class S, class Machine>
class PersistentForward : PersistentPass<S, Forward<S>, Machine> {
  using Base = PersistentPass<S, Forward<S>, Machine>;

 public:
  PersistentForward(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                    Machine& machine)
      : Base(problems, directions, plan, workspace, machine, Pass::kForward) {}

  template <class Cell, class Math, int kUnits, bool kProjected>
  void run() {
    ForwardWalkOf<Cell, S, Math, kUnits, kProjected> body{};
    const std::int64_t batch = this->shape_.sequence.batch, outputs = this->shape_.output_size();
    body.shape = this->walk_shape();
    this->prepare();
    for (int d = 0; d < this->directions_; ++d) {
      const Forward<S>& p = this->problems_[d];
      ForwardSide<S>& side = body.side[d];
      this->fill_side(side, d);
      side.b_ih = p.weights.b_ih;
      side.b_hh = p.weights.b_hh;
      side.y = p.y;
      side.h_n = p.h_n;
      side.c_n = p.c_n;
      side.saved = p.saved;
      side.c = this->template part<float>(this->at_.c) + this->state_offset(d);
      side.gates_x = gates_x(d);
      S* initial = reinterpret_cast<S*>(side.exchange.initial());
      this->machine_.for_each(
          batch, outputs,
          CopyOperand<Math, S>{p.h0, initial, outputs,
                               side.exchange.row_bytes() / std::int64_t(sizeof(S))});
    }
    for (std::int64_t k = 0; k < this->shape_.sequence.steps; k = body.end) {
      body.begin = k;
      body.end = chunk_end(k);
      for (int d = 0; d < this->directions_; ++d)
        body.side[d].first_row = multiply_input(d, body.begin, body.end);
      this->walk(body);
    }
  }

 private:
  float* gates_x(int d) const {
    return this->template part<float>(this->at_.gates_x) +
           d * this->at_.chunk * cell_info(this->shape_.cell).gates * this->shape_.hidden_size;
  }

  // The first step after a chunk whose rows fit the workspace in every direction.
  std::int64_t chunk_end(std::int64_t begin) const {
    std::int64_t end = this->shape_.sequence.steps;
    for (int d = 0; d < this->directions_; ++d)
      end = std::min(end, this->problems_[d].shape.sequence.chunk_end(begin, this->at_.chunk));
    return end;
  }

  // Returns the first of the chunk's rows, which lie together.
  std::int64_t multiply_input(int d, std::int64_t begin, std::int64_t end) {
    const Forward<S>& p = this->problems_[d];
    const RowRange chunk = p.shape.sequence.rows_between(begin, end);
    this->machine_.multiply(input_product(p, chunk.first, chunk.count, gates_x(d)));
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

  template <class Cell, class Math, int kUnits, bool kProjected>
  void run() {
    BackwardWalkOf<Cell, S, Math, kUnits, kProjected> body{};
    body.shape = this->walk_shape();
    this->prepare();
    for (int d = 0; d < this->directions_; ++d) {
      const Backward<S>& p = this->problems_[d];
      BackwardSide<S>& side = body.side[d];
      this->fill_side(side, d);
      side.y = p.y;
      side.saved = p.saved;
      side.d_y = p.d_y;
      side.d_y_stride = p.d_y_stride;
      side.d_h_n = p.d_h_n;
      side.d_c_n = p.d_c_n;
      side.d_pre = p.d_pre;
      side.d_h_all = p.d_h_all;
      side.d_h0 = p.d_h0;
      side.d_c0 = p.d_c0;
      side.d_h = this->template part<float>(this->at_.d_h) + this->state_offset(d);
      side.d_c = this->template part<float>(this->at_.c) + this->state_offset(d);
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
  const int resident = with_walk<S>(request.shape.cell, plan.tiling,
                                    Residency<S, Machine>{request, plan.tiling, machine});
  return plan.tiling.blocks <= request.chip.multiprocessors * resident;
}

template <class S, class Machine>
void Persistent::forward(const Forward<S>* problems, int directions, const Plan& plan,
                         void* workspace, Machine& machine) {
  with_walk<S>(problems[0].shape.cell, plan.tiling,
               PersistentForward<S, Machine>(problems, directions, plan, workspace, machine));
}

template <class S, class Machine>
void Persistent::backward(const Backward<S>* problems, int directions, const Plan& plan,
                          void* workspace, Machine& machine) {
  with_walk<S>(problems[0].shape.cell, plan.tiling,
               PersistentBackward<S, Machine>(problems, directions, plan, workspace, machine));
}

}  // namespace fastrnn::cuda
