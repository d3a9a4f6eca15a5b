// The stepwise schedule: every step is a matrix product and then a pointwise part, queued on one
// stream.
//
//   forward   gates_x = x w_ih^T                  for a chunk of many steps at once
//             for t:  gates_h = h w_hh^T          h: rows of y of the step before, or of h0
//                     (h', c') = cell             [with a projection y_t = h' w_hr^T]
//
//   backward  for t:  dh = d_h + d_y_t            [with a projection: d_h_all; dh' = dh w_hr]
//                     d_pre_t, d_c, d_h = cell    d_h: direct part of the gradient at h
//                     d_h += d_pre_t[hidden side] w_hh
//
// Rows of different lengths need no masks: the active rows of a step are its first ones. The
// pointwise part reads h0 and c0 for rows that start at the step, and writes h_n and c_n of rows
// that end there. Inactive rows keep their running values.
//
// With resets, a pointwise part before each step gathers the states that the step reads (`before`),
// and backward one after each step takes the gradients at the states after a reset away.
//
// The code is a template over the machine, which offers two operations:
//
//   machine.multiply(product)               c = a w  or  c += a w
//   machine.for_each(rows, columns, body)   body(row, column) for all, in any order
//
// machine/gpu.cuh has the GPU; the tests have a machine of plain loops.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/machine/product.h"
#include "cuda/machine/workspace.h"
#include "cuda/schedules/step.h"
#include "cuda/schedules/stepwise/plan.h"

namespace fastrnn::cuda {

template <class S>
struct StepwiseForwardLayout {
  std::size_t gates_x, gates_h, c, unprojected, before, bytes;

  StepwiseForwardLayout(const LayerShape& shape, const Plan& plan) {
    using A = Accumulate<S>;
    const CellInfo& cell = cell_info(shape.cell);
    const std::int64_t width = cell.gates * shape.hidden_size;
    WorkspaceBuilder builder;
    const std::int64_t chunk =
        std::min(std::max(plan.chunk_rows, shape.sequence.batch), shape.sequence.total_rows());
    gates_x = builder.add<A>(chunk * width);
    gates_h = builder.add<A>(cell.dense ? shape.sequence.batch * width : 0);
    c = builder.add<A>(shape.sequence.batch * cell.cell_states() * shape.hidden_size);
    unprojected =
        builder.add<S>(shape.proj_size > 0 ? shape.sequence.batch * shape.hidden_size : 0);
    before = builder.add<S>(plan.has_resets ? shape.sequence.batch * shape.output_size() : 0);
    bytes = builder.bytes();
  }
};

template <class S>
struct StepwiseBackwardLayout {
  std::size_t d_h, d_c, d_unprojected, before, saved_before, bytes;

  StepwiseBackwardLayout(const LayerShape& shape, const Plan& plan) {
    using A = Accumulate<S>;
    const CellInfo& cell = cell_info(shape.cell);
    WorkspaceBuilder builder;
    d_h = builder.add<A>(shape.sequence.batch * shape.output_size());
    d_c = builder.add<A>(shape.sequence.batch * cell.cell_states() * shape.hidden_size);
    d_unprojected =
        builder.add<A>(shape.proj_size > 0 ? shape.sequence.batch * shape.hidden_size : 0);
    before = builder.add<S>(plan.has_resets ? shape.sequence.batch * shape.output_size() : 0);
    saved_before =
        builder.add<A>(plan.has_resets ? shape.sequence.batch * cell.saved * shape.hidden_size : 0);
    bytes = builder.bytes();
  }
};

template <class Cell, class S, class Machine>
class StepwiseForward {
 public:
  StepwiseForward(const Forward<S>& problem, const Plan& plan, void* workspace, Machine& machine)
      : problem_(problem), shape_(problem.shape), plan_(plan), machine_(machine) {
    const StepwiseForwardLayout<S> at(shape_, plan);
    char* base = static_cast<char*>(workspace);
    gates_x_ = reinterpret_cast<A*>(base + at.gates_x);
    gates_h_ = reinterpret_cast<A*>(base + at.gates_h);
    c_ = reinterpret_cast<A*>(base + at.c);
    unprojected_ = reinterpret_cast<S*>(base + at.unprojected);
    before_ = reinterpret_cast<S*>(base + at.before);
  }

