// The time loop of a cell that is linear in its state (cells/linear_scan.h) on a GPU: a thread per
// column, so that the loads of a warp are rows of units. Where there are too few columns to occupy
// the GPU, their steps are divided into chunks, in three kernels whose work is linear in T:
//
//   summarize   of each chunk but the last one, the product of a, and the state after it from zeros
//   carry       from these, the state before each chunk
//   steps       each chunk from its state
//
// Where a product overflows or a first state is infinite, the state before a chunk could be NaN
// (infinity times 0); the thread of the first chunk runs all steps of such a column in order.
//
// The code is a template over the machine, which offers for_each (schedules/stepwise/stepwise.h).
#pragma once

#include <cstddef>

#include "cuda/machine/workspace.h"
#include "cuda/math/fragment.h"
#include "cuda/math/half.h"
#include "cuda/scan/plan.h"

namespace fastrnn::cuda {

// Steps without marks whose inputs a thread loads at once, so that enough loads are on the way.
constexpr int kScanAhead = 4;

// A column, and the values that stay the same at all of its steps.
template <class Cell, class S>
struct ScanColumn {
  std::int64_t sequence, unit;
  Accumulate<S> bias[Cell::kInputs];

  FASTRNN_DEVICE ScanColumn(const ScanInput<S>* in, std::int64_t sequence_, std::int64_t unit_)
      : sequence(sequence_), unit(unit_) {
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i)
      bias[i] = in[i].bias == nullptr ? Accumulate<S>(0) : widen(in[i].bias[unit]);
  }
  FASTRNN_DEVICE Accumulate<S> input(const S* loaded, int i) const {
    return Cell::kHasGates ? widen(loaded[i]) + bias[i] : widen(loaded[i]);
  }
};

// A pass computes the next state of a column. `Loaded` is what a step reads.

template <class Cell_, class S_>
struct ScanForwardPass {
  using Cell = Cell_;
  using S = S_;
  using A = Accumulate<S>;
  using Column = ScanColumn<Cell, S>;
  struct Loaded {
    S in[Cell::kInputs];
  };
  Scan<S> problem;

  FASTRNN_DEVICE Column column(std::int64_t sequence, std::int64_t unit) const {
    return Column(problem.in, sequence, unit);
  }
  FASTRNN_DEVICE Loaded load(const Column& at, std::int64_t step) const {
    const std::int64_t row = problem.shape.row(step) * problem.shape.batch + at.sequence;
    Loaded loaded;
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i)
      loaded.in[i] = problem.in[i].data[row * problem.in[i].stride + at.unit];
    return loaded;
  }
  // Returns the state after a step and multiplies `product` by its a. Writes results if kStores.
  // kMarks: whether the step may have marks.
  template <bool kStores, bool kMarks>
  FASTRNN_DEVICE A next(const Column& at, std::int64_t step, const Loaded& loaded, A h,
                        A& product) const {
    const std::int64_t time = problem.shape.row(step);
    const std::int64_t to =
        (time * problem.shape.batch + at.sequence) * problem.shape.units + at.unit;
    if (kMarks && problem.marks.is_ended(time, at.sequence)) {
      if (kStores && problem.h != nullptr) problem.h[to] = narrow<S>(A(0));
      if (kStores && Cell::kHasOutput) problem.y[to] = narrow<S>(A(0));
      return h;
    }
    if (kMarks && problem.marks.is_reset(problem.shape, time, at.sequence)) {
      const S* state = problem.marks.state(problem.shape, time, at.sequence);
      h = state == nullptr ? A(0) : widen(state[at.unit]);
      product = A(0);
    }
    A in[Cell::kInputs], a, b;
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i) in[i] = at.input(loaded.in, i);
    Cell::coefficients(in, problem.positive, a, b);
    h = cells::scan_step(a, b, h);
    product = a * product;
    if (kStores && problem.h != nullptr) problem.h[to] = narrow<S>(h);
    if constexpr (kStores && Cell::kHasOutput) problem.y[to] = narrow<S>(Cell::output(in, h));
    return h;
  }

  const S* first_states() const { return problem.h0; }
  FASTRNN_DEVICE S* last_states() const { return problem.h_n; }
};

