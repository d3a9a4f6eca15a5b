// The operators' schemas and their CPU implementation. Bfloat16 has kernels for tensors as they
// are stored (cpu/bfloat16.h). Otherwise half types are computed in float32: inputs and
// weights are cast before, outputs after. saved, d_pre and d_h_all are float32 either way.
#include "cpu/api.h"
#include "cpu/bfloat16.h"
#include "cpu/runtime/buffer_cache.h"

#include <array>
#include <cstring>

#include "torch/cpu_layer.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

int64_t bytes_of(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  for (const int64_t size : sizes) bytes *= size;
  return bytes;
}

}  // namespace

Tensor ordinary(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(sizes, dtype, like);
  cpu::use_huge_pages(t.data_ptr(), bytes_of(sizes, dtype));
  return t;
}

Tensor recycled(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  constexpr int64_t kWorthwhile =
      128 * 1024;  // bytes; below, the allocator's own memory stays warm
  const int64_t bytes = bytes_of(sizes, dtype);
  if (bytes < kWorthwhile) return empty(sizes, dtype, like);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(cpu::acquire_buffer(bytes), sizes, strides, like.device(), dtype,
                                  [bytes](void* buffer) { cpu::release_buffer(buffer, bytes); });
}

// Beyond malloc's largest threshold fresh pages would come with each call: at T=100,
// B=128, H=256 they cost 4 to 6% of an LSTM's training step on two cores of an AMD EPYC (Zen 5).
Tensor for_saved(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  constexpr int64_t kMapped = 32 * 1024 * 1024;  // bytes
  return (bytes_of(sizes, dtype) < kMapped ? ordinary : recycled)(sizes, dtype, like);
}

namespace {

template <class T>
void run(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs,
         WeightFormat weight_format, const LayerResets& resets) {
  const Rows rows(x);
  LayerForward<T, T> problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = forward_problem<T, T>(layer, d, rows, outputs);
    if (layer.dtype == ScalarType::Float) problems[d].recurrent_format = weight_format;
    problems[d].resets = resets.of<T>(d);
  }
  cpu::forward(problems, int(layer.directions), threads(), parallel_for);
}

// The same in bfloat16 as it is stored.
void run_bfloat16(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs,
                  const LayerResets& resets) {
  const Rows rows(x);
  cpu::Bfloat16Forward problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = forward_problem<Bfloat16, float>(layer, d, rows, outputs);
    problems[d].resets = resets.of<Bfloat16>(d);
  }
  cpu::bfloat16_forward(problems, int(layer.directions), threads(), parallel_for);
}

template <class T>
void run(const LayerArguments& layer, const BackwardInputs& inputs, const BackwardOutputs& outputs,
         const LayerResets& resets = {}) {
  LayerBackward<T, T> problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = backward_problem<T, T>(layer, d, inputs, outputs);
    problems[d].resets = resets.of<T>(d);
    problems[d].d_reset_h = LayerResets::at<T>(resets.d_h, d);
    problems[d].d_reset_c = LayerResets::at<T>(resets.d_c, d);
  }
  cpu::backward(problems, int(layer.directions), threads(), parallel_for);
}

}  // namespace

void run_forward(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs,
                 WeightFormat weight_format, const LayerResets& resets) {
  switch (layer.compute) {
    case ScalarType::BFloat16:
      return run_bfloat16(layer, x, outputs, resets);
    case ScalarType::Double:
      return run<double>(layer, x, outputs, weight_format, resets);
    default:
      return run<float>(layer, x, outputs, weight_format, resets);
  }
}

namespace {

FourTensors forward_of(const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0,
                       const std::vector<Tensor>& weights, int64_t slots,
                       const std::optional<std::vector<Tensor>>& sequence, const std::string& cell,
                       int64_t outputs, WeightFormat format) {
  const ScalarType dtype = checked_dtype("x", x), compute = accumulate_type(dtype);
  if (dtype == ScalarType::BFloat16) {
    const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, dtype);
    check_input(layer, x);
    if (cpu::computes_bfloat16(layer.shape(0))) {
      const ForwardOutputs results(layer, has_slot(outputs, kSaved), x, for_saved);
      run_forward(layer, x, results);
      return results.tensors(layer);
    }
  }
  const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, compute);
  check_input(layer, x);
  const ForwardOutputs results(layer, has_slot(outputs, kSaved), x, for_saved);
  run_forward(layer, layer.to_compute(x), results, format);
  return results.tensors(layer);
}

