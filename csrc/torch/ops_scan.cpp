// The operators of linear recurrences on the CPU.
#include "cpu/scan.h"

#include "torch/cpu_layer.h"
#include "torch/scan_operators.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

struct ScansOnCpu {
  using Half = Float16Value;
  using Brain = Bfloat16;
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static Tensor result(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
    return ordinary(sizes, dtype, like);
  }
  template <class S>
  static void run(const Scan<S>& problem, const Tensor&) {
    cpu::scan(problem, threads(), parallel_for);
  }
  template <class S>
  static void run(const ScanGradients<S>& problem, const Tensor&) {
    cpu::scan_gradients(problem, threads(), parallel_for);
  }
};

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { FASTRNN_REGISTER_SCANS(m, fastrnn::ScansOnCpu); }