// The steps backwards; the state is `carry`.
template <class Cell_, class S_>
struct ScanBackwardPass {
  using Cell = Cell_;
  using S = S_;
  using A = Accumulate<S>;
  using Column = ScanColumn<Cell, S>;
  struct Loaded {
    S in[Cell::kInputs], d_y, h;
    A before;
  };
  ScanGradients<S> problem;

  FASTRNN_DEVICE Column column(std::int64_t sequence, std::int64_t unit) const {
    return Column(problem.in, sequence, unit);
  }
  FASTRNN_DEVICE Loaded load(const Column& at, std::int64_t step) const {
    const std::int64_t forward_step = problem.shape.steps - 1 - step;
    const std::int64_t row = problem.shape.row(forward_step) * problem.shape.batch + at.sequence;
    const std::int64_t from = row * problem.shape.units + at.unit;
    Loaded loaded{};
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i)
      loaded.in[i] = problem.in[i].data[row * problem.in[i].stride + at.unit];
    loaded.d_y = problem.d_y[from];
    if constexpr (Cell::kHasOutput) loaded.h = problem.h[from];
    // only the gradient of a depends on the state before
    const S* before =
        problem.d_in[0].data == nullptr ? nullptr : problem.before(forward_step, at.sequence);
    loaded.before = before == nullptr ? A(0) : widen(before[at.unit]);
    return loaded;
  }
  template <bool kStores, bool kMarks>
  FASTRNN_DEVICE A next(const Column& at, std::int64_t step, const Loaded& loaded, A carry,
                        A& product) const {
    const std::int64_t time = problem.shape.row(problem.shape.steps - 1 - step);
    const std::int64_t row = time * problem.shape.batch + at.sequence;
    A d_in[Cell::kInputs] = {};
    if (kMarks && problem.marks.is_ended(time, at.sequence)) {
      if (kStores) store(at, row, d_in);
      return carry;
    }
    A in[Cell::kInputs], a, b;
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i) in[i] = at.input(loaded.in, i);
    A d_h = widen(loaded.d_y);
    if constexpr (Cell::kHasOutput) Cell::output_gradients(in, widen(loaded.h), d_h, d_in, d_h);
    d_h = cells::scan_gradient(d_h, carry);
    Cell::coefficients(in, problem.positive, a, b);
    if (kStores) {
      Cell::gradients(in, problem.positive, d_h * loaded.before, d_h, d_in);
      store(at, row, d_in);
    }
    carry = a * d_h;
    product = a * product;
    if (kMarks && problem.marks.is_reset(problem.shape, time, at.sequence)) {
      if (kStores && problem.d_reset_h != nullptr)
        problem.d_reset_h[time * problem.marks.reset_stride + at.sequence * problem.shape.units +
                          at.unit] += carry;
      carry = A(0);
      product = A(0);
    }
    return carry;
  }

  const S* first_states() const { return problem.d_h_n; }
  FASTRNN_DEVICE S* last_states() const { return problem.d_h0; }

 private:
  FASTRNN_DEVICE void store(const Column& at, std::int64_t row, const A* d_in) const {
    FASTRNN_UNROLL
    for (int i = 0; i < Cell::kInputs; ++i)
      if (problem.d_in[i].data != nullptr)
        problem.d_in[i].data[row * problem.d_in[i].stride + at.unit] = narrow<S>(d_in[i]);
  }
};