FourTensors recurrent_forward(Tensor x, Tensor h0, std::optional<Tensor> c0,
                              std::vector<Tensor> weights, int64_t slots,
                              std::optional<std::vector<Tensor>> sequence, StringHandle cell_handle,
                              int64_t outputs, int64_t weight_format) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    FASTRNN_CHECK(weight_format >= 0 && weight_format < kWeightFormatCount,
                  "weight_format must be the number of a format, got ", weight_format, ".");
    return forward_of(x, h0, c0, weights, slots, sequence, cell, outputs,
                      WeightFormat(weight_format));
  });
}

ThreeTensors recurrent_layer(Tensor x, Tensor h0, std::optional<Tensor> c0,
                             std::vector<Tensor> weights, int64_t slots,
                             std::optional<std::vector<Tensor>> sequence, StringHandle cell) {
  auto [y, h_n, c_n, saved] = recurrent_forward(x, h0, c0, weights, slots, sequence, cell, 0, 0);
  return {y, h_n, c_n};
}

FiveTensors recurrent_states(Tensor x, Tensor h0, std::optional<Tensor> c0,
                             std::vector<Tensor> weights, int64_t slots,
                             std::optional<std::vector<Tensor>> sequence,
                             StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    return with_step_states(forward_of(x, h0, c0, weights, slots, sequence, cell,
                                       int64_t(1) << kSaved, WeightFormat(0)),
                            cell);
  });
}

template <class T>
void run(const std::vector<LayerArguments>& layers, const Tensor& x,
         const std::vector<ForwardOutputs>& outputs) {
  std::vector<LayerForward<T, T>> problems;
  std::vector<Rows> inputs;  // may be copies: they stay until the walk is over
  inputs.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    inputs.emplace_back(i == 0 ? x : outputs[i - 1].y);
    problems.push_back(forward_problem<T, T>(layers[i], 0, inputs[i], outputs[i]));
  }
  cpu::forward_stack(problems.data(), int(problems.size()), threads(), parallel_for);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> recurrent_stack(
    Tensor x, std::vector<Tensor> h0, std::vector<Tensor> c0, std::vector<Tensor> weights,
    int64_t slots, std::optional<std::vector<Tensor>> sequence, StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const ScalarType dtype = checked_dtype("x", x);
    const size_t count = h0.size();
    FASTRNN_CHECK(!is_half(dtype), "x must be float32 or float64, got ",
                  torch::headeronly::toString(dtype), ".");
    FASTRNN_CHECK(count > 0, "h0 must hold a tensor for each layer, got none.");
    FASTRNN_CHECK(c0.empty() || c0.size() == count, "c0 must hold as many tensors as h0, ", count,
                  ", or none, got ", c0.size(), ".");
    FASTRNN_CHECK(weights.size() % count == 0, "weights must hold as many tensors for each of the ",
                  count, " layers, got ", weights.size(), ".");
    const size_t each = weights.size() / count;
    std::vector<LayerArguments> layers;
    std::vector<ForwardOutputs> outputs;
    layers.reserve(count);
    outputs.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& input = i == 0 ? x : outputs[i - 1].y;
      layers.emplace_back(
          "x", input, h0[i], c0.empty() ? std::nullopt : std::optional(c0[i]),
          std::vector<Tensor>(weights.begin() + i * each, weights.begin() + (i + 1) * each), slots,
          sequence, cell, dtype);
      FASTRNN_CHECK(layers[i].directions == 1, "h0 must hold states of one direction, got ",
                    layers[i].directions, ".");
      check_input(layers[i], input);
      outputs.emplace_back(layers[i], false, x);
    }
    dtype == ScalarType::Double ? run<double>(layers, x, outputs) : run<float>(layers, x, outputs);
    std::vector<Tensor> h_n, c_n;
    for (const ForwardOutputs& output : outputs) {
      h_n.push_back(output.h_n);
      if (output.c_n) c_n.push_back(*output.c_n);
    }
    return std::tuple(outputs[count - 1].y, h_n, c_n);
  });
}

