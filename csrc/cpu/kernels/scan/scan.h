// The time loop of a linear recurrence (cells/linear_scan.h), vectorised over columns. Each step
// reads and writes rows once, so the speed is that of memory.
//
// The states of a few columns stay in registers from step to step. Those of more columns are in a
// buffer that fits the L1 cache, and each step passes over a long piece of each row, as the
// prefetchers of CPUs need it.
#pragma once

#include "cpu/kernels/vector/storage.h"

FASTRNN_KERNELS_BEGIN

template <class S>
struct ScanValueOf {
  using Type = float;
};
template <>
struct ScanValueOf<double> {
  using Type = double;
};
template <class S>
using ScanValue = typename ScanValueOf<S>::Type;

// A pass computes the next state of a vector of columns. `row`: the offset of the row of a step.

template <class S>
class ScanForward {
 public:
  using Value = ScanValue<S>;
  using P = Pack<Value>;

  explicit FASTRNN_INLINE ScanForward(const Scan<S>& problem) : problem_(problem) {}

  // The row of a step of this pass.
  FASTRNN_INLINE std::int64_t row(std::int64_t step) const { return problem_.shape.row(step); }

  // Loads what a step reads before its results are stored.
  FASTRNN_INLINE P factor(std::int64_t at, std::int64_t lanes) const {
    return load_values(problem_.a + at, lanes);
  }
  FASTRNN_INLINE P next(P a, std::int64_t at, std::int64_t lanes, P h) const {
    return cells::scan_step(a, load_values(problem_.b + at, lanes), h);
  }
  FASTRNN_INLINE P next_and_store(P a, std::int64_t at, std::int64_t, std::int64_t,
                                  std::int64_t lanes, P h) const {
    h = next(a, at, lanes, h);
    store_values(h, problem_.h + at, lanes);
    return h;
  }

 private:
  const Scan<S>& problem_;
};

// The steps backwards; the state is `carry`.
template <class S>
class ScanBackward {
 public:
  using Value = ScanValue<S>;
  using P = Pack<Value>;

  explicit FASTRNN_INLINE ScanBackward(const ScanGradients<S>& problem) : problem_(problem) {}

  FASTRNN_INLINE std::int64_t row(std::int64_t step) const {
    return problem_.shape.row(problem_.shape.steps - 1 - step);
  }
  FASTRNN_INLINE P factor(std::int64_t at, std::int64_t lanes) const {
    return load_values(problem_.a + at, lanes);
  }
  FASTRNN_INLINE P next(P a, std::int64_t at, std::int64_t lanes, P carry) const {
    return a * cells::scan_gradient(load_values(problem_.d_h + at, lanes), carry);
  }
  FASTRNN_INLINE P next_and_store(P a, std::int64_t at, std::int64_t step, std::int64_t column,
                                  std::int64_t lanes, P carry) const {
    const P d_b = cells::scan_gradient(load_values(problem_.d_h + at, lanes), carry);
    if (problem_.d_a != nullptr)
      store_values(d_b * before(step, column, lanes), problem_.d_a + at, lanes);
    store_values(d_b, problem_.d_b + at, lanes);
    return a * d_b;
  }

 private:
  // The state before a step.
  FASTRNN_INLINE P before(std::int64_t step, std::int64_t column, std::int64_t lanes) const {
    if (step + 1 < problem_.shape.steps)
      return load_values(problem_.h + row(step + 1) * problem_.shape.columns + column, lanes);
    return problem_.h0 == nullptr ? P(Value(0)) : load_values(problem_.h0 + column, lanes);
  }

  const ScanGradients<S>& problem_;
};

// Most vectors of columns whose states stay in registers.
constexpr int kScanVectors = 4;
// Columns whose states are in a buffer: 8 KB of states, so that the rows have room in L1 as well.
template <class Value>
constexpr std::int64_t kScanColumns = 8192 / std::int64_t(sizeof(Value));

