// The operators of linear recurrences on the CPU.
#include "cpu/scan.h"

#include <tuple>

#include "torch/cpu_layer.h"
#include "torch/scan_arguments.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

Tensor linear_scan(Tensor a_, Tensor b_, std::optional<Tensor> h0_, bool reverse) {
  return guarded([&] {
    const ScanArguments arguments(a_, reverse);
    const Tensor a = arguments.steps("a", a_), b = arguments.steps("b", b_);
    const std::optional<Tensor> h0 = arguments.state("h0", h0_);
    const Tensor h = ordinary(arguments.sizes, arguments.dtype, a);
    with_storage<Float16Value, Bfloat16>(arguments.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const Scan<S> problem = {arguments.shape, values_of<S>(a), values_of<S>(b), values_of<S>(h0),
                               static_cast<S*>(h.data_ptr())};
      cpu::scan(problem, threads(), parallel_for);
    });
    return h;
  });
}

ThreeTensors linear_scan_gradients(Tensor d_h_, Tensor a_, Tensor h_, std::optional<Tensor> h0_,
                                   bool reverse, bool needs_a) {
  return guarded([&] {
    const ScanArguments arguments(a_, reverse);
    const ScalarType dtype = arguments.dtype;
    const Tensor d_h = arguments.steps("d_h", d_h_), a = arguments.steps("a", a_);
    const Tensor h = arguments.steps("h", h_);
    const std::optional<Tensor> h0 = arguments.state("h0", h0_);
    const Tensor d_a = needs_a ? ordinary(arguments.sizes, dtype, a) : placeholder(dtype, a);
    const Tensor d_b = ordinary(arguments.sizes, dtype, a);
    const Tensor d_h0 = empty(arguments.state_sizes, dtype, a);
    with_storage<Float16Value, Bfloat16>(dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const ScanGradients<S> problem = {arguments.shape,
                                        values_of<S>(d_h),
                                        values_of<S>(a),
                                        values_of<S>(h),
                                        values_of<S>(h0),
                                        needs_a ? static_cast<S*>(d_a.data_ptr()) : nullptr,
                                        static_cast<S*>(d_b.data_ptr()),
                                        static_cast<S*>(d_h0.data_ptr())};
      cpu::scan_gradients(problem, threads(), parallel_for);
    });
    return ThreeTensors(d_a, d_b, d_h0);
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&fastrnn::linear_scan));
  m.impl("linear_scan_gradients", TORCH_BOX(&fastrnn::linear_scan_gradients));
}