FourTensors backward_of(const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                        const std::optional<Tensor>& d_c_n, const std::optional<Tensor>& d_c_steps,
                        const Tensor& h0, const std::optional<Tensor>& c0,
                        const std::vector<Tensor>& weights, int64_t slots,
                        const std::optional<std::vector<Tensor>>& sequence, const Tensor& y,
                        const Tensor& saved, const std::string& cell) {
  const ScalarType compute = accumulate_type(checked_dtype("y", y));
  const LayerArguments layer("y", y, h0, c0, weights, slots, sequence, cell, compute);
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
  const BackwardInputs inputs(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
  const BackwardOutputs outputs(layer, y, ordinary);
  compute == ScalarType::Double ? run<double>(layer, inputs, outputs)
                                : run<float>(layer, inputs, outputs);
  return outputs.tensors(layer);
}

FourTensors recurrent_backward(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                               std::optional<Tensor> d_c_n, Tensor h0, std::optional<Tensor> c0,
                               std::vector<Tensor> weights, int64_t slots,
                               std::optional<std::vector<Tensor>> sequence, Tensor y, Tensor saved,
                               StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    return backward_of(d_y, d_h_n, d_c_n, std::nullopt, h0, c0, weights, slots, sequence, y, saved,
                       cell);
  });
}

FourTensors recurrent_states_backward(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                                      std::optional<Tensor> d_c_n, Tensor d_c_steps, Tensor h0,
                                      std::optional<Tensor> c0, std::vector<Tensor> weights,
                                      int64_t slots, std::optional<std::vector<Tensor>> sequence,
                                      Tensor y, Tensor saved, StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    return backward_of(d_y, d_h_n, d_c_n, d_c_steps, h0, c0, weights, slots, sequence, y, saved,
                       cell);
  });
}

template <class T>
void run(const LayerArguments& layer, const Rows& x, const Rows& y, const Tensor& d_pre,
         const GradientOutputs& outputs, bool need_x, const LayerResets& resets) {
  if (need_x && layer.hidden_size == 0)  // a product over no units writes nothing
    std::memset(outputs.d_x.data_ptr(), 0, size_t(layer.rows * layer.input_size) * sizeof(T));
  LayerGradients<T> problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = gradient_problem<T>(layer, d, x, y, outputs, need_x);
    problems[d].d_pre = input_of<T>(d_pre, d);
    problems[d].resets = resets.of<T>(d);
  }
  cpu::gradients(problems, int(layer.directions), threads(), parallel_for);
}

// The same with x, y, h0 and w_ih in bfloat16 as they are stored.
void run_bfloat16(const LayerArguments& layer, const Rows& x, const Rows& y, const Tensor& d_pre,
                  const GradientOutputs& outputs, bool need_x) {
  if (need_x && layer.hidden_size == 0)  // a product over no units writes nothing
    std::memset(outputs.d_x.data_ptr(), 0, size_t(layer.rows * layer.input_size) * sizeof(float));
  cpu::Bfloat16Gradients problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    cpu::Bfloat16Gradients& problem = problems[d] = {};
    problem.shape = layer.shape(d);
    problem.w_ih = static_cast<const Bfloat16*>(layer.direction[d].w_ih.data);
    problem.w_ih_stride = layer.direction[d].w_ih.stride;
    problem.x = static_cast<const Bfloat16*>(x.data);
    problem.x_stride = x.stride;
    problem.h0 = input_of<Bfloat16>(layer.h0, d);
    problem.y = static_cast<const Bfloat16*>(y.data) + d * layer.out();
    problem.y_stride = y.stride;
    problem.d_pre = input_of<float>(d_pre, d);
    problem.d_x = need_x ? static_cast<float*>(outputs.d_x.data_ptr()) : nullptr;
    problem.add_to_x = d > 0;
    problem.d_w_ih = outputs.weight<float>(d, kWIh);
    problem.d_w_hh = outputs.weight<float>(d, kWHh);
    problem.d_b_ih = outputs.weight<float>(d, kBIh);
    problem.d_b_hh = outputs.weight<float>(d, kBHh);
  }
  cpu::bfloat16_gradients(problems, int(layer.directions), threads(), parallel_for);
}

// The backward time loop with w_hh in bfloat16 as it is stored; `stored`: the layer in bfloat16.
void run_bfloat16(const LayerArguments& layer, const LayerArguments& stored,
                  const BackwardInputs& inputs, const BackwardOutputs& outputs) {
  cpu::Bfloat16Backward problems[cpu::kMaxDirections];
  for (int64_t d = 0; d < layer.directions; ++d) {
    static_cast<LayerBackward<float, float>&>(problems[d]) =
        backward_problem<float, float>(layer, d, inputs, outputs);
    const auto weights = stored.direction[d].view<Bfloat16>();
    problems[d].stored_w_hh = weights.w_hh;
    problems[d].stored_w_hh_stride = weights.w_hh_stride;
  }
  cpu::bfloat16_backward(problems, int(layer.directions), threads(), parallel_for);
}

}  // namespace

