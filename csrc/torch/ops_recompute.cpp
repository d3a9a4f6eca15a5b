// The operators for training that computes the saved values again (cpu/recompute.h).
#include "cpu/recompute.h"

#include <algorithm>
#include <cstring>

#include "torch/problems.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

void check_chunk(const LayerArguments& layer, int64_t chunk) {
  FASTRNN_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk, ".");
  FASTRNN_CHECK(!layer.single && layer.steps >= 1, "x must have at least one step, got none.");
}

// The larger number of chunks of a direction.
int64_t chunk_count(const LayerArguments& layer, int64_t chunk) {
  int64_t count = cpu::chunk_count(layer.shape(0), chunk);
  if (layer.packed && layer.directions == 2)
    count = std::max(count, cpu::chunk_count(layer.shape(1), chunk));
  return count;
}

template <class S, class A>
void run_forward(const LayerArguments& layer, const Rows& x, const ForwardOutputs& outputs,
                 const Tensor& states, int64_t chunk) {
  LayerForward<S, A> problems[cpu::kMaxDirections];
  A* of_direction[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = forward_problem<S, A>(layer, d, x, outputs);
    of_direction[d] = output_of<A>(states, d);
  }
  cpu::forward_in_chunks(problems, int(layer.directions), chunk, of_direction, threads(),
                         parallel_for);
}

FourTensors recurrent_chunked_forward(Tensor x, Tensor h0, std::optional<Tensor> c0,
                                      std::vector<Tensor> weights, int64_t slots,
                                      std::optional<std::vector<Tensor>> sequence,
                                      StringHandle cell_handle, int64_t chunk) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const ScalarType dtype = checked_dtype("x", x), compute = accumulate_type(dtype);
    const auto run = [&](ScalarType type, auto&& function) {
      const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, type);
      check_input(layer, x);
      check_chunk(layer, chunk);
      // A cell that saves no values runs as one chunk, whose state nothing reads.
      const bool kept = layer.cell->saved > 0;
      const int64_t length = kept ? chunk : layer.steps;
      const ForwardOutputs results(layer, false, x);
      const Tensor states = empty(
          {layer.directions, chunk_count(layer, length), cpu::chunk_state_size(layer.shape(0))},
          accumulate_type(type), x);
      function(layer, Rows(layer.to_compute(x)), results, states, length);
      auto [y, h_n, c_n, saved] = results.tensors(layer);
      return FourTensors(y, h_n, c_n, kept ? states : saved);
    };
    if (dtype == ScalarType::BFloat16) {
      const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, dtype);
      if (cpu::computes_bfloat16(layer.shape(0))) return run(dtype, run_forward<Bfloat16, float>);
    }
    return compute == ScalarType::Double ? run(compute, run_forward<double, double>)
                                         : run(compute, run_forward<float, float>);
  });
}

// Backward holds d_pre of a chunk only.
Tensor no_rows(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return empty({sizes[0], 0, 0}, dtype, like);
}

TwelveTensors recurrent_chunked_gradients(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                                          std::optional<Tensor> d_c_n, Tensor x, Tensor h0,
                                          std::optional<Tensor> c0, std::vector<Tensor> weights,
                                          int64_t slots,
                                          std::optional<std::vector<Tensor>> sequence, Tensor y,
                                          Tensor states, StringHandle cell_handle, int64_t outputs,
                                          int64_t chunk) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const ScalarType dtype = checked_dtype("x", x), compute = accumulate_type(dtype);
    const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, compute);
    check_input(layer, x);
    check_chunk(layer, chunk);
    FASTRNN_CHECK(layer.cell->parameters == 0 && layer.proj_size == 0,
                  "weights must hold neither w_unit nor w_hr, got one.");
    if (layer.cell->saved > 0)
      check_kept(
          layer, "states", states,
          {layer.directions, chunk_count(layer, chunk), cpu::chunk_state_size(layer.shape(0))});
    check_gradients(layer, y, d_y, d_h_n, d_c_n);
    const BackwardInputs inputs(layer, y, states, d_y, d_h_n, d_c_n);
    const BackwardOutputs walked(layer, x, no_rows);
    GradientOutputs products(layer, x, weights, slots, outputs, empty, empty);
    const bool need_x = has_slot(outputs, kDX);
    if (need_x && layer.hidden_size == 0)  // a product over no units writes nothing
      std::memset(products.d_x.data_ptr(), 0,
                  size_t(layer.rows * layer.input_size * value_bytes(compute)));
    const Rows x_rows(layer.to_compute(x));

    // S: the type in which forward reads the tensors of `stored` and its x.
    const auto run = [&](auto of_forward, auto accumulator, const LayerArguments& stored,
                         const Rows& stored_x) {
      using S = decltype(of_forward);
      using A = decltype(accumulator);
      for (int64_t d = 0; d < layer.directions; ++d) {
        cpu::ChunkedBackward<S, A> problem{};
        problem.forward = forward_inputs<S, A>(stored, d, stored_x);
        problem.directions = int(layer.directions);
        problem.backward = backward_problem<A, A>(layer, d, inputs, walked);
        problem.gradients = gradient_problem<A>(layer, d, x_rows, inputs.y, products, need_x);
        if (layer.cell->saved > 0) problem.states = input_of<A>(states, d);
        cpu::backward_in_chunks(problem, chunk, threads(), parallel_for);
      }
    };
    if (dtype == ScalarType::BFloat16 && cpu::computes_bfloat16(layer.shape(0))) {
      const LayerArguments stored("x", x, h0, c0, weights, slots, sequence, cell, dtype);
      run(Bfloat16{}, float(), stored, Rows(x));
    } else if (compute == ScalarType::Double) {
      run(double(), double(), layer, x_rows);
    } else {
      run(float(), float(), layer, x_rows);
    }
    for (Tensor& d_weight : products.d_weights) d_weight = layer.from_compute(d_weight);
    for (size_t i = products.d_weights.size(); i < 2 * kGradientsPerDirection; ++i)
      products.d_weights.push_back(placeholder(dtype, x));
    auto [d_pre, d_h_all, d_h0, d_c0] = walked.tensors(layer);
    return std::tuple_cat(FourTensors(layer.from_compute(products.d_x), d_h0, d_c0, d_h_all),
                          four(products.d_weights, 0), four(products.d_weights, 4));
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent_chunked_forward", TORCH_BOX(&fastrnn::recurrent_chunked_forward));
  m.impl("recurrent_chunked_gradients", TORCH_BOX(&fastrnn::recurrent_chunked_gradients));
}
