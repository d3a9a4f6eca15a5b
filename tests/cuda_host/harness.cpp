// The GPU's stepwise schedule on the host: the same text as in csrc/cuda, on a machine of plain
// loops. tests/test_cuda_host.py compiles this into a library of C functions and calls it.
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/grid.h"
#include "cuda/stepwise.h"

namespace {

using namespace fastrnn;
using cuda::BFloat16;
using cuda::Float16;

// The threads of a launch, which run in any order, run here one by one in ascending or descending
// order.
class Host {
 public:
  explicit Host(bool descending) : descending_(descending) {}

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

 private:
  bool descending_;
};

// One direction of one layer, as test_cuda_host.py fills it in.
struct Call {
  std::int64_t dtype;  // 0: float16, 1: bfloat16, 2: float32, 3: float64
  std::int64_t cell, reverse, steps, batch, input_size, hidden_size, proj_size;
  std::int64_t chunk_rows;  // instead of the plan's, if not 0
  std::int64_t descending;
  const std::int64_t *step_offset, *step_rows;
  const void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
  std::int64_t w_ih_stride, w_hh_stride, w_hr_stride;
  const void* x;
  std::int64_t x_stride;
  const void *h0, *c0;
  void* y;
  std::int64_t y_stride;
  void *h_n, *c_n, *saved;
  const void* d_y;
  std::int64_t d_y_stride;
  const void *d_h_n, *d_c_n;
  void *d_pre, *d_h_all, *d_h0, *d_c0;
};

template <class T>
void put(T*& to, const void* from) {
  to = static_cast<T*>(const_cast<void*>(from));
}

// What both passes are asked in the same words.
template <class S, class Problem>
cuda::Plan fill(const Call& call, Problem& problem) {
  problem.shape = {CellKind(call.cell), call.reverse != 0, call.steps,
                   call.batch,          call.input_size,   call.hidden_size,
                   call.proj_size,      call.step_offset,  call.step_rows};
  put(problem.weights.w_ih, call.w_ih);
  put(problem.weights.w_hh, call.w_hh);
  put(problem.weights.b_ih, call.b_ih);
  put(problem.weights.b_hh, call.b_hh);
  put(problem.weights.w_hr, call.w_hr);
  problem.weights.w_ih_stride = call.w_ih_stride;
  problem.weights.w_hh_stride = call.w_hh_stride;
  problem.weights.w_hr_stride = call.w_hr_stride;
  put(problem.h0, call.h0);
  put(problem.c0, call.c0);
  put(problem.y, call.y);
  problem.y_stride = call.y_stride;
  put(problem.saved, call.saved);
  cuda::Plan plan = cuda::make_plan(problem.shape, sizeof(S));
  if (call.chunk_rows > 0) plan.chunk_rows = call.chunk_rows;
  return plan;
}

// Memory that is NaN in every type until it is written.
std::vector<char> poisoned(std::size_t bytes) { return std::vector<char>(bytes, char(0xff)); }

template <class S>
void forward(const Call& call) {
  cuda::Forward<S> problem{};
  const cuda::Plan plan = fill<S>(call, problem);
  put(problem.x, call.x);
  problem.x_stride = call.x_stride;
  put(problem.h_n, call.h_n);
  put(problem.c_n, call.c_n);
  auto workspace = poisoned(cuda::StepwiseForwardLayout<S>(problem.shape, plan).bytes);
  Host host(call.descending != 0);
  cuda::stepwise_forward<S>(problem, plan, workspace.data(), host);
}

template <class S>
void backward(const Call& call) {
  cuda::Backward<S> problem{};
  const cuda::Plan plan = fill<S>(call, problem);
  put(problem.d_y, call.d_y);
  problem.d_y_stride = call.d_y_stride;
  put(problem.d_h_n, call.d_h_n);
  put(problem.d_c_n, call.d_c_n);
  put(problem.d_pre, call.d_pre);
  put(problem.d_h_all, call.d_h_all);
  put(problem.d_h0, call.d_h0);
  put(problem.d_c0, call.d_c0);
  auto workspace = poisoned(cuda::StepwiseBackwardLayout<S>(problem.shape, plan).bytes);
  Host host(call.descending != 0);
  cuda::stepwise_backward<S>(problem, plan, workspace.data(), host);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT std::int64_t call_bytes() { return sizeof(Call); }

EXPORT void run_forward(const Call* call) {
  void (*const run[])(const Call&) = {forward<Float16>, forward<BFloat16>, forward<float>,
                                      forward<double>};
  run[call->dtype](*call);
}

EXPORT void run_backward(const Call* call) {
  void (*const run[])(const Call&) = {backward<Float16>, backward<BFloat16>, backward<float>,
                                      backward<double>};
  run[call->dtype](*call);
}

// Rows of x that are multiplied at a time, and the bytes of workspace of a forward pass.
EXPORT void plan_of(const Call* call, std::int64_t* chunk_rows, std::int64_t* workspace_bytes) {
  cuda::Forward<float> problem{};
  const cuda::Plan plan = fill<float>(*call, problem);
  *chunk_rows = plan.chunk_rows;
  *workspace_bytes = std::int64_t(cuda::StepwiseForwardLayout<float>(problem.shape, plan).bytes);
}

// The conversions of the half types, dtype as above.
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