  void run() {
    if (shape_.sequence.steps == 0) {
      copy(problem_.h0, problem_.h_n, shape_.sequence.batch, shape_.output_size());
      if constexpr (Cell::kStates > 1)
        copy(problem_.c0, problem_.c_n, shape_.sequence.batch,
             cells::kCellStates<Cell> * shape_.hidden_size);
    }
    for (std::int64_t k = 0; k < shape_.sequence.steps;) {
      const std::int64_t end = shape_.sequence.chunk_end(k, plan_.chunk_rows);
      const RowRange chunk = shape_.sequence.rows_between(k, end);
      machine_.multiply(input_product(problem_, chunk.first, chunk.count, gates_x_));
      for (; k < end; ++k) {
        const StepRows at = shape_.sequence.at(shape_.sequence.step(k));
        step(at, gates_x_ + (at.first - chunk.first) * width());
      }
    }
  }

 private:
  using A = Accumulate<S>;

  std::int64_t width() const { return Cell::kGates * shape_.hidden_size; }
  bool is_projected() const { return shape_.proj_size > 0; }
  S* y_row(std::int64_t row) const { return problem_.y + row * problem_.y_stride; }

  // Writes gates_h of the rows [begin, end), whose states are at h.
  void multiply_state(const S* h, std::int64_t h_stride, std::int64_t begin, std::int64_t end) {
    machine_.multiply(Product<S, A>{end - begin, width(), shape_.output_size(), h, h_stride,
                                    problem_.weights.w_hh, problem_.weights.w_hh_stride, true,
                                    gates_h_ + begin * width(), width(), false});
  }

  // Gathers the states before a step, so that no row starts at it.
  StepRows gather_states(StepRows at) {
    const ResetsOfStep<S> resets(problem_.resets, at);
    const std::int64_t out = shape_.output_size();
    machine_.for_each(
        at.rows, out,
        StateBefore<S, S, S>{at, resets.mask, resets.h, problem_.h0, out, y_row(at.first_before),
                             problem_.y_stride, before_, out});
    if constexpr (Cell::kStates > 1) {
      const std::int64_t size = cells::kCellStates<Cell> * shape_.hidden_size;
      machine_.for_each(
          at.rows, size,
          StateBefore<S, A, A>{at, resets.mask, resets.c, problem_.c0, size, c_, size, c_, size});
    }
    at.first_starting = at.rows;
    return at;
  }

  void step(StepRows at, const A* gates_x) {
    const std::int64_t hidden = shape_.hidden_size, out = shape_.output_size();
    const S* before = y_row(at.first_before);
    std::int64_t before_stride = problem_.y_stride;
    if (plan_.has_resets) {
      at = gather_states(at);
      before = before_;
      before_stride = out;
    }
    if constexpr (Cell::kDenseRecurrence) {
      multiply_state(before, before_stride, 0, at.first_starting);
      multiply_state(problem_.h0 + at.first_starting * out, out, at.first_starting, at.rows);
    }

    ForwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.at = at;
    body.gates_x = gates_x;
    body.gates_h = gates_h_;
    body.b_ih = problem_.weights.b_ih;
    body.b_hh = problem_.weights.b_hh;
    body.w_unit = problem_.weights.w_unit;
    body.h_before = before;
    body.h_before_stride = before_stride;
    body.h0 = problem_.h0;
    body.c0 = problem_.c0;
    body.c = c_;
    body.h = is_projected() ? unprojected_ : y_row(at.first);
    body.h_stride = is_projected() ? hidden : problem_.y_stride;
    if (problem_.saved != nullptr) body.saved = problem_.saved + at.first * Cell::kSaved * hidden;
    if (!is_projected()) body.h_n = problem_.h_n;
    body.c_n = problem_.c_n;
    machine_.for_each(at.rows, hidden, body);

    if (is_projected()) {
      machine_.multiply(Product<S, S>{at.rows, out, hidden, unprojected_, hidden,
                                      problem_.weights.w_hr, problem_.weights.w_hr_stride, true,
                                      y_row(at.first), problem_.y_stride, false});
      machine_.for_each(at.rows - at.first_ending, out,
                        Copy<S, S>{y_row(at.first + at.first_ending), problem_.y_stride,
                                   problem_.h_n + at.first_ending * out, out});
    }
  }

