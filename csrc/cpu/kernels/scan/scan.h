// The time loop of a cell that is linear in its state (cells/linear_scan.h), vectorised over units.
// It reads and writes rows once, so its speed is that of memory, or of the cell's exponentials.
//
// Each pass over a row runs kScanSteps steps at once, whose states stay in registers. Between the
// passes they are in a buffer that fits the L2 cache: long pieces of rows are what prefetchers and
// the table of pages need.
#pragma once

#include "cpu/kernels/vector/storage.h"

FASTRNN_KERNELS_BEGIN

// On Zen 4, 2 steps reach 0.85 to 1.2 times the speed of torch.add for matrices in L3 and in DRAM,
// 1 step 0.75 to 1.05. More steps are slower where rows are a multiple of 4 KB apart.
constexpr int kScanSteps = 2;
// Most vectors of columns whose states stay in registers for all steps, for the cell without gates.
constexpr int kScanVectors = 4;
// Values of a state that a buffer holds: 128 KB of float.
constexpr std::int64_t kScanStates = 32768;

// The rows of a cell's inputs at a step.
template <class Cell, class S>
struct ScanRows {
  using P = Pack<ScanSum<S>>;
  const S *data[Cell::kInputs], *bias[Cell::kInputs];

  FASTRNN_INLINE ScanRows() = default;
  FASTRNN_INLINE ScanRows(const ScanInput<S>* in, std::int64_t row, std::int64_t first) {
    for (int i = 0; i < Cell::kInputs; ++i) {
      data[i] = in[i].data + row * in[i].stride + first;
      bias[i] = in[i].bias == nullptr ? nullptr : in[i].bias + first;
    }
  }
  FASTRNN_INLINE void load(std::int64_t c, std::int64_t lanes, P* values) const {
    for (int i = 0; i < Cell::kInputs; ++i) {
      values[i] = load_values(data[i] + c, lanes);
      if (Cell::kHasGates && bias[i] != nullptr)
        values[i] = values[i] + load_values(bias[i] + c, lanes);
    }
  }
};

// A pass computes the next state of a vector of units. Its `At` has the rows of a step.

template <class Cell, class S>
class ScanForward {
 public:
  using Value = ScanSum<S>;
  using P = Pack<Value>;
  using Problem = Scan<S>;
  static constexpr bool kHasGates = Cell::kHasGates;
  struct At {
    ScanRows<Cell, S> in;
    S *h, *y;
  };

  FASTRNN_INLINE ScanForward(const Problem& problem, bool streams)
      : problem_(problem), shape_(problem.shape), streams_(streams) {}

  // The rows of a step from the unit `first` on.
  FASTRNN_INLINE At at(std::int64_t step, std::int64_t sequence, std::int64_t first) const {
    const std::int64_t row = shape_.row(step) * shape_.batch + sequence;
    At at;
    at.in = ScanRows<Cell, S>(problem_.in, row, first);
    const std::int64_t offset = row * shape_.units + first;
    at.h = problem_.h == nullptr ? nullptr : problem_.h + offset;
    at.y = Cell::kHasOutput ? problem_.y + offset : nullptr;
    return at;
  }

  // Returns the next state, and a.
  FASTRNN_INLINE P next(const At& at, std::int64_t c, std::int64_t lanes, P h, P& a) const {
    P in[Cell::kInputs];
    return next_of(in, at, c, lanes, h, a);
  }
  FASTRNN_INLINE P next_and_store(const At& at, std::int64_t c, std::int64_t lanes, P h) const {
    P in[Cell::kInputs], a;
    h = next_of(in, at, c, lanes, h, a);
    if (!Cell::kHasOutput || at.h != nullptr) store(h, at.h + c, lanes);
    if constexpr (Cell::kHasOutput) store(Cell::output(in, h), at.y + c, lanes);
    return h;
  }

