// The stepwise schedule: every step is a matrix product and a pointwise part, put one after the
// other on a stream.
//
//   forward   gates_x = x w_ih^T                  for a chunk of many steps at once
//             for t:  gates_h = h w_hh^T          h: rows of y of the step before, or of h0
//                     (h', c') = cell             [with a projection m, and y_t = m w_hr^T]
//
//   backward  for t:  dh = d_h + d_y_t            [with a projection kept as d_h_all, dm = dh w_hr]
//                     d_pre_t, d_c, d_h = cell    d_h: what reaches h around the product
//                     d_h += d_pre_t[hidden side] w_hh
//
// Rows of different lengths need no masks: the active rows of a step are its first ones. A row that
// starts at a step reads h0 and c0 there, one that ends there writes h_n and c_n, both inside the
// pointwise part; a row that a step does not have keeps its running values.
//
// The text is a template over the machine, which brings two operations:
//
//   machine.multiply(product)               c = a w  or  c += a w
//   machine.for_each(rows, columns, body)   body(row, column) for all, in any order
//
// stepwise.cu has the GPU's; the tests bring one of plain loops.
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
  std::size_t gates_x, gates_h, c, m, bytes;

  StepwiseForwardLayout(const LayerShape& shape, const Plan& plan) {
    using A = Accumulate<S>;
    const CellInfo& cell = cell_info(shape.cell);
    const std::int64_t width = cell.gates * shape.hidden_size;
    Parts parts;
    const std::int64_t chunk =
        std::min(std::max(plan.chunk_rows, shape.sequence.batch), shape.sequence.total_rows());
    gates_x = parts.add<A>(chunk * width);
    gates_h = parts.add<A>(shape.sequence.batch * width);
    c = parts.add<A>(cell.states == 2 ? shape.sequence.batch * shape.hidden_size : 0);
    m = parts.add<S>(shape.proj_size > 0 ? shape.sequence.batch * shape.hidden_size : 0);
    bytes = parts.bytes();
  }
};

template <class S>
struct StepwiseBackwardLayout {
  std::size_t d_h, d_c, d_m, bytes;

  StepwiseBackwardLayout(const LayerShape& shape, const Plan&) {
    using A = Accumulate<S>;
    Parts parts;
    d_h = parts.add<A>(shape.sequence.batch * shape.output_size());
    d_c = parts.add<A>(cell_info(shape.cell).states == 2 ? shape.sequence.batch * shape.hidden_size
                                                         : 0);
    d_m = parts.add<A>(shape.proj_size > 0 ? shape.sequence.batch * shape.hidden_size : 0);
    bytes = parts.bytes();
  }
};

template <class Cell, class S, class Machine>
class StepwiseForward {
 public:
  StepwiseForward(const Forward<S>& problem, const Plan& plan, void* workspace, Machine& machine)
      : p_(problem), shape_(problem.shape), plan_(plan), machine_(machine) {
    const StepwiseForwardLayout<S> at(shape_, plan);
    char* base = static_cast<char*>(workspace);
    gates_x_ = reinterpret_cast<A*>(base + at.gates_x);
    gates_h_ = reinterpret_cast<A*>(base + at.gates_h);
    c_ = reinterpret_cast<A*>(base + at.c);
    m_ = reinterpret_cast<S*>(base + at.m);
  }

