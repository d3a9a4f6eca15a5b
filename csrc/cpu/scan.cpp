// One linear recurrence: divides it among threads.
//
// Columns are independent, so threads get groups of columns. If there are too few columns, each
// group is cut into chunks of steps as well, in two passes:
//
//   1. each rank computes of its chunk the product of a, and the state after it from zeros;
//   2. these of all chunks before give the state before a chunk, from which its rank runs it.
//
// That reads a chunk twice, so it pays off from three chunks on. Where a product overflows or a
// first state is infinite, the state before a chunk could be NaN (infinity times 0, such as a
// product that underflows); then one rank runs all steps in order.
#include "cpu/scan.h"

#include <cmath>

#include "cpu/isa/isa.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/thread_budget.h"

namespace fastrnn::cpu {
namespace {

// A group has at least 256 bytes of a row: shorter pieces of rows would waste what the prefetchers
// fetch beyond them.
constexpr std::int64_t kGroupBytes = 256;
constexpr int kMinChunks = 3;
constexpr std::int64_t kMinChunkSteps = 512;
// A thread must have as many bytes of one matrix. On Zen 4 two threads took 1.3 to 1.8 times as
// long as one for a matrix of 200 to 800 KB that was in a cache, and 0.5 to 0.9 times from 1.6 MB
// on.
constexpr std::int64_t kThreadBytes = 512 * 1024;

template <class S>
float widened(S value) {
  return float(value);
}
double widened(double value) { return value; }

void round_to(float value, float& to) { to = value; }
void round_to(double value, double& to) { to = value; }
void round_to(float value, Bfloat16& to) { to.bits = round_to_bfloat16(value); }
void round_to(float value, Float16Value& to) { to.bits = round_to_float16(value); }

template <class S>
const auto& passes() {
  const ScanTypes& scans = isa().scans;
  if constexpr (std::is_same_v<S, float>)
    return scans.of_float;
  else if constexpr (std::is_same_v<S, double>)
    return scans.of_double;
  else if constexpr (std::is_same_v<S, Bfloat16>)
    return scans.of_bfloat16;
  else
    return scans.of_float16;
}

template <class S>
const auto& kernels(const Scan<S>&) {
  return passes<S>().forward;
}
template <class S>
const auto& kernels(const ScanGradients<S>&) {
  return passes<S>().gradients;
}

// The state before the first step of a pass.
template <class Value, class S>
Value first_state(const Scan<S>& problem, std::int64_t column) {
  return problem.h0 == nullptr ? Value(0) : widened(problem.h0[column]);
}
template <class Value, class S>
Value first_state(const ScanGradients<S>&, std::int64_t) {
  return Value(0);
}

// The state after the last step.
template <class Value, class S>
void store_last_state(const Scan<S>&, std::int64_t, Value) {}
template <class Value, class S>
void store_last_state(const ScanGradients<S>& problem, std::int64_t column, Value carry) {
  round_to(carry, problem.d_h0[column]);
}

template <class Problem, class Value>
class ScanJob {
 public:
  ScanJob(const Problem& problem, const ScanKernels<Problem, Value>& kernels, const ScanPlan& plan)
      : problem_(problem),
        kernels_(kernels),
        plan_(plan),
        threads_(plan.groups * plan.chunks),
        row_bytes_(divide_up(problem.shape.columns * std::int64_t(sizeof(Value)), 64) * 64),
        // the state of each column in each chunk, then products and barriers
        workspace_(std::size_t(row_bytes_ * plan.chunks * (plan.chunks > 1 ? 3 : 1)) +
                   Barrier::kBytes * std::size_t(threads_ + 1)),
        barrier_(threads_, aligned(workspace_.data())) {}

  void run(ParallelFor parallel_for) {
    run_team(
        threads_, parallel_for,
        [](void* job, int rank, int size) { static_cast<ScanJob*>(job)->run_rank(rank, size); },
        this);
  }

 private:
  static void* aligned(void* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return reinterpret_cast<void*>((address + Barrier::kBytes - 1) / Barrier::kBytes *
                                   Barrier::kBytes);
  }
  Value* row(std::int64_t index) const {
    char* rows =
        static_cast<char*>(aligned(workspace_.data())) + std::int64_t(Barrier::kBytes) * threads_;
    return reinterpret_cast<Value*>(rows + index * row_bytes_);
  }
  Value* state(int chunk) const { return row(chunk); }
  Value* end(int chunk) const { return row(plan_.chunks + chunk); }
  Value* product(int chunk) const { return row(2 * plan_.chunks + chunk); }