  // Whether a step is without marks.
  FASTRNN_INLINE bool is_plain(std::int64_t step, std::int64_t sequence) const {
    const std::int64_t time = shape_.row(step);
    return !problem_.marks.is_ended(time, sequence) &&
           !problem_.marks.is_reset(shape_, time, sequence);
  }
  FASTRNN_INLINE bool is_ended(std::int64_t step, std::int64_t sequence) const {
    return problem_.marks.is_ended(shape_.row(step), sequence);
  }
  // Writes what a step beyond the length of a sequence returns.
  FASTRNN_INLINE void store_ended(const At& at, std::int64_t units) const {
    for (S* to : {at.h, at.y})
      if (to != nullptr) std::memset(to, 0, std::size_t(units) * sizeof(S));
  }
  // Changes the states before a step that begins with a reset. Returns whether it does.
  FASTRNN_INLINE bool before_step(std::int64_t step, std::int64_t sequence, std::int64_t first,
                                  std::int64_t units, Value* state) const {
    const std::int64_t time = shape_.row(step);
    if (!problem_.marks.is_reset(shape_, time, sequence)) return false;
    const S* from = problem_.marks.state(shape_, time, sequence);
    for (std::int64_t c = 0; c < units; c += P::kLanes)
      (from == nullptr ? P(Value(0)) : load_values(from + first + c, units - c)).store(state + c);
    return true;
  }
  FASTRNN_INLINE bool after_step(std::int64_t, std::int64_t, std::int64_t, std::int64_t, Value*,
                                 bool) const {
    return false;
  }

 private:
  FASTRNN_INLINE P next_of(P* in, const At& at, std::int64_t c, std::int64_t lanes, P h,
                           P& a) const {
    at.in.load(c, lanes, in);
    P b;
    Cell::coefficients(in, problem_.positive, a, b);
    return cells::scan_step(a, b, h);
  }
  FASTRNN_INLINE void store(P values, S* to, std::int64_t lanes) const {
    if constexpr (sizeof(S) >= 4) {
      if (streams_) return stream_values(values, to);
    }
    store_values(values, to, lanes);
  }

  const Problem& problem_;
  const ScanShape shape_;
  const bool streams_;
};

// The steps backwards; the state is `carry`.
template <class Cell, class S>
class ScanBackward {
 public:
  using Value = ScanSum<S>;
  using P = Pack<Value>;
  using Problem = ScanGradients<S>;
  static constexpr bool kHasGates = Cell::kHasGates;
  struct At {
    ScanRows<Cell, S> in;
    S* d_in[Cell::kInputs];
    const S *d_y, *h, *before;
  };

  FASTRNN_INLINE ScanBackward(const Problem& problem, bool streams)
      : problem_(problem), shape_(problem.shape), streams_(streams) {}

  FASTRNN_INLINE At at(std::int64_t step, std::int64_t sequence, std::int64_t first) const {
    const std::int64_t forward_step = shape_.steps - 1 - step;
    const std::int64_t row = shape_.row(forward_step) * shape_.batch + sequence;
    At at;
    at.in = ScanRows<Cell, S>(problem_.in, row, first);
    for (int i = 0; i < Cell::kInputs; ++i) {
      const ScanMatrix<S>& d_in = problem_.d_in[i];
      at.d_in[i] = d_in.data == nullptr ? nullptr : d_in.data + row * d_in.stride + first;
    }
    const std::int64_t offset = row * shape_.units + first;
    at.d_y = problem_.d_y + offset;
    at.h = problem_.h + offset;
    // only the gradient of a depends on the state before
    at.before = at.d_in[0] == nullptr ? nullptr : problem_.before(forward_step, sequence);
    if (at.before != nullptr) at.before += first;
    return at;
  }

