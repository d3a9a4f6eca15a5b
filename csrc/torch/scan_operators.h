// The operators of linear recurrences, for the CPU and CUDA alike. `Machine` has
//
//   Half, Brain                       the types of float16 and bfloat16 in memory
//   Guard(tensor)                     what a call holds while it runs
//   result(sizes, dtype, like)        a tensor for a result
//   run(problem, like)                runs a Scan or ScanGradients
#pragma once

#include <tuple>

#include "torch/problems.h"
#include "torch/scan_arguments.h"
#include "torch/schemas.h"

namespace fastrnn {

template <class Machine>
struct ScanOperators {
  using OptionalTensor = std::optional<Tensor>;

  static Tensor linear_scan(Tensor a_, Tensor b_, OptionalTensor h0_, bool reverse) {
    return guarded([&] {
      const typename Machine::Guard guard(a_);
      const ScanArguments arguments(a_, reverse);
      const Tensor a = arguments.steps("a", a_), b = arguments.steps("b", b_);
      const OptionalTensor h0 = arguments.state("h0", h0_);
      const Tensor h = Machine::result(arguments.sizes, arguments.dtype, a);
      with_storage<typename Machine::Half, typename Machine::Brain>(arguments.dtype, [&](auto tag) {
        using S = typename decltype(tag)::Type;
        Machine::run(fastrnn::linear_scan(arguments.shape, values_of<S>(a), values_of<S>(b),
                                          values_of<S>(h0), results_of<S>(h)),
                     a);
      });
      return h;
    });
  }

  static ThreeTensors linear_scan_gradients(Tensor d_h_, Tensor a_, Tensor h_, OptionalTensor h0_,
                                            bool reverse, bool needs_a) {
    return guarded([&] {
      const typename Machine::Guard guard(a_);
      const ScanArguments arguments(a_, reverse);
      const ScalarType dtype = arguments.dtype;
      const Tensor d_h = arguments.steps("d_h", d_h_), a = arguments.steps("a", a_);
      const Tensor h = arguments.steps("h", h_);
      const OptionalTensor h0 = arguments.state("h0", h0_);
      const Tensor d_a =
          needs_a ? Machine::result(arguments.sizes, dtype, a) : placeholder(dtype, a);
      const Tensor d_b = Machine::result(arguments.sizes, dtype, a);
      const Tensor d_h0 = empty(arguments.state_sizes, dtype, a);
      with_storage<typename Machine::Half, typename Machine::Brain>(dtype, [&](auto tag) {
        using S = typename decltype(tag)::Type;
        Machine::run(fastrnn::linear_scan_gradients(
                         arguments.shape, values_of<S>(d_h), values_of<S>(a), values_of<S>(h),
                         values_of<S>(h0), needs_a ? results_of<S>(d_a) : nullptr,
                         results_of<S>(d_b), results_of<S>(d_h0)),
                     a);
      });
      return ThreeTensors(d_a, d_b, d_h0);
    });
  }

  static ThreeTensors scan_layer(Tensor pre, OptionalTensor bias, OptionalTensor x,
                                 OptionalTensor h0, OptionalTensor lengths, OptionalTensor resets,
                                 OptionalTensor reset_h, StringHandle cell, bool positive,
                                 bool reverse, bool saves) {
    return guarded([&] {
      const std::string name = consume_string(cell);
      const typename Machine::Guard guard(pre);
      const ScanLayerArguments own(pre, bias, x, h0, lengths, resets, reset_h, name, positive,
                                   reverse);
      const Tensor y = Machine::result(own.sizes, own.dtype, pre);
      const Tensor h_n = empty(own.state_sizes, own.dtype, pre);
      const bool has_states = own.cell->has_output && saves;
      const Tensor states =
          has_states ? Machine::result(own.sizes, own.dtype, pre) : placeholder(own.dtype, pre);
      with_storage<typename Machine::Half, typename Machine::Brain>(own.dtype, [&](auto tag) {
        using S = typename decltype(tag)::Type;
        Scan<S> problem{};
        problem.shape = own.shape;
        problem.cell = own.cell->kind;
        problem.positive = positive;
        own.fill(problem.in);
        problem.h0 = values_of<S>(own.h0);
        if (own.cell->has_output) problem.y = results_of<S>(y);
        if (!own.cell->has_output)
          problem.h = results_of<S>(y);
        else if (has_states)
          problem.h = results_of<S>(states);
        problem.h_n = results_of<S>(h_n);
        problem.marks = own.marks<S>();
        Machine::run(problem, pre);
      });
      return ThreeTensors(y, h_n, states);
    });
  }