  void copy(const S* from, S* to, std::int64_t rows, std::int64_t columns) {
    machine_.for_each(rows, columns, Copy<S, S>{from, columns, to, columns});
  }

  const Forward<S>& problem_;
  const LayerShape& shape_;
  const Plan& plan_;
  Machine& machine_;
  A *gates_x_, *gates_h_, *c_;
  S *unprojected_, *before_;
};

template <class Cell, class S, class Machine>
class StepwiseBackward {
 public:
  StepwiseBackward(const Backward<S>& problem, const Plan& plan, void* workspace, Machine& machine)
      : problem_(problem), shape_(problem.shape), plan_(plan), machine_(machine) {
    const StepwiseBackwardLayout<S> at(shape_, plan);
    char* base = static_cast<char*>(workspace);
    d_h_ = reinterpret_cast<A*>(base + at.d_h);
    d_c_ = reinterpret_cast<A*>(base + at.d_c);
    d_unprojected_ = reinterpret_cast<A*>(base + at.d_unprojected);
    before_ = reinterpret_cast<S*>(base + at.before);
    saved_before_ = reinterpret_cast<A*>(base + at.saved_before);
  }

  void run() {
    const std::int64_t out = shape_.output_size();
    const std::int64_t cell_width = cells::kCellStates<Cell> * shape_.hidden_size;
    for (std::int64_t k = shape_.sequence.steps - 1; k >= 0; --k)
      step(shape_.sequence.at(shape_.sequence.step(k)));
    if (shape_.sequence.steps > 0) {
      finish(d_h_, problem_.d_h0, out);
      if constexpr (Cell::kStates > 1) finish(d_c_, problem_.d_c0, cell_width);
    } else {
      finish(problem_.d_h_n, problem_.d_h0, out);
      if constexpr (Cell::kStates > 1) finish(problem_.d_c_n, problem_.d_c0, cell_width);
    }
  }

 private:
  using A = Accumulate<S>;

  bool is_projected() const { return shape_.proj_size > 0; }

  // Gathers the states before a step in the layout of y and saved, so that no row starts at it.
  void gather_states(BackwardStep<Cell, S>& body) {
    const StepRows at = body.at;
    const ResetsOfStep<S> resets(problem_.resets, at);
    if constexpr (Cell::kBackwardReadsH) {
      const std::int64_t out = shape_.output_size();
      machine_.for_each(at.rows, out,
                        StateBefore<S, S, S>{at, resets.mask, resets.h, problem_.h0, out,
                                             body.h_before, body.h_before_stride, before_, out});
      body.h_before = before_;
      body.h_before_stride = out;
    }
    if constexpr (Cell::kStates > 1) {
      const std::int64_t hidden = shape_.hidden_size, row = Cell::kSaved * hidden;
      const std::int64_t size = cells::kCellStates<Cell> * hidden;
      const std::int64_t offset = Cell::kSavedState * hidden;
      machine_.for_each(
          at.rows, size,
          StateBefore<S, A, A>{at, resets.mask, resets.c, problem_.c0, size,
                               body.saved_before + offset, row, saved_before_ + offset, row});
      body.saved_before = saved_before_;
    }
    body.at.first_starting = at.rows;
  }

  // Takes the gradients at the states after a reset away from those at the step before.
  void take_resets(const StepRows& at) {
    const ResetsOfStep<S> resets(problem_.resets, at);
    const auto take = [&](A* d_state, A* d_reset, std::int64_t offset, std::int64_t size) {
      machine_.for_each(at.rows, size,
                        ResetGradient<A>{resets.mask, size, d_state,
                                         d_reset == nullptr ? nullptr : d_reset + offset});
    };
    take(d_h_, problem_.d_reset_h, resets.step * problem_.resets.h_stride, shape_.output_size());
    if constexpr (Cell::kStates > 1)
      take(d_c_, problem_.d_reset_c, resets.step * problem_.resets.c_stride,
           cells::kCellStates<Cell> * shape_.hidden_size);
  }