  FASTRNN_INLINE P next(const At& at, std::int64_t c, std::int64_t lanes, P carry, P& a) const {
    P in[Cell::kInputs], d_in[Cell::kInputs], b;
    const P d_h = gradient(in, d_in, at, c, lanes, carry);
    Cell::coefficients(in, problem_.positive, a, b);
    return a * d_h;
  }
  FASTRNN_INLINE P next_and_store(const At& at, std::int64_t c, std::int64_t lanes, P carry) const {
    P in[Cell::kInputs], d_in[Cell::kInputs], a, b;
    const P d_h = gradient(in, d_in, at, c, lanes, carry);
    const P before = at.before == nullptr ? P(Value(0)) : load_values(at.before + c, lanes);
    Cell::coefficients(in, problem_.positive, a, b);
    Cell::gradients(in, problem_.positive, d_h * before, d_h, d_in);
    for (int i = 0; i < Cell::kInputs; ++i)
      if (at.d_in[i] != nullptr) store(d_in[i], at.d_in[i] + c, lanes);
    return a * d_h;
  }

  FASTRNN_INLINE bool is_plain(std::int64_t step, std::int64_t sequence) const {
    const std::int64_t time = shape_.row(shape_.steps - 1 - step);
    return !problem_.marks.is_ended(time, sequence) &&
           !problem_.marks.is_reset(shape_, time, sequence);
  }
  FASTRNN_INLINE bool is_ended(std::int64_t step, std::int64_t sequence) const {
    return problem_.marks.is_ended(shape_.row(shape_.steps - 1 - step), sequence);
  }
  FASTRNN_INLINE void store_ended(const At& at, std::int64_t units) const {
    for (S* to : at.d_in)
      if (to != nullptr) std::memset(to, 0, std::size_t(units) * sizeof(S));
  }
  FASTRNN_INLINE bool before_step(std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                  Value*) const {
    return false;
  }
  // Takes the gradients at the states after a reset away from those of the step before. Returns
  // whether it does.
  FASTRNN_INLINE bool after_step(std::int64_t step, std::int64_t sequence, std::int64_t first,
                                 std::int64_t units, Value* carry, bool stores) const {
    const std::int64_t time = shape_.row(shape_.steps - 1 - step);
    if (!problem_.marks.is_reset(shape_, time, sequence)) return false;
    Value* to = problem_.d_reset_h;
    if (stores && to != nullptr) {
      to += time * problem_.marks.reset_stride + sequence * shape_.units + first;
      for (std::int64_t c = 0; c < units; ++c) to[c] += carry[c];
    }
    for (std::int64_t c = 0; c < units; ++c) carry[c] = Value(0);
    return true;
  }

 private:
  // Loads the inputs. Returns the gradient at the state after the step, and writes those of the
  // inputs that only the output reads.
  FASTRNN_INLINE P gradient(P* in, P* d_in, const At& at, std::int64_t c, std::int64_t lanes,
                            P carry) const {
    at.in.load(c, lanes, in);
    P d_h = load_values(at.d_y + c, lanes);
    if constexpr (Cell::kHasOutput)
      Cell::output_gradients(in, load_values(at.h + c, lanes), d_h, d_in, d_h);
    return cells::scan_gradient(d_h, carry);
  }
  FASTRNN_INLINE void store(P values, S* to, std::int64_t lanes) const {
    if constexpr (sizeof(S) >= 4) {
      if (streams_) return stream_values(values, to);
    }
    store_values(values, to, lanes);
  }

  const Problem& problem_;
  const ScanShape shape_;
  const bool streams_;
};

// The blocks of a part, as pieces: as many blocks of a sequence at once as there are.
class ScanPieces {
 public:
  FASTRNN_INLINE ScanPieces(const ScanShape& shape, std::int64_t first_block, std::int64_t blocks)
      : units_(shape.units), blocks_(blocks) {
    const std::int64_t per_sequence = (units_ + kScanBlock - 1) / kScanBlock;
    padded_ = per_sequence * kScanBlock;
    sequence_ = first_block / per_sequence;
    first_ = first_block % per_sequence * kScanBlock;
  }

