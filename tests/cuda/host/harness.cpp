// CUDA schedules on the host: the source of csrc/cuda on a machine of plain loops and, for kernels
// whose threads cooperate, fibers (threads.h). tests/cuda/test_cuda_host.py compiles this file into
// a library of C functions and calls it.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#include "cuda/machine/grid.h"
#include "cuda/schedules/persistent/persistent.h"
#include "cuda/schedules/runner.h"
#include "cuda/schedules/stepwise/stepwise.h"
#include "threads.h"

namespace {

using namespace fastrnn;
using cuda::BFloat16;
using cuda::Float16;

// Synchronisations that a thread can skip, to test that the tests notice.
enum Forget : std::int64_t {
  kNothing,
  kSyncOfWeights,   // the first barrier of a block: the weights are packed;
  kSyncOfProducts,  // then alternating: all partial sums are written,
  kSyncOfArrival,   // the states of the block are written
  kWait,            // wait for other blocks
  kSyncOfWarp,      // all lanes have waited
};

class ForgetfulThread : public fastrnn::test::HostThread {
 public:
  ForgetfulThread(const HostThread& thread, std::int64_t forget)
      : HostThread(thread), forget_(forget) {}

  void sync() {
    const std::int64_t which = syncs_ == 0       ? kSyncOfWeights
                               : syncs_ % 2 == 1 ? kSyncOfProducts
                                                 : kSyncOfArrival;
    ++syncs_;
    if (which != forget_) HostThread::sync();
  }
  void wait(const std::uint64_t* flag, std::uint64_t at_least) {
    if (forget_ != kWait) HostThread::wait(flag, at_least);
  }
  void sync_warp() {
    if (forget_ != kSyncOfWarp) HostThread::sync_warp();
  }

 private:
  std::int64_t forget_, syncs_ = 0;
};

// Runs the independent threads of a pointwise launch one by one, in ascending or descending order.
class Host {
 public:
  Host(bool descending, std::uint64_t seed, std::int64_t forget, std::int64_t resident)
      : descending_(descending), seed_(seed), forget_(forget), resident_(resident) {}

  template <class S, class C>
  void multiply(const cuda::Product<S, C>& p) const {
    using A = cuda::Accumulate<S>;
    for (std::int64_t i = 0; i < p.m; ++i) {
      for (std::int64_t j = 0; j < p.n; ++j) {
        C& to = p.c[i * p.c_stride + j];
        A sum = p.add ? A(cuda::widen(to)) : A(0);
        for (std::int64_t k = 0; k < p.k; ++k)
          sum += cuda::widen(p.a[i * p.a_stride + k]) *
                 cuda::widen(p.transposed ? p.w[j * p.w_stride + k] : p.w[k * p.w_stride + j]);
        to = cuda::narrow<C>(sum);
      }
    }
  }

  template <class Body>
  void for_each(std::int64_t rows, std::int64_t columns, const Body& body) const {
    if (rows <= 0 || columns == 0) return;
    const cuda::Grid grid = cuda::grid_for(rows, columns);
    const std::int64_t threads = grid.blocks * grid.height * grid.width;
    for (std::int64_t i = 0; i < threads; ++i) {
      const std::int64_t thread = descending_ ? threads - 1 - i : i;
      const unsigned x = unsigned(thread % grid.width);
      const unsigned y = unsigned(thread / grid.width % grid.height);
      const unsigned block = unsigned(thread / (grid.width * grid.height));
      const cuda::Element at = cuda::element_of(grid, block, x, y);
      if (at.is_inside) body(at.row, at.column);
    }
  }

  void clear(void* memory, std::size_t bytes) const { std::memset(memory, 0, bytes); }
  template <class T>
  void upload(T* to, const T* from, std::size_t count) const {
    std::copy(from, from + count, to);
  }

  // As on a GPU, a kernel gets its shared memory only after a query of its resident blocks, and
  // runs at most that many blocks.
  template <class Body>
  int blocks_per_multiprocessor(std::int64_t shared_bytes, const cuda::Chip& chip) {
    asked_ = &typeid(Body);
    most_blocks_ = shared_bytes <= chip.shared_bytes ? chip.multiprocessors * resident_ : 0;
    return int(resident_);
  }

  template <class Body>
  void walk(const Body& body, int blocks, std::int64_t shared_bytes) const {
    if (asked_ == nullptr || *asked_ != typeid(Body) || blocks > most_blocks_)
      throw std::runtime_error("A kernel was launched that had not been asked about.");
    const fastrnn::test::Launch launch{unsigned(blocks), unsigned(cuda::kWalkThreads),
                                       std::size_t(shared_bytes), seed_};
    fastrnn::test::run(launch, [&](const fastrnn::test::HostThread& plain) {
      ForgetfulThread thread(plain, forget_);
      body(thread);
    });
  }

