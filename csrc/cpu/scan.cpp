// One linear recurrence: divides it among threads.
//
// The units of all sequences, the columns, are independent, so threads get groups of columns. If
// there are too few columns, each group is cut into chunks of steps as well, in two passes:
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
// on. Cells with gates compute several times as long per value.
constexpr std::int64_t kThreadBytes = 512 * 1024;
constexpr std::int64_t kGatedThreadBytes = 128 * 1024;
// From as many bytes of all matrices on, results are stored past the caches, where they would not
// stay until they are read again: without reading each line before it is written. Larger results
// are not: malloc maps memory for each of them, which the kernel of the operating system has just
// cleared, in the caches.
constexpr std::int64_t kStreamBytes = 32 * 1024 * 1024;
constexpr std::int64_t kMappedBytes = 32 * 1024 * 1024;

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
const ScanPasses<S>& passes(ScanCell cell) {
  const ScanTypes& scans = isa().scans;
  const auto cell_index = static_cast<int>(cell);
  if constexpr (std::is_same_v<S, float>)
    return scans.of_float.of[cell_index];
  else if constexpr (std::is_same_v<S, double>)
    return scans.of_double.of[cell_index];
  else if constexpr (std::is_same_v<S, Bfloat16>)
    return scans.of_bfloat16.of[cell_index];
  else
    return scans.of_float16.of[cell_index];
}

template <class S>
const auto& kernels(const Scan<S>& problem) {
  return passes<S>(problem.cell).forward;
}
template <class S>
const auto& kernels(const ScanGradients<S>& problem) {
  return passes<S>(problem.cell).gradients;
}

// The states before the first step of a pass; null: zeros. And those after the last one.
template <class S>
const S* first_states(const Scan<S>& problem) {
  return problem.h0;
}
template <class S>
const S* first_states(const ScanGradients<S>& problem) {
  return problem.d_h_n;
}
template <class S>
S* last_states(const Scan<S>& problem) {
  return problem.h_n;
}
template <class S>
S* last_states(const ScanGradients<S>& problem) {
  return problem.d_h0;
}

// Whether chunks of steps would add to the same gradients.
template <class S>
bool shares_results(const Scan<S>&) {
  return false;
}
template <class S>
bool shares_results(const ScanGradients<S>& problem) {
  return problem.d_reset_h != nullptr;
}

// Collects whether all results can be streamed, and the bytes of all matrices.
class Traffic {
 public:
  explicit Traffic(const ScanShape& shape) : shape_(shape) {}
  template <class S>
  void read(const S* data) {
    if (data != nullptr) bytes_ += shape_.steps * shape_.columns * std::int64_t(sizeof(S));
  }
  template <class S>
  void write(const S* data, std::int64_t stride) {
    constexpr std::uintptr_t kLine = 64;
    read(data);
    if (data == nullptr) return;
    can_stream_ = can_stream_ &&
                  shape_.steps * shape_.batch * stride * std::int64_t(sizeof(S)) < kMappedBytes &&
                  reinterpret_cast<std::uintptr_t>(data) % kLine == 0 &&
                  std::uintptr_t(stride) * sizeof(S) % kLine == 0;
  }
  template <class S>
  bool streams() const {
    return sizeof(S) >= 4 && can_stream_ && bytes_ >= kStreamBytes &&
           std::uintptr_t(shape_.units) * sizeof(S) % 64 == 0;
  }

 private:
  const ScanShape& shape_;
  std::int64_t bytes_ = 0;
  bool can_stream_ = true;
};
template <class S>
bool streams(const Scan<S>& problem) {
  Traffic traffic(problem.shape);
  for (const auto& in : problem.in) traffic.read(in.data);
  traffic.write(problem.h, problem.shape.units);
  traffic.write(problem.y, problem.shape.units);
  return traffic.streams<S>();
}
template <class S>
bool streams(const ScanGradients<S>& problem) {
  Traffic traffic(problem.shape);
  for (const auto& in : problem.in) traffic.read(in.data);
  for (const auto& d_in : problem.d_in) traffic.write(d_in.data, d_in.stride);
  traffic.read(problem.d_y);
  traffic.read(problem.h);
  return traffic.streams<S>();
}

std::int64_t blocks_of(const ScanShape& shape) {
  return shape.batch * divide_up(shape.units, kScanBlock);
}

template <class Problem, class S>
class ScanJob {
 public:
  using Value = ScanSum<S>;

  ScanJob(const Problem& problem, const ScanPlan& plan)
      : problem_(problem),
        kernels_(kernels(problem)),
        plan_(plan),
        threads_(plan.groups * plan.chunks),
        blocks_(blocks_of(problem.shape)),
        streams_(streams(problem)),
        // the states of each chunk, then products and barriers
        workspace_(std::size_t(blocks_ * kRowBytes * plan.chunks * (plan.chunks > 1 ? 3 : 1)) +
                   Barrier::kBytes * std::size_t(threads_ + 1)),
        barrier_(threads_, aligned(workspace_.data())) {}

  void run(ParallelFor parallel_for) {
    run_team(
        threads_, parallel_for,
        [](void* job, int rank, int size) { static_cast<ScanJob*>(job)->run_rank(rank, size); },
        this);
  }

 private:
  static constexpr std::int64_t kRowBytes = kScanBlock * std::int64_t(sizeof(Value));

  static void* aligned(void* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return reinterpret_cast<void*>((address + Barrier::kBytes - 1) / Barrier::kBytes *
                                   Barrier::kBytes);
  }
  // Values of all blocks.
  Value* row(std::int64_t index) const {
    char* rows =
        static_cast<char*>(aligned(workspace_.data())) + std::int64_t(Barrier::kBytes) * threads_;
    return reinterpret_cast<Value*>(rows + index * blocks_ * kRowBytes);
  }
  Value* state(int chunk) const { return row(chunk); }
  Value* end(int chunk) const { return row(plan_.chunks + chunk); }
  Value* product(int chunk) const { return row(2 * plan_.chunks + chunk); }