  void run_rank(int rank, int size) {
    const ScanShape& shape = problem_.shape;
    if (size < threads_)  // a smaller or nested region
      return run_in_order({0, shape.columns, 0, shape.steps});
    const int group = rank / plan_.chunks, chunk = rank % plan_.chunks;
    const std::int64_t begin = column_of(group), first = step_of(chunk);
    const ScanPart part = {begin, column_of(group + 1) - begin, first, step_of(chunk + 1) - first};
    if (plan_.chunks == 1) return run_in_order(part);
    if (chunk + 1 < plan_.chunks)
      kernels_.summarize(problem_, part, end(chunk) + begin, product(chunk) + begin);
    barrier_.arrive(rank);
    barrier_.wait(rank, group * plan_.chunks, plan_.chunks);
    if (!is_finite(part)) {
      if (chunk == 0) run_in_order({begin, part.columns, 0, shape.steps});
      return;
    }
    Value* own = state(chunk);
    for (std::int64_t c = begin; c < begin + part.columns; ++c) {
      own[c] = first_state<Value>(problem_, c);
      for (int before = 0; before < chunk; ++before)
        own[c] = product(before)[c] * own[c] + end(before)[c];
    }
    kernels_.run(problem_, part, own + begin);
    if (chunk + 1 == plan_.chunks) store_last_states(part, own);
  }

  void run_in_order(const ScanPart& part) {
    Value* own = state(0);
    for (std::int64_t c = part.first_column; c < part.first_column + part.columns; ++c)
      own[c] = first_state<Value>(problem_, c);
    kernels_.run(problem_, part, own + part.first_column);
    store_last_states(part, own);
  }

  void store_last_states(const ScanPart& part, const Value* states) {
    for (std::int64_t c = part.first_column; c < part.first_column + part.columns; ++c)
      store_last_state(problem_, c, states[c]);
  }

  // Whether the first states and the summaries of all chunks of the part's columns are finite.
  bool is_finite(const ScanPart& part) const {
    for (std::int64_t c = part.first_column; c < part.first_column + part.columns; ++c)
      if (!std::isfinite(first_state<Value>(problem_, c))) return false;
    for (int chunk = 0; chunk + 1 < plan_.chunks; ++chunk)
      for (std::int64_t c = part.first_column; c < part.first_column + part.columns; ++c)
        if (!std::isfinite(end(chunk)[c]) || !std::isfinite(product(chunk)[c])) return false;
    return true;
  }

  // The first column of a group: at whole cache lines of the smallest type.
  std::int64_t column_of(int group) const {
    constexpr std::int64_t kUnit = 32;
    const std::int64_t units = divide_up(problem_.shape.columns, kUnit);
    return std::min(units * group / plan_.groups * kUnit, problem_.shape.columns);
  }
  std::int64_t step_of(int chunk) const { return problem_.shape.steps * chunk / plan_.chunks; }

  const Problem& problem_;
  const ScanKernels<Problem, Value>& kernels_;
  const ScanPlan plan_;
  const int threads_;
  const std::int64_t row_bytes_;
  const Workspace workspace_;
  Barrier barrier_;
};

template <class S, class Problem>
void run(const Problem& problem, int threads, ParallelFor parallel_for) {
  const ScanShape& shape = problem.shape;
  if (shape.columns == 0) return;
  ScanPlan plan = make_scan_plan(shape, sizeof(S), threads);
  const int wanted = plan.groups * plan.chunks;
  const ThreadReservation reservation(wanted, wanted == 1 ? 1 : std::min(threads, usable_cpus()));
  if (reservation.threads() < wanted)
    plan = make_scan_plan(shape, sizeof(S), reservation.threads());
  using Value = std::conditional_t<sizeof(S) == 8, double, float>;
  ScanJob<Problem, Value>(problem, kernels(problem), plan).run(parallel_for);
}

}  // namespace

ScanPlan make_scan_plan(const ScanShape& shape, int element_bytes, int threads) {
  const int bound = max_threads();
  std::int64_t most = std::min(bound > 0 ? std::min(threads, bound) : threads, kMaxTeam);
  const std::int64_t row_bytes = shape.columns * element_bytes;
  most = std::max<std::int64_t>(std::min(most, shape.steps * row_bytes / kThreadBytes), 1);
  const std::int64_t groups = std::max<std::int64_t>(std::min(most, row_bytes / kGroupBytes), 1);
  const std::int64_t chunks = std::min(most / groups, shape.steps / kMinChunkSteps);
  return {int(groups), chunks < kMinChunks ? 1 : int(chunks)};
}

#define FASTRNN_DEFINE_SCAN(S)                                                                  \
  void scan(const Scan<S>& problem, int threads, ParallelFor parallel_for) {                    \
    run<S>(problem, threads, parallel_for);                                                     \
  }                                                                                             \
  void scan_gradients(const ScanGradients<S>& problem, int threads, ParallelFor parallel_for) { \
    run<S>(problem, threads, parallel_for);                                                     \
  }
FASTRNN_DEFINE_SCAN(float)
FASTRNN_DEFINE_SCAN(double)
FASTRNN_DEFINE_SCAN(Bfloat16)
FASTRNN_DEFINE_SCAN(Float16Value)
#undef FASTRNN_DEFINE_SCAN

}  // namespace fastrnn::cpu