 private:
  bool descending_;
  std::uint64_t seed_;
  std::int64_t forget_;
  std::int64_t resident_;
  const std::type_info* asked_ = nullptr;  // the kernel that may run
  std::int64_t most_blocks_ = 0;
};

// One direction of one layer, filled in by test_cuda_host.py.
struct Call {
  std::int64_t arithmetic;  // in the order of cuda::Arithmetic
  std::int64_t cell, reverse, steps, batch, input_size, hidden_size, proj_size;
  std::int64_t choice;                         // 0: automatic, n: the n-th schedule of the table
  std::int64_t multiprocessors, shared_bytes;  // the GPU
  std::int64_t resident;                       // blocks that a multiprocessor can hold
  std::int64_t chunk_rows;                     // replaces that of the plan, if not 0
  std::int64_t descending, seed, forget;       // order of threads, skipped synchronisation
  const std::int64_t *step_offset, *step_rows;
  const void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *w_unit;
  std::int64_t w_ih_stride, w_hh_stride, w_hr_stride;
  const void* x;
  std::int64_t x_stride;
  const void *h0, *c0;
  void* y;
  std::int64_t y_stride;
  void *h_n, *c_n, *saved;
  const void* d_y;
  std::int64_t d_y_stride;
  const void *d_h_n, *d_c_n, *d_c_steps;
  void *d_pre, *d_h_all, *d_h0, *d_c0;
  const void *resets, *reset_h, *reset_c;
  std::int64_t reset_h_stride, reset_c_stride;
  void *d_reset_h, *d_reset_c;
};

template <class T>
void put(T*& to, const void* from) {
  to = static_cast<T*>(const_cast<void*>(from));
}

// Arguments common to both passes.
template <class Problem>
void fill(const Call& call, Problem& problem) {
  const Sequence sequence = {call.steps, call.batch, call.reverse != 0, call.step_offset,
                             call.step_rows};
  problem.shape = {CellKind(call.cell), sequence, call.input_size, call.hidden_size,
                   call.proj_size};
  put(problem.weights.w_ih, call.w_ih);
  put(problem.weights.w_hh, call.w_hh);
  put(problem.weights.b_ih, call.b_ih);
  put(problem.weights.b_hh, call.b_hh);
  put(problem.weights.w_hr, call.w_hr);
  put(problem.weights.w_unit, call.w_unit);
  problem.weights.w_ih_stride = call.w_ih_stride;
  problem.weights.w_hh_stride = call.w_hh_stride;
  problem.weights.w_hr_stride = call.w_hr_stride;
  put(problem.h0, call.h0);
  put(problem.c0, call.c0);
  put(problem.y, call.y);
  problem.y_stride = call.y_stride;
  put(problem.saved, call.saved);
  put(problem.resets.mask, call.resets);
  put(problem.resets.h, call.reset_h);
  put(problem.resets.c, call.reset_c);
  problem.resets.h_stride = call.reset_h_stride;
  problem.resets.c_stride = call.reset_c_stride;
}

template <class S>
cuda::Plan plan_of(const Call& call, const LayerShape& shape, int directions, cuda::Pass pass,
                   Host& host) {
  const cuda::Chip chip = {9, int(call.multiprocessors), int(call.shared_bytes)};
  const cuda::Choice choice =
      call.choice == 0 ? std::nullopt : cuda::Choice(cuda::Schedule(call.choice - 1));
  const cuda::Request request{shape,
                              directions,
                              pass,
                              cuda::Arithmetic(call.arithmetic),
                              chip,
                              choice,
                              call.d_c_steps != nullptr,
                              call.resets != nullptr};
  cuda::Plan plan = cuda::make_plan_on<S>(request, host);
  if (call.chunk_rows > 0) plan.chunk_rows = call.chunk_rows;
  return plan;
}
Host host_of(const Call& call) {
  return {call.descending != 0, std::uint64_t(call.seed), call.forget, call.resident};
}

// Memory that reads as NaN in every floating point type until it is written.
std::vector<char> poisoned(std::size_t bytes) { return std::vector<char>(bytes, char(0xff)); }

// One call per direction.
template <class S>
bool forward(const Call* calls, int directions) {
  cuda::Forward<S> problems[2]{};
  for (int d = 0; d < directions; ++d) {
    fill(calls[d], problems[d]);
    put(problems[d].x, calls[d].x);
    problems[d].x_stride = calls[d].x_stride;
    put(problems[d].h_n, calls[d].h_n);
    put(problems[d].c_n, calls[d].c_n);
  }
  const LayerShape& shape = problems[0].shape;
  Host host = host_of(calls[0]);
  const cuda::Plan plan = plan_of<S>(calls[0], shape, directions, cuda::Pass::kForward, host);
  const auto& runner = cuda::runner_of<S, Host>(plan);
  auto workspace = poisoned(runner.workspace_bytes(shape, directions, plan, cuda::Pass::kForward));
  runner.forward(problems, directions, plan, workspace.data(), host);
  return plan.schedule->name == std::string("persistent");
}

template <class S>
bool backward(const Call* calls, int directions) {
  cuda::Backward<S> problems[2]{};
  for (int d = 0; d < directions; ++d) {
    fill(calls[d], problems[d]);
    put(problems[d].d_y, calls[d].d_y);
    problems[d].d_y_stride = calls[d].d_y_stride;
    put(problems[d].d_h_n, calls[d].d_h_n);
    put(problems[d].d_c_n, calls[d].d_c_n);
    put(problems[d].d_c_steps, calls[d].d_c_steps);
    put(problems[d].d_pre, calls[d].d_pre);
    put(problems[d].d_h_all, calls[d].d_h_all);
    put(problems[d].d_h0, calls[d].d_h0);
    put(problems[d].d_c0, calls[d].d_c0);
    put(problems[d].d_reset_h, calls[d].d_reset_h);
    put(problems[d].d_reset_c, calls[d].d_reset_c);
  }
  const LayerShape& shape = problems[0].shape;
  Host host = host_of(calls[0]);
  const cuda::Plan plan = plan_of<S>(calls[0], shape, directions, cuda::Pass::kBackward, host);
  const auto& runner = cuda::runner_of<S, Host>(plan);
  auto workspace = poisoned(runner.workspace_bytes(shape, directions, plan, cuda::Pass::kBackward));
  runner.backward(problems, directions, plan, workspace.data(), host);
  return plan.schedule->name == std::string("persistent");
}

std::string failure;  // message of the last failed run

// Returns 1 if the persistent schedule ran, 0 if the stepwise one ran, -1 on failure.
template <class Run>
std::int64_t guarded(const Run& run) {
  try {
    return run() ? 1 : 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return -1;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT std::int64_t call_bytes() { return sizeof(Call); }

EXPORT const char* last_failure() { return failure.c_str(); }

EXPORT std::int64_t run_forward(const Call* calls, std::int64_t directions) {
  bool (*const run[])(const Call*, int) = {forward<Float16>, forward<BFloat16>, forward<float>,
                                           forward<float>, forward<double>};
  return guarded([&] { return run[calls->arithmetic](calls, int(directions)); });
}

EXPORT std::int64_t run_backward(const Call* calls, std::int64_t directions) {
  bool (*const run[])(const Call*, int) = {backward<Float16>, backward<BFloat16>, backward<float>,
                                           backward<float>, backward<double>};
  return guarded([&] { return run[calls->arithmetic](calls, int(directions)); });
}

// Returns the rows per input product and the bytes of workspace of a forward pass.
EXPORT void plan_forward(const Call* call, std::int64_t* chunk_rows,
                         std::int64_t* workspace_bytes) {
  cuda::Forward<float> problem{};
  fill(*call, problem);
  Host host = host_of(*call);
  const cuda::Plan plan = plan_of<float>(*call, problem.shape, 1, cuda::Pass::kForward, host);
  *chunk_rows = plan.chunk_rows;
  *workspace_bytes = std::int64_t(cuda::runner_of<float, Host>(plan).workspace_bytes(
      problem.shape, 1, plan, cuda::Pass::kForward));
}

// Returns the index of a partial sum of the persistent schedule in shared memory.
EXPORT std::int64_t partial_at(std::int64_t column_tiles, std::int64_t row, std::int64_t column) {
  return cuda::partial_at(int(column_tiles), int(row), int(column));
}

// Conversions of the half types, dtype as above.
EXPORT void widen_all(std::int64_t dtype, const std::uint16_t* from, float* to,
                      std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    to[i] = dtype == 0 ? cuda::widen(Float16{from[i]}) : cuda::widen(BFloat16{from[i]});
}
EXPORT void narrow_all(std::int64_t dtype, const float* from, std::uint16_t* to,
                       std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    to[i] = dtype == 0 ? cuda::narrow<Float16>(from[i]).bits : cuda::narrow<BFloat16>(from[i]).bits;
}