// Runs kVectors vectors of columns, of which the last one may have fewer lanes.
template <int kVectors, class PassOf>
FASTRNN_INLINE void scan_in_registers(const PassOf& pass, const ScanPart& part,
                                      std::int64_t row_size, std::int64_t first,
                                      std::int64_t columns, typename PassOf::Value* state) {
  using P = typename PassOf::P;
  constexpr std::int64_t kLanes = P::kLanes;
  const std::int64_t last = columns - (kVectors - 1) * kLanes;  // lanes of the last vector
  P h[kVectors];
  for (int v = 0; v < kVectors; ++v)
    h[v] = P::load(state + v * kLanes, v < kVectors - 1 ? kLanes : last);
  for (std::int64_t step = part.first_step; step < part.first_step + part.steps; ++step) {
    const std::int64_t at = pass.row(step) * row_size + first;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t lanes = v < kVectors - 1 ? kLanes : last, offset = v * kLanes;
      const P a = pass.factor(at + offset, lanes);
      h[v] = pass.next_and_store(a, at + offset, step, first + offset, lanes, h[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v)
    h[v].store(state + v * kLanes, v < kVectors - 1 ? kLanes : last);
}

// Calls function(tag) with the number of vectors of so many columns, as a constant.
template <class Function>
FASTRNN_INLINE void with_vectors(std::int64_t columns, std::int64_t lanes,
                                 const Function& function) {
  static_assert(kScanVectors == 4);
  if (columns <= lanes)
    function(std::integral_constant<int, 1>());
  else if (columns <= 2 * lanes)
    function(std::integral_constant<int, 2>());
  else if (columns <= 3 * lanes)
    function(std::integral_constant<int, 3>());
  else
    function(std::integral_constant<int, 4>());
}

template <class PassOf, class Problem>
void run_scan(const Problem& problem, const ScanPart& part, typename PassOf::Value* state) {
  using P = typename PassOf::P;
  constexpr std::int64_t kLanes = P::kLanes;
  const PassOf pass(problem);
  const std::int64_t row_size = problem.shape.columns;
  if (part.columns <= kScanVectors * kLanes) {
    with_vectors(part.columns, kLanes, [&](auto vectors) {
      scan_in_registers<decltype(vectors)::value>(pass, part, row_size, part.first_column,
                                                  part.columns, state);
    });
    return;
  }
  for (std::int64_t begin = 0; begin < part.columns;
       begin += kScanColumns<typename PassOf::Value>) {
    const std::int64_t columns =
        std::min(part.columns - begin, kScanColumns<typename PassOf::Value>);
    const std::int64_t first = part.first_column + begin;
    auto* own = state + begin;
    for (std::int64_t step = part.first_step; step < part.first_step + part.steps; ++step) {
      const std::int64_t at = pass.row(step) * row_size + first;
      const auto advance = [&](std::int64_t c, std::int64_t lanes) {
        const P a = pass.factor(at + c, lanes);
        pass.next_and_store(a, at + c, step, first + c, lanes, P::load(own + c, lanes))
            .store(own + c, lanes);
      };
      std::int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) advance(c, kLanes);
      if (c < columns) advance(c, columns - c);
    }
  }
}

template <class PassOf, class Problem>
void summarize_scan(const Problem& problem, const ScanPart& part, typename PassOf::Value* state,
                    typename PassOf::Value* product) {
  using P = typename PassOf::P;
  using Value = typename PassOf::Value;
  constexpr std::int64_t kLanes = P::kLanes;
  const PassOf pass(problem);
  const std::int64_t row_size = problem.shape.columns;
  for (std::int64_t begin = 0; begin < part.columns; begin += kScanVectors * kLanes) {
    const std::int64_t columns = std::min(part.columns - begin, kScanVectors * kLanes);
    with_vectors(columns, kLanes, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const std::int64_t last = columns - (kVectors - 1) * kLanes;
      P h[kVectors], all[kVectors];
      for (int v = 0; v < kVectors; ++v) h[v] = P(Value(0)), all[v] = P(Value(1));
      for (std::int64_t step = part.first_step; step < part.first_step + part.steps; ++step) {
        const std::int64_t at = pass.row(step) * row_size + part.first_column + begin;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const std::int64_t lanes = v < kVectors - 1 ? kLanes : last, offset = v * kLanes;
          const P a = pass.factor(at + offset, lanes);
          h[v] = pass.next(a, at + offset, lanes, h[v]);
          all[v] = a * all[v];
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t lanes = v < kVectors - 1 ? kLanes : last;
        h[v].store(state + begin + v * kLanes, lanes);
        all[v].store(product + begin + v * kLanes, lanes);
      }
    });
  }
}

template <class S>
constexpr ScanPasses<S, ScanValue<S>> scan_passes() {
  return {{run_scan<ScanForward<S>, Scan<S>>, summarize_scan<ScanForward<S>, Scan<S>>},
          {run_scan<ScanBackward<S>, ScanGradients<S>>,
           summarize_scan<ScanBackward<S>, ScanGradients<S>>}};
}
constexpr ScanTypes scan_types() {
  return {scan_passes<float>(), scan_passes<double>(), scan_passes<Bfloat16>(),
          scan_passes<Float16Value>()};
}

FASTRNN_KERNELS_END