  void step(const StepRows& at) {
    const std::int64_t hidden = shape_.hidden_size, out = shape_.output_size();
    const S* d_y =
        problem_.d_y == nullptr ? nullptr : problem_.d_y + at.first * problem_.d_y_stride;
    if (is_projected()) {
      S* d_h_all = problem_.d_h_all + at.first * out;
      machine_.for_each(
          at.rows, out,
          OutputGradient<S>{out, at, d_h_, problem_.d_h_n, d_y, problem_.d_y_stride, d_h_all});
      machine_.multiply(Product<S, A>{at.rows, hidden, out, d_h_all, out, problem_.weights.w_hr,
                                      problem_.weights.w_hr_stride, false, d_unprojected_, hidden,
                                      false});
    }

    BackwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.at = at;
    body.d_h = d_h_;
    if (is_projected()) {
      body.d_unprojected = d_unprojected_;
    } else {
      body.d_h_n = problem_.d_h_n;
      body.d_y = d_y;
      body.d_y_stride = problem_.d_y_stride;
    }
    body.d_c = d_c_;
    body.d_c_n = problem_.d_c_n;
    if (problem_.d_c_steps != nullptr)
      body.d_c_steps = problem_.d_c_steps + at.first * cells::kCellStates<Cell> * hidden;
    if (problem_.saved != nullptr) body.saved = problem_.saved + at.first * Cell::kSaved * hidden;
    body.h = problem_.y + at.first * problem_.y_stride;
    body.h_before = problem_.y + at.first_before * problem_.y_stride;
    body.h_before_stride = problem_.y_stride;
    if (problem_.saved != nullptr)
      body.saved_before = problem_.saved + at.first_before * Cell::kSaved * hidden;
    body.h_stride = problem_.y_stride;
    body.h0 = problem_.h0;
    body.c0 = problem_.c0;
    body.w_unit = problem_.weights.w_unit;
    const std::int64_t width = cells::kGradientColumns<Cell> * hidden;
    S* d_pre = problem_.d_pre + at.first * width;
    body.d_pre = d_pre;
    if (plan_.has_resets) gather_states(body);
    machine_.for_each(at.rows, hidden, body);

    if constexpr (Cell::kDenseRecurrence)
      machine_.multiply(Product<S, A>{at.rows, out, Cell::kGates * hidden, d_pre, width,
                                      problem_.weights.w_hh, problem_.weights.w_hh_stride, false,
                                      d_h_, out, Cell::kDirectPath});
    if (plan_.has_resets) take_resets(at);
  }

  template <class From>
  void finish(const From* from, S* to, std::int64_t columns) {
    machine_.for_each(shape_.sequence.batch, columns, Copy<From, S>{from, columns, to, columns});
  }

  const Backward<S>& problem_;
  const LayerShape& shape_;
  const Plan& plan_;
  Machine& machine_;
  A *d_h_, *d_c_, *d_unprojected_, *saved_before_;
  S* before_;
};

template <class S>
std::size_t Stepwise::workspace_bytes(const LayerShape& shape, int, const Plan& plan, Pass pass) {
  return pass == Pass::kForward ? StepwiseForwardLayout<S>(shape, plan).bytes
                                : StepwiseBackwardLayout<S>(shape, plan).bytes;
}

template <class S, class Machine>
bool Stepwise::can_launch(const Request&, const Plan&, Machine&) {
  return true;
}

// Directions run one after the other, in the same workspace.
template <class S, class Machine>
void Stepwise::forward(const Forward<S>* problems, int directions, const Plan& plan,
                       void* workspace, Machine& machine) {
  for (int d = 0; d < directions; ++d) {
    switch (problems[d].shape.cell) {
#define FASTRNN_CELL(kind, name, type)                                              \
  case CellKind::kind:                                                              \
    StepwiseForward<type, S, Machine>(problems[d], plan, workspace, machine).run(); \
    break;
      FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    }
  }
}

template <class S, class Machine>
void Stepwise::backward(const Backward<S>* problems, int directions, const Plan& plan,
                        void* workspace, Machine& machine) {
  for (int d = 0; d < directions; ++d) {
    switch (problems[d].shape.cell) {
#define FASTRNN_CELL(kind, name, type)                                               \
  case CellKind::kind:                                                               \
    StepwiseBackward<type, S, Machine>(problems[d], plan, workspace, machine).run(); \
    break;
      FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    }
  }
}

}  // namespace fastrnn::cuda