Gradients run_gradients(const LayerArguments& layer, const BackwardInputs& inputs, const Tensor& x,
                        const std::vector<Tensor>& weights, int64_t slots, int64_t outputs,
                        Allocate allocate_x, const StoredLayer* stored, const LayerResets& resets) {
  const BackwardOutputs walked(layer, x, ordinary, recycled);
  GradientOutputs products(layer, x, weights, slots, outputs, ordinary, allocate_x);
  const bool need_x = has_slot(outputs, kDX);
  const Rows x_rows(stored != nullptr ? x : layer.to_compute(x));
  if (stored != nullptr) {
    if (cpu::computes_bfloat16_backward(layer.shape(0)))
      run_bfloat16(layer, stored->layer, inputs, walked);
    else
      run<float>(layer, inputs, walked);
    run_bfloat16(stored->layer, x_rows, stored->y, walked.d_pre, products, need_x);
  } else if (layer.compute == ScalarType::Double) {
    run<double>(layer, inputs, walked, resets);
    run<double>(layer, x_rows, inputs.y, walked.d_pre, products, need_x, resets);
  } else {
    run<float>(layer, inputs, walked, resets);
    run<float>(layer, x_rows, inputs.y, walked.d_pre, products, need_x, resets);
  }
  return {products.d_x, walked.d_h0, walked.d_c0, walked.d_h_all, std::move(products.d_weights)};
}

void check_no_parameters(const LayerArguments& layer) {
  FASTRNN_CHECK(layer.cell->parameters == 0,
                "cell must be one without w_unit (recurrent_backward computes the others), got '",
                std::string(layer.cell->name), "'.");
}

namespace {

// The results of recurrent_gradients, for either number of directions: d_x, d_h0, d_c0, d_h_all and
// those of the weights.
std::vector<Tensor> gradients_of(int64_t directions, const std::optional<Tensor>& d_y,
                                 const std::optional<Tensor>& d_h_n,
                                 const std::optional<Tensor>& d_c_n, const Tensor& x,
                                 const Tensor& h0, const std::optional<Tensor>& c0,
                                 const std::vector<Tensor>& weights, int64_t slots,
                                 const std::optional<std::vector<Tensor>>& sequence,
                                 const Tensor& y, const Tensor& saved, const std::string& cell,
                                 int64_t outputs) {
  const ScalarType compute = accumulate_type(checked_dtype("x", x));
  const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, compute);
  FASTRNN_CHECK(layer.directions == directions, "h0 must hold the states of ", directions,
                " direction(s), got ", layer.directions, ".");
  check_no_parameters(layer);
  check_input(layer, x);
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n);
  const BackwardInputs inputs(layer, y, saved, d_y, d_h_n, d_c_n);
  if (layer.dtype == ScalarType::BFloat16 && cpu::computes_bfloat16_gradients(layer.shape(0))) {
    const LayerArguments bfloat16("x", x, h0, c0, weights, slots, sequence, cell, layer.dtype);
    const StoredLayer stored{bfloat16, Rows(y)};
    return run_gradients(layer, inputs, x, weights, slots, outputs, ordinary, &stored)
        .tensors(layer);
  }
  return run_gradients(layer, inputs, x, weights, slots, outputs, ordinary).tensors(layer);
}

EightTensors recurrent_gradients(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                                 std::optional<Tensor> d_c_n, Tensor x, Tensor h0,
                                 std::optional<Tensor> c0, std::vector<Tensor> weights,
                                 int64_t slots, std::optional<std::vector<Tensor>> sequence,
                                 Tensor y, Tensor saved, StringHandle cell_handle,
                                 int64_t outputs) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const std::vector<Tensor> found = gradients_of(1, d_y, d_h_n, d_c_n, x, h0, c0, weights, slots,
                                                   sequence, y, saved, cell, outputs);
    return std::tuple_cat(four(found, 0), four(found, 4));
  });
}

TwelveTensors recurrent_bidirectional_gradients(
    std::optional<Tensor> d_y, std::optional<Tensor> d_h_n, std::optional<Tensor> d_c_n, Tensor x,
    Tensor h0, std::optional<Tensor> c0, std::vector<Tensor> weights, int64_t slots,
    std::optional<std::vector<Tensor>> sequence, Tensor y, Tensor saved, StringHandle cell_handle,
    int64_t outputs) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const std::vector<Tensor> found = gradients_of(2, d_y, d_h_n, d_c_n, x, h0, c0, weights, slots,
                                                   sequence, y, saved, cell, outputs);
    return std::tuple_cat(four(found, 0), four(found, 4), four(found, 8));
  });
}