  static FourTensors scan_layer_gradients(Tensor d_y_, OptionalTensor d_h_n_, Tensor pre,
                                          OptionalTensor bias, OptionalTensor x, Tensor states_,
                                          OptionalTensor h0, OptionalTensor lengths,
                                          OptionalTensor resets, OptionalTensor reset_h,
                                          StringHandle cell, bool positive, bool reverse) {
    return guarded([&] {
      const std::string name = consume_string(cell);
      const typename Machine::Guard guard(pre);
      const ScanLayerArguments own(pre, bias, x, h0, lengths, resets, reset_h, name, positive,
                                   reverse);
      const ScalarType dtype = own.dtype, sums = accumulate_type(dtype);
      const Tensor d_y = own.checked("d_y", d_y_, own.sizes);
      const OptionalTensor d_h_n =
          d_h_n_ ? std::optional(own.checked("d_h_n", *d_h_n_, own.state_sizes)) : std::nullopt;
      const Tensor states = own.checked("states", states_, own.sizes);
      const Tensor d_pre = Machine::result(own.pre_sizes, dtype, pre);
      const Tensor d_x = x ? Machine::result(own.sizes, dtype, pre) : placeholder(dtype, pre);
      const Tensor d_h0 = empty(own.state_sizes, dtype, pre);
      Tensor d_reset_h =
          own.reset_h ? empty(sizes_of(*own.reset_h), sums, pre) : placeholder(sums, pre);
      if (own.reset_h) torch::stable::zero_(d_reset_h);
      with_storage<typename Machine::Half, typename Machine::Brain>(dtype, [&](auto tag) {
        using S = typename decltype(tag)::Type;
        ScanGradients<S> problem{};
        problem.shape = own.shape;
        problem.cell = own.cell->kind;
        problem.positive = positive;
        own.fill(problem.in);
        problem.d_y = values_of<S>(d_y);
        problem.d_h_n = values_of<S>(d_h_n);
        problem.h = values_of<S>(states);
        problem.h0 = values_of<S>(own.h0);
        problem.marks = own.marks<S>();
        for (int64_t i = 0; i < own.gates; ++i)
          problem.d_in[i] = {results_of<S>(d_pre) + i * own.units, own.gates * own.units};
        if (x) problem.d_in[own.gates] = {results_of<S>(d_x), own.units};
        problem.d_h0 = results_of<S>(d_h0);
        if (own.reset_h) problem.d_reset_h = results_of<ScanSum<S>>(d_reset_h);
        Machine::run(problem, pre);
      });
      return FourTensors(d_pre, d_x, d_h0, d_reset_h);
    });
  }
};

}  // namespace fastrnn

// Registers the operators on a device, inside of STABLE_TORCH_LIBRARY_IMPL.
#define FASTRNN_REGISTER_SCANS(m, Machine)                                         \
  m.impl("linear_scan", TORCH_BOX(&fastrnn::ScanOperators<Machine>::linear_scan)); \
  m.impl("linear_scan_gradients",                                                  \
         TORCH_BOX(&fastrnn::ScanOperators<Machine>::linear_scan_gradients));      \
  m.impl("scan_layer", TORCH_BOX(&fastrnn::ScanOperators<Machine>::scan_layer));   \
  m.impl("scan_layer_gradients", TORCH_BOX(&fastrnn::ScanOperators<Machine>::scan_layer_gradients))