// Runs the steps [begin, end) of a column from a state; returns the state after them.
template <bool kStores, class Pass>
FASTRNN_DEVICE typename Pass::A run_steps(const Pass& pass, const typename Pass::Column& at,
                                          std::int64_t begin, std::int64_t end,
                                          typename Pass::A state, typename Pass::A& product) {
  std::int64_t step = begin;
  if (!pass.problem.marks.any()) {
    for (; step + kScanAhead <= end; step += kScanAhead) {
      typename Pass::Loaded ahead[kScanAhead];
      FASTRNN_UNROLL
      for (int k = 0; k < kScanAhead; ++k) ahead[k] = pass.load(at, step + k);
      FASTRNN_UNROLL
      for (int k = 0; k < kScanAhead; ++k)
        state = pass.template next<kStores, false>(at, step + k, ahead[k], state, product);
    }
  }
  for (; step < end; ++step)
    state = pass.template next<kStores, true>(at, step, pass.load(at, step), state, product);
  return state;
}

// The chunks of all columns. Arrays in the workspace have a value of each column, or [chunks, B,
// H].
struct ScanChunks {
  std::int64_t count, length, steps, batch, units;  // length: steps of a chunk but the last one

  FASTRNN_DEVICE std::int64_t begin(std::int64_t chunk) const {
    return chunk * length < steps ? chunk * length : steps;
  }
  // A row of [chunks, B, H] is that of a chunk and a sequence. There are fewer than 2^32 of them if
  // there is more than one chunk (make_scan_plan); a division of 64 bits calls a function.
  FASTRNN_DEVICE std::int64_t chunk_of(std::int64_t row) const {
    return count == 1 ? 0 : std::int64_t(unsigned(row) / unsigned(batch));
  }
  FASTRNN_DEVICE std::int64_t at(std::int64_t row, std::int64_t unit) const {
    return row * units + unit;
  }
};

template <class Pass>
struct SummarizeScan {
  using A = typename Pass::A;
  Pass pass;
  ScanChunks chunks;
  A *end, *product;

  FASTRNN_DEVICE void operator()(std::int64_t row, std::int64_t unit) const {
    const std::int64_t chunk = chunks.chunk_of(row);
    A all = A(1);
    end[chunks.at(row, unit)] =
        run_steps<false>(pass, pass.column(row - chunk * chunks.batch, unit), chunks.begin(chunk),
                         chunks.begin(chunk + 1), A(0), all);
    product[chunks.at(row, unit)] = all;
  }
};

template <class S>
struct CarryScan {
  using A = Accumulate<S>;
  ScanChunks chunks;
  const S* first;  // [B, H]; null: zeros
  const A *end, *product;
  A* state;                // [chunks, B, H]
  std::uint8_t* in_order;  // [B, H], whether the chunks cannot be computed apart

  FASTRNN_DEVICE void operator()(std::int64_t sequence, std::int64_t unit) const {
    A h = first == nullptr ? A(0) : widen(first[chunks.at(sequence, unit)]);
    bool finite = is_finite(h);
    for (std::int64_t chunk = 0; chunk < chunks.count; chunk += kScanAhead) {
      A ends[kScanAhead], products[kScanAhead];
      FASTRNN_UNROLL
      for (int k = 0; k < kScanAhead; ++k) {
        const bool is_there = chunk + k + 1 < chunks.count;
        const std::int64_t from = chunks.at((chunk + k) * chunks.batch + sequence, unit);
        ends[k] = is_there ? end[from] : A(0);
        products[k] = is_there ? product[from] : A(0);
      }
      FASTRNN_UNROLL
      for (int k = 0; k < kScanAhead; ++k) {
        if (chunk + k < chunks.count)
          state[chunks.at((chunk + k) * chunks.batch + sequence, unit)] = h;
        finite = finite && is_finite(ends[k]) && is_finite(products[k]);
        h = products[k] * h + ends[k];
      }
    }
    in_order[chunks.at(sequence, unit)] = !finite;
  }

 private:
  static FASTRNN_DEVICE bool is_finite(A value) { return value - value == A(0); }
};