// The slots of a list without them: `fastrnn::layer` has none. By the number of dimensions of the
// weights, because sizes may be symbols while a stored graph is compiled.
int64_t slots_of(const std::vector<Tensor>& weights) {
  const size_t count = weights.size();
  const bool has_bias = count > 2 && weights[2].dim() == 1;
  const size_t unprojected = has_bias ? 4 : 2;
  const bool is_projected = count == unprojected + 1 || count == 2 * (unprojected + 1);
  FASTRNN_CHECK(is_projected || count == unprojected || count == 2 * unprojected,
                "weights must hold 2 to 5 tensors per direction, got ", count, ".");
  int64_t slots = int64_t(1) << kWIh | int64_t(1) << kWHh;
  if (has_bias) slots |= int64_t(1) << kBIh | int64_t(1) << kBHh;
  if (is_projected) slots |= int64_t(1) << kWHr;
  return slots;
}

// For graphs that were stored before recurrent_layer had its name.
ThreeTensors stored_layer(Tensor x, Tensor h0, std::optional<Tensor> c0,
                          std::vector<Tensor> weights, std::optional<Tensor> batch_sizes,
                          StringHandle cell) {
  return guarded([&] {
    namespace detail = torch::stable::detail;
    int64_t slots = slots_of(weights);
    std::optional<std::vector<Tensor>> sequence;
    if (batch_sizes) {
      slots |= int64_t(1) << kBatchSizes;
      sequence = {*batch_sizes};
    }
    // the call consumes the arguments, the string among them, and leaves the results
    std::array<StableIValue, 7> stack{
        detail::from(x),     detail::from(h0),       detail::from(c0),  detail::from(weights),
        detail::from(slots), detail::from(sequence), detail::from(cell)};
    check_torch(
        torch_call_dispatcher("fastrnn::recurrent_layer", "", stack.data(), TORCH_ABI_VERSION));
    return ThreeTensors(detail::to<Tensor>(stack[0]), detail::to<Tensor>(stack[1]),
                        detail::to<Tensor>(stack[2]));
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(fastrnn::kForwardSchema);
  m.def(fastrnn::kLayerSchema);
  m.def(fastrnn::kStoredLayerSchema);
  m.def(fastrnn::kBackwardSchema);
  m.def(fastrnn::kStatesSchema);
  m.def(fastrnn::kStatesBackwardSchema);
  m.def(fastrnn::kResetForwardSchema);
  m.def(fastrnn::kResetBackwardSchema);
  m.def(fastrnn::kGradientsSchema);
  m.def(fastrnn::kBidirectionalGradientsSchema);
  m.def(fastrnn::kStackSchema);
  m.def(fastrnn::kInt8Schema);
  m.def(fastrnn::kSegmentsSchema);
  m.def(fastrnn::kChunkedForwardSchema);
  m.def(fastrnn::kChunkedGradientsSchema);
  m.def(fastrnn::kRaggedForwardSchema);
  m.def(fastrnn::kRaggedLayerSchema);
  m.def(fastrnn::kRaggedGradientsSchema);
  m.def(fastrnn::kRecurrenceSchema);
  m.def(fastrnn::kRecurrenceGradientsSchema);
  m.def(fastrnn::kRecurrenceProductSchema);
  m.def(fastrnn::kRecurrenceProductGradientsSchema);
  m.def(fastrnn::kScanSchema);
  m.def(fastrnn::kScanGradientsSchema);
  m.def(fastrnn::kScanLayerSchema);
  m.def(fastrnn::kScanLayerGradientsSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastrnn::recurrent_forward));
  m.impl("recurrent_layer", TORCH_BOX(&fastrnn::recurrent_layer));
  m.impl("recurrent_stack", TORCH_BOX(&fastrnn::recurrent_stack));
  m.impl("recurrent_backward", TORCH_BOX(&fastrnn::recurrent_backward));
  m.impl("recurrent_states", TORCH_BOX(&fastrnn::recurrent_states));
  m.impl("recurrent_states_backward", TORCH_BOX(&fastrnn::recurrent_states_backward));
  m.impl("recurrent_gradients", TORCH_BOX(&fastrnn::recurrent_gradients));
  m.impl("recurrent_bidirectional_gradients",
         TORCH_BOX(&fastrnn::recurrent_bidirectional_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("layer", TORCH_BOX(&fastrnn::stored_layer));
}