  // Calls function(sequence, first unit, units, offset in a state).
  template <class Function>
  FASTRNN_INLINE void for_each(const Function& function) const {
    const std::int64_t end = blocks_ * kScanBlock;
    std::int64_t sequence = sequence_, first = first_;
    for (std::int64_t offset = 0; offset < end; offset += padded_ - first, first = 0, ++sequence)
      function(sequence, first, std::min(units_ - first, end - offset), offset);
  }

 private:
  std::int64_t units_, blocks_, padded_, sequence_, first_;
};

// Calls function(column, lanes) for the vectors of so many units.
template <class P, class Function>
FASTRNN_INLINE void for_each_vector(std::int64_t units, const Function& function) {
  std::int64_t c = 0;
  for (; c + P::kLanes <= units; c += P::kLanes) function(c, std::int64_t(P::kLanes));
  if (c < units) function(c, units - c);
}

// Runs kSteps steps without marks.
template <int kSteps, class Pass>
FASTRNN_INLINE void run_plain(const Pass& pass, std::int64_t step, std::int64_t sequence,
                              std::int64_t first, std::int64_t units, typename Pass::Value* state) {
  using P = typename Pass::P;
  typename Pass::At at[kSteps];
  for (int k = 0; k < kSteps; ++k) at[k] = pass.at(step + k, sequence, first);
  for_each_vector<P>(units, [&](std::int64_t c, std::int64_t lanes) {
    P h = P::load(state + c);
    for (int k = 0; k < kSteps; ++k) h = pass.next_and_store(at[k], c, lanes, h);
    h.store(state + c);
  });
}

template <class Pass>
FASTRNN_INLINE void run_step(const Pass& pass, std::int64_t step, std::int64_t sequence,
                             std::int64_t first, std::int64_t units, typename Pass::Value* state) {
  if (pass.is_ended(step, sequence)) return pass.store_ended(pass.at(step, sequence, first), units);
  pass.before_step(step, sequence, first, units, state);
  run_plain<1>(pass, step, sequence, first, units, state);
  pass.after_step(step, sequence, first, units, state, true);
}

// Runs a part whose states fit a buffer.
template <class Pass>
FASTRNN_INLINE void run_part(const Pass& pass, const ScanShape& shape, const ScanPart& part,
                             typename Pass::Value* state) {
  constexpr int kSteps = kScanSteps;
  const ScanPieces pieces(shape, part.first_block, part.blocks);
  const std::int64_t end = part.first_step + part.steps;
  for (std::int64_t step = part.first_step; step < end; step += kSteps) {
    const std::int64_t steps = std::min<std::int64_t>(end - step, kSteps);
    pieces.for_each(
        [&](std::int64_t sequence, std::int64_t first, std::int64_t units, std::int64_t offset) {
          bool is_plain = steps == kSteps;
          for (int k = 0; k < kSteps; ++k) is_plain = is_plain && pass.is_plain(step + k, sequence);
          if (is_plain)
            return run_plain<kSteps>(pass, step, sequence, first, units, state + offset);
          for (std::int64_t k = 0; k < steps; ++k)
            run_step(pass, step + k, sequence, first, units, state + offset);
        });
  }
}

// Runs kVectors vectors of columns, of which the last one may have fewer lanes.
template <int kVectors, class Pass>
FASTRNN_INLINE void run_in_registers(const Pass& pass, const ScanPart& part, std::int64_t columns,
                                     typename Pass::Value* state) {
  using P = typename Pass::P;
  constexpr std::int64_t kLanes = P::kLanes;
  const std::int64_t last = columns - (kVectors - 1) * kLanes;  // lanes of the last vector
  P h[kVectors];
  for (int v = 0; v < kVectors; ++v) h[v] = P::load(state + v * kLanes);
  for (std::int64_t step = part.first_step; step < part.first_step + part.steps; ++step) {
    const auto at = pass.at(step, 0, part.first_block * kScanBlock);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      h[v] = pass.next_and_store(at, v * kLanes, v < kVectors - 1 ? kLanes : last, h[v]);
  }
  for (int v = 0; v < kVectors; ++v) h[v].store(state + v * kLanes);
}