  void run_rank(int rank, int size) {
    const ScanShape& shape = problem_.shape;
    if (size < threads_)  // a smaller or nested region
      return run_in_order({0, blocks_, 0, shape.steps, streams_});
    const int group = rank / plan_.chunks, chunk = rank % plan_.chunks;
    const std::int64_t begin = block_of(group), first = step_of(chunk);
    const ScanPart part = {begin, block_of(group + 1) - begin, first, step_of(chunk + 1) - first,
                           streams_};
    if (plan_.chunks == 1) return run_in_order(part);
    const std::int64_t from = begin * kScanBlock, to = from + part.blocks * kScanBlock;
    if (chunk + 1 < plan_.chunks)
      kernels_.summarize(problem_, part, end(chunk) + from, product(chunk) + from);
    load_first_states(part, state(chunk));
    barrier_.arrive(rank);
    barrier_.wait(rank, group * plan_.chunks, plan_.chunks);
    if (!is_finite(state(chunk), from, to)) {
      if (chunk == 0) run_in_order({begin, part.blocks, 0, shape.steps, streams_});
      return;
    }
    Value* own = state(chunk);
    for (int before = 0; before < chunk; ++before)
      for (std::int64_t c = from; c < to; ++c)
        own[c] = product(before)[c] * own[c] + end(before)[c];
    kernels_.run(problem_, part, own + from);
    if (chunk + 1 == plan_.chunks) store_last_states(part, own);
  }

  void run_in_order(const ScanPart& part) {
    Value* own = state(0);
    load_first_states(part, own);
    kernels_.run(problem_, part, own + part.first_block * kScanBlock);
    store_last_states(part, own);
  }

  // Calls function(index in a state, index in a state of the caller) for the values of a part.
  template <class Function>
  void for_each_value(const ScanPart& part, const Function& function) {
    const std::int64_t units = problem_.shape.units;
    const std::int64_t per_sequence = divide_up(units, kScanBlock);
    for (std::int64_t block = part.first_block; block < part.first_block + part.blocks; ++block) {
      const std::int64_t first = block % per_sequence * kScanBlock;
      const std::int64_t row = block / per_sequence * units;
      for (std::int64_t c = 0; c < std::min(kScanBlock, units - first); ++c)
        function(block * kScanBlock + c, row + first + c);
    }
  }
  void load_first_states(const ScanPart& part, Value* states) {
    const std::int64_t from = part.first_block * kScanBlock;
    std::fill(states + from, states + from + part.blocks * kScanBlock, Value(0));
    const S* given = first_states(problem_);
    if (given == nullptr) return;
    for_each_value(
        part, [&](std::int64_t at, std::int64_t column) { states[at] = widened(given[column]); });
  }
  void store_last_states(const ScanPart& part, const Value* states) {
    S* to = last_states(problem_);
    if (to == nullptr) return;
    for_each_value(part,
                   [&](std::int64_t at, std::int64_t column) { round_to(states[at], to[column]); });
  }

  // Whether the first states and the summaries of all chunks are finite.
  bool is_finite(const Value* first, std::int64_t from, std::int64_t to) const {
    for (std::int64_t c = from; c < to; ++c)
      if (!std::isfinite(first[c])) return false;
    for (int chunk = 0; chunk + 1 < plan_.chunks; ++chunk)
      for (std::int64_t c = from; c < to; ++c)
        if (!std::isfinite(end(chunk)[c]) || !std::isfinite(product(chunk)[c])) return false;
    return true;
  }

  std::int64_t block_of(int group) const { return blocks_ * group / plan_.groups; }
  std::int64_t step_of(int chunk) const { return problem_.shape.steps * chunk / plan_.chunks; }

  const Problem& problem_;
  const ScanKernels<Problem, Value>& kernels_;
  const ScanPlan plan_;
  const int threads_;
  const std::int64_t blocks_;
  const bool streams_;
  const Workspace workspace_;
  Barrier barrier_;
};

template <class S, class Problem>
void run(const Problem& problem, int threads, ParallelFor parallel_for) {
  const ScanShape& shape = problem.shape;
  if (shape.columns == 0) return;
  const auto plan_for = [&](int most) {
    ScanPlan plan = make_scan_plan(shape, problem.cell, sizeof(S), most);
    if (shares_results(problem)) plan.chunks = 1;
    return plan;
  };
  ScanPlan plan = plan_for(threads);
  const int wanted = plan.groups * plan.chunks;
  const ThreadReservation reservation(wanted, wanted == 1 ? 1 : std::min(threads, usable_cpus()));
  if (reservation.threads() < wanted) plan = plan_for(reservation.threads());
  ScanJob<Problem, S>(problem, plan).run(parallel_for);
}

}  // namespace

ScanPlan make_scan_plan(const ScanShape& shape, ScanCell cell, int element_bytes, int threads) {
  const int bound = max_threads();
  std::int64_t most = std::min(bound > 0 ? std::min(threads, bound) : threads, kMaxTeam);
  const std::int64_t row_bytes = shape.columns * element_bytes;
  const std::int64_t thread_bytes = cell == ScanCell::kLinear ? kThreadBytes : kGatedThreadBytes;
  most = std::max<std::int64_t>(std::min(most, shape.steps * row_bytes / thread_bytes), 1);
  std::int64_t groups = std::max<std::int64_t>(std::min(most, row_bytes / kGroupBytes), 1);
  groups = std::min(groups, std::max<std::int64_t>(blocks_of(shape), 1));
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