template <class Pass>
struct RunScan {
  using A = typename Pass::A;
  using S = typename Pass::S;
  Pass pass;
  ScanChunks chunks;
  const S* first;  // the states before all steps; null: zeros
  const A* state;  // those before each chunk; null: there is one chunk
  const std::uint8_t* in_order;

  FASTRNN_DEVICE void operator()(std::int64_t row, std::int64_t unit) const {
    const std::int64_t chunk = chunks.chunk_of(row);
    std::int64_t until = chunk + 1;
    const std::int64_t sequence = row - chunk * chunks.batch;
    const std::int64_t column = chunks.at(sequence, unit);
    A h = first == nullptr ? A(0) : widen(first[column]), product = A(1);
    if (state != nullptr) {
      if (in_order[column]) {
        if (chunk > 0) return;
        until = chunks.count;
      } else {
        h = state[chunks.at(row, unit)];
      }
    }
    h = run_steps<true>(pass, pass.column(sequence, unit), chunks.begin(chunk), chunks.begin(until),
                        h, product);
    S* to = pass.last_states();
    if (to != nullptr && until == chunks.count) to[column] = narrow<S>(h);
  }
};

template <class A>
struct ScanLayout {
  std::size_t end, product, state, in_order, bytes;

  ScanLayout(const ScanShape& shape, const ScanPlan& plan) {
    WorkspaceBuilder builder;
    const bool has_chunks = plan.chunks > 1;
    end = builder.add<A>(has_chunks ? (plan.chunks - 1) * shape.columns : 0);
    product = builder.add<A>(has_chunks ? (plan.chunks - 1) * shape.columns : 0);
    state = builder.add<A>(has_chunks ? plan.chunks * shape.columns : 0);
    in_order = builder.add<std::uint8_t>(has_chunks ? shape.columns : 0);
    bytes = builder.bytes();
  }
};

template <class Pass, class Machine>
void run_pass(const Pass& pass, const ScanPlan& plan, void* workspace, Machine& machine) {
  using A = typename Pass::A;
  using S = typename Pass::S;
  const ScanShape& shape = pass.problem.shape;
  const std::int64_t length = (shape.steps + plan.chunks - 1) / plan.chunks;
  const ScanChunks chunks = {plan.chunks, length, shape.steps, shape.batch, shape.units};
  const ScanLayout<A> at(shape, plan);
  char* base = static_cast<char*>(workspace);
  A *state = nullptr, *end = reinterpret_cast<A*>(base + at.end),
    *product = reinterpret_cast<A*>(base + at.product);
  auto* in_order = reinterpret_cast<std::uint8_t*>(base + at.in_order);
  if (plan.chunks > 1) {
    state = reinterpret_cast<A*>(base + at.state);
    machine.for_each((plan.chunks - 1) * shape.batch, shape.units,
                     SummarizeScan<Pass>{pass, chunks, end, product});
    machine.for_each(shape.batch, shape.units,
                     CarryScan<S>{chunks, pass.first_states(), end, product, state, in_order});
  }
  machine.for_each(plan.chunks * shape.batch, shape.units,
                   RunScan<Pass>{pass, chunks, pass.first_states(), state, in_order});
}

template <class S, class Machine>
void run_scan_on(const Scan<S>& problem, const ScanPlan& plan, void* workspace, Machine& machine) {
  switch (problem.cell) {
#define FASTRNN_CELL(kind, name, type) \
  case ScanCell::kind:                 \
    return run_pass(ScanForwardPass<type, S>{problem}, plan, workspace, machine);
    FASTRNN_SCAN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }
}
template <class S, class Machine>
void run_scan_on(const ScanGradients<S>& problem, const ScanPlan& plan, void* workspace,
                 Machine& machine) {
  switch (problem.cell) {
#define FASTRNN_CELL(kind, name, type) \
  case ScanCell::kind:                 \
    return run_pass(ScanBackwardPass<type, S>{problem}, plan, workspace, machine);
    FASTRNN_SCAN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }
}

}  // namespace fastrnn::cuda