// Runs a part of few columns of the cell without gates, which has one sequence and no marks.
// Returns whether there are few enough.
template <class Pass>
FASTRNN_INLINE bool run_narrow(const Pass& pass, const ScanShape& shape, const ScanPart& part,
                               typename Pass::Value* state) {
  constexpr std::int64_t kLanes = Pass::P::kLanes;
  const std::int64_t columns =
      std::min(part.blocks * kScanBlock, shape.units - part.first_block * kScanBlock);
  if (shape.batch > 1 || columns > kScanVectors * kLanes) return false;
  static_assert(kScanVectors == 4);
  if (columns <= kLanes)
    run_in_registers<1>(pass, part, columns, state);
  else if (columns <= 2 * kLanes)
    run_in_registers<2>(pass, part, columns, state);
  else if (columns <= 3 * kLanes)
    run_in_registers<3>(pass, part, columns, state);
  else
    run_in_registers<4>(pass, part, columns, state);
  return true;
}

template <class Pass>
void run_scan(const typename Pass::Problem& problem, const ScanPart& part,
              typename Pass::Value* state) {
  const Pass pass(problem, part.streams);
  if constexpr (!Pass::kHasGates) {
    if (run_narrow(pass, problem.shape, part, state)) {
      if (part.streams) finish_streams();
      return;
    }
  }
  constexpr std::int64_t kBlocks = kScanStates / kScanBlock;
  for (std::int64_t begin = 0; begin < part.blocks; begin += kBlocks) {
    ScanPart own = part;
    own.first_block += begin;
    own.blocks = std::min(part.blocks - begin, kBlocks);
    auto* states = state + begin * kScanBlock;
    run_part(pass, problem.shape, own, states);
  }
  if (part.streams) finish_streams();
}

template <class Pass>
void summarize_scan(const typename Pass::Problem& problem, const ScanPart& part,
                    typename Pass::Value* state, typename Pass::Value* product) {
  using P = typename Pass::P;
  using Value = typename Pass::Value;
  const Pass pass(problem, false);
  for (std::int64_t c = 0; c < part.blocks * kScanBlock; ++c) {
    state[c] = Value(0);
    product[c] = Value(1);
  }
  const ScanPieces pieces(problem.shape, part.first_block, part.blocks);
  for (std::int64_t step = part.first_step; step < part.first_step + part.steps; ++step)
    pieces.for_each(
        [&](std::int64_t sequence, std::int64_t first, std::int64_t units, std::int64_t offset) {
          if (pass.is_ended(step, sequence)) return;
          bool is_reset = pass.before_step(step, sequence, first, units, state + offset);
          const auto at = pass.at(step, sequence, first);
          for_each_vector<P>(units, [&](std::int64_t c, std::int64_t lanes) {
            Value *own = state + offset + c, *own_product = product + offset + c;
            P a;
            pass.next(at, c, lanes, P::load(own), a).store(own);
            (a * P::load(own_product)).store(own_product);
          });
          is_reset |= pass.after_step(step, sequence, first, units, state + offset, false);
          if (is_reset)
            for (std::int64_t c = 0; c < units; ++c) product[offset + c] = Value(0);
        });
}

template <class Cell, class S>
constexpr ScanPasses<S> scan_passes() {
  return {{run_scan<ScanForward<Cell, S>>, summarize_scan<ScanForward<Cell, S>>},
          {run_scan<ScanBackward<Cell, S>>, summarize_scan<ScanBackward<Cell, S>>}};
}
template <class S>
constexpr ScanTable<S> scan_table() {
  return {{
#define FASTRNN_CELL(kind, name, type) scan_passes<type, S>(),
      FASTRNN_SCAN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
  }};
}
constexpr ScanTypes scan_types() {
  return {scan_table<float>(), scan_table<double>(), scan_table<Bfloat16>(),
          scan_table<Float16Value>()};
}

FASTRNN_KERNELS_END
