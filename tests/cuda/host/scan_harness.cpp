// Linear recurrences of csrc/cuda on the host: the source of the kernels on a machine of plain
// loops. tests/cuda/test_scan_host.py compiles this file into a library and calls it.
#include "cuda/machine/grid.h"
#include "cuda/scan/scan.h"

#include <cstdint>
#include <vector>

namespace {

using namespace fastrnn;

// Runs the independent threads of a launch one by one, in ascending or descending order.
struct Host {
  bool descending;

  template <class Body>
  void for_each(std::int64_t rows, std::int64_t columns, const Body& body) const {
    if (rows <= 0 || columns == 0) return;
    const cuda::Grid grid = cuda::grid_for(rows, columns);
    const std::int64_t threads = grid.blocks * grid.height * grid.width;
    for (std::int64_t i = 0; i < threads; ++i) {
      const std::int64_t thread = descending ? threads - 1 - i : i;
      const unsigned x = unsigned(thread % grid.width);
      const unsigned y = unsigned(thread / grid.width % grid.height);
      const unsigned block = unsigned(thread / (grid.width * grid.height));
      const cuda::Element at = cuda::element_of(grid, block, x, y);
      if (at.is_inside) body(at.row, at.column);
    }
  }
};

// The arguments, in the order of test_scan_host.py.
struct Call {
  std::int64_t cell, positive, reverse, steps, batch, units, chunks, descending;
  const void *in[kMostScanInputs], *bias[kMostScanInputs];
  std::int64_t stride[kMostScanInputs];
  const void *h0, *lengths, *resets, *reset_h;
  std::int64_t reset_stride;
  void *h, *y, *h_n;
  const void *d_y, *d_h_n;
  void* d_in[kMostScanInputs];
  void *d_h0, *d_reset_h;
};

template <class T>
void put(T*& to, const void* from) {
  to = static_cast<T*>(const_cast<void*>(from));
}

template <class S, class Problem>
void run(const Call& call, Problem& problem) {
  problem.shape = {call.steps, call.batch * call.units, call.reverse != 0, call.batch};
  problem.cell = ScanCell(call.cell);
  problem.positive = call.positive != 0;
  for (int i = 0; i < kMostScanInputs; ++i) {
    put(problem.in[i].data, call.in[i]);
    put(problem.in[i].bias, call.bias[i]);
    problem.in[i].stride = call.stride[i];
  }
  put(problem.h0, call.h0);
  put(problem.h, call.h);
  put(problem.marks.lengths, call.lengths);
  put(problem.marks.resets, call.resets);
  put(problem.marks.reset_h, call.reset_h);
  problem.marks.reset_stride = call.reset_stride;
  const cuda::ScanPlan plan = {call.chunks};
  // memory that reads as NaN until it is written
  std::vector<char> workspace(cuda::ScanLayout<cuda::Accumulate<S>>(problem.shape, plan).bytes,
                              char(0xff));
  Host host{call.descending != 0};
  cuda::run_scan_on(problem, plan, workspace.data(), host);
}

template <class S>
void forward(const Call& call) {
  Scan<S> problem{};
  put(problem.y, call.y);
  put(problem.h_n, call.h_n);
  run<S>(call, problem);
}

template <class S>
void backward(const Call& call) {
  ScanGradients<S> problem{};
  put(problem.d_y, call.d_y);
  put(problem.d_h_n, call.d_h_n);
  for (int i = 0; i < kMostScanInputs; ++i) {
    put(problem.d_in[i].data, call.d_in[i]);
    problem.d_in[i].stride = call.stride[i];
  }
  put(problem.d_h0, call.d_h0);
  put(problem.d_reset_h, call.d_reset_h);
  run<S>(call, problem);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT std::int64_t call_bytes() { return sizeof(Call); }

// dtype: float16, bfloat16, float32, float64
EXPORT void run_forward(const Call* call, std::int64_t dtype) {
  void (*const runs[])(const Call&) = {forward<cuda::Float16>, forward<cuda::BFloat16>,
                                       forward<float>, forward<double>};
  runs[dtype](*call);
}
EXPORT void run_backward(const Call* call, std::int64_t dtype) {
  void (*const runs[])(const Call&) = {backward<cuda::Float16>, backward<cuda::BFloat16>,
                                       backward<float>, backward<double>};
  runs[dtype](*call);
}

// The chunks of steps on a GPU of so many multiprocessors.
EXPORT std::int64_t planned_chunks(std::int64_t steps, std::int64_t columns,
                                   std::int64_t multiprocessors, std::int64_t shares_results) {
  return cuda::make_scan_plan({steps, columns, false}, int(multiprocessors), shares_results != 0)
      .chunks;
}