  void run() {
    if (shape_.sequence.steps == 0) {
      copy(p_.h0, p_.h_n, shape_.sequence.batch, shape_.output_size());
      if constexpr (Cell::kStates == 2)
        copy(p_.c0, p_.c_n, shape_.sequence.batch, shape_.hidden_size);
    }
    for (std::int64_t k = 0; k < shape_.sequence.steps;) {
      const std::int64_t end = shape_.sequence.chunk_end(k, plan_.chunk_rows);
      const RowRange chunk = shape_.sequence.rows_between(k, end);
      machine_.multiply(input_product(p_, chunk.first, chunk.count, gates_x_));
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
  S* y_row(std::int64_t row) const { return p_.y + row * p_.y_stride; }

  // gates_h of rows [begin, end), whose states lie at h.
  void multiply_state(const S* h, std::int64_t h_stride, std::int64_t begin, std::int64_t end) {
    machine_.multiply(Product<S, A>{end - begin, width(), shape_.output_size(), h, h_stride,
                                    p_.weights.w_hh, p_.weights.w_hh_stride, true,
                                    gates_h_ + begin * width(), width(), false});
  }

  void step(const StepRows& at, const A* gates_x) {
    const std::int64_t hidden = shape_.hidden_size, out = shape_.output_size();
    const S* before = y_row(at.first_before);
    multiply_state(before, p_.y_stride, 0, at.first_starting);
    multiply_state(p_.h0 + at.first_starting * out, out, at.first_starting, at.rows);

    ForwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.at = at;
    body.gates_x = gates_x;
    body.gates_h = gates_h_;
    body.b_ih = p_.weights.b_ih;
    body.b_hh = p_.weights.b_hh;
    body.h_before = before;
    body.h_before_stride = p_.y_stride;
    body.h0 = p_.h0;
    body.c0 = p_.c0;
    body.c = c_;
    body.h = is_projected() ? m_ : y_row(at.first);
    body.h_stride = is_projected() ? hidden : p_.y_stride;
    if (p_.saved != nullptr) body.saved = p_.saved + at.first * Cell::kSaved * hidden;
    if (!is_projected()) body.h_n = p_.h_n;
    body.c_n = p_.c_n;
    machine_.for_each(at.rows, hidden, body);

    if (is_projected()) {
      machine_.multiply(Product<S, S>{at.rows, out, hidden, m_, hidden, p_.weights.w_hr,
                                      p_.weights.w_hr_stride, true, y_row(at.first), p_.y_stride,
                                      false});
      machine_.for_each(at.rows - at.first_ending, out,
                        Copy<S, S>{y_row(at.first + at.first_ending), p_.y_stride,
                                   p_.h_n + at.first_ending * out, out});
    }
  }

  void copy(const S* from, S* to, std::int64_t rows, std::int64_t columns) {
    machine_.for_each(rows, columns, Copy<S, S>{from, columns, to, columns});
  }

  const Forward<S>& p_;
  const LayerShape& shape_;
  const Plan& plan_;
  Machine& machine_;
  A *gates_x_, *gates_h_, *c_;
  S* m_;
};

template <class Cell, class S, class Machine>
class StepwiseBackward {
 public:
  StepwiseBackward(const Backward<S>& problem, const Plan& plan, void* workspace, Machine& machine)
      : p_(problem), shape_(problem.shape), machine_(machine) {
    const StepwiseBackwardLayout<S> at(shape_, plan);
    char* base = static_cast<char*>(workspace);
    d_h_ = reinterpret_cast<A*>(base + at.d_h);
    d_c_ = reinterpret_cast<A*>(base + at.d_c);
    d_m_ = reinterpret_cast<A*>(base + at.d_m);
  }

  void run() {
    const std::int64_t out = shape_.output_size(), hidden = shape_.hidden_size;
    for (std::int64_t k = shape_.sequence.steps - 1; k >= 0; --k)
      step(shape_.sequence.at(shape_.sequence.step(k)));
    if (shape_.sequence.steps > 0) {
      finish(d_h_, p_.d_h0, out);
      if constexpr (Cell::kStates == 2) finish(d_c_, p_.d_c0, hidden);
    } else {
      finish(p_.d_h_n, p_.d_h0, out);
      if constexpr (Cell::kStates == 2) finish(p_.d_c_n, p_.d_c0, hidden);
    }
  }

 private:
  using A = Accumulate<S>;

  bool is_projected() const { return shape_.proj_size > 0; }

  void step(const StepRows& at) {
    const std::int64_t hidden = shape_.hidden_size, out = shape_.output_size();
    const S* d_y = p_.d_y == nullptr ? nullptr : p_.d_y + at.first * p_.d_y_stride;
    if (is_projected()) {
      S* d_h_all = p_.d_h_all + at.first * out;
      machine_.for_each(at.rows, out,
                        OutputGradient<S>{out, at, d_h_, p_.d_h_n, d_y, p_.d_y_stride, d_h_all});
      machine_.multiply(Product<S, A>{at.rows, hidden, out, d_h_all, out, p_.weights.w_hr,
                                      p_.weights.w_hr_stride, false, d_m_, hidden, false});
    }

    BackwardStep<Cell, S> body{};
    body.hidden = hidden;
    body.at = at;
    body.d_h = d_h_;
    if (is_projected()) {
      body.d_m = d_m_;
    } else {
      body.d_h_n = p_.d_h_n;
      body.d_y = d_y;
      body.d_y_stride = p_.d_y_stride;
    }
    body.d_c = d_c_;
    body.d_c_n = p_.d_c_n;
    if (p_.saved != nullptr) body.saved = p_.saved + at.first * Cell::kSaved * hidden;
    body.h = p_.y + at.first * p_.y_stride;
    body.h_before = p_.y + at.first_before * p_.y_stride;
    if (p_.saved != nullptr) body.saved_before = p_.saved + at.first_before * Cell::kSaved * hidden;
    body.h_stride = p_.y_stride;
    body.h0 = p_.h0;
    body.c0 = p_.c0;
    S* d_pre = p_.d_pre + at.first * Cell::kPre * hidden;
    body.d_pre = d_pre;
    machine_.for_each(at.rows, hidden, body);

    machine_.multiply(Product<S, A>{at.rows, out, Cell::kGates * hidden, d_pre, Cell::kPre * hidden,
                                    p_.weights.w_hh, p_.weights.w_hh_stride, false, d_h_, out,
                                    Cell::kDirectPath});
  }

  template <class From>
  void finish(const From* from, S* to, std::int64_t columns) {
    machine_.for_each(shape_.sequence.batch, columns, Copy<From, S>{from, columns, to, columns});
  }

  const Backward<S>& p_;
  const LayerShape& shape_;
  Machine& machine_;
  A *d_h_, *d_c_, *d_m_;
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
