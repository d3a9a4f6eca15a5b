// The operators' schemas and their CPU implementation. Half types are computed in float32: inputs
// and weights are cast before, outputs after; saved, d_pre and d_h_all stay float32.
#include "../cpu/kernels.h"
#include "../cpu/memory.h"

#include "layer_args.h"

namespace fastrnn {
namespace {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch_call(torch_parallel_for(0, n, 1, body, context));
}

int threads() { return int(torch::stable::get_num_threads()); }

// Like empty(), from memory that is kept from one call to the next.
Tensor recycled(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  constexpr int64_t kWorthwhile =
      128 * 1024;  // bytes; below, the allocator's own memory stays warm
  int64_t bytes = dtype == ScalarType::Double ? 8 : 4;
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kWorthwhile) return empty(sizes, dtype, like);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(cpu::take_buffer(bytes), sizes, strides, like.device(), dtype,
                                  [bytes](void* buffer) { cpu::give_buffer(buffer, bytes); });
}

template <class T>
void run(const Layer& layer, const Tensor& x, const ForwardOutputs& outputs) {
  const Rows rows(x);
  for (int64_t d = 0; d < layer.directions; ++d)
    cpu::forward<T>(forward_problem<T, T>(layer, d, rows, outputs), threads(), parallel_for);
}

template <class T>
void run(const Layer& layer, const BackwardInputs& inputs, const BackwardOutputs& outputs) {
  for (int64_t d = 0; d < layer.directions; ++d)
    cpu::backward<T>(backward_problem<T, T>(layer, d, inputs, outputs), threads(), parallel_for);
}

FourTensors layer_forward(Tensor x, Tensor h0, std::optional<Tensor> c0,
                          std::vector<Tensor> weights, std::optional<Tensor> batch_sizes,
                          StringHandle cell_handle, bool save) {
  const std::string cell = take_text(cell_handle);
  const ScalarType compute = accumulate_type(x.scalar_type());
  const Layer layer("x", x, h0, c0, weights, batch_sizes, cell, compute);
  check_input(layer, x);
  const ForwardOutputs outputs(layer, save, x, recycled);
  const Tensor input = cast(x, compute);
  compute == ScalarType::Double ? run<double>(layer, input, outputs)
                                : run<float>(layer, input, outputs);
  return outputs.results(layer);
}

FourTensors layer_backward(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                           std::optional<Tensor> d_c_n, Tensor h0, std::optional<Tensor> c0,
                           std::vector<Tensor> weights, std::optional<Tensor> batch_sizes, Tensor y,
                           Tensor saved, StringHandle cell_handle) {
  const std::string cell = take_text(cell_handle);
  const ScalarType compute = accumulate_type(y.scalar_type());
  const Layer layer("y", y, h0, c0, weights, batch_sizes, cell, compute);
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n);
  const BackwardInputs inputs(layer, y, saved, d_y, d_h_n, d_c_n);
  const BackwardOutputs outputs(layer, y, recycled);
  compute == ScalarType::Double ? run<double>(layer, inputs, outputs)
                                : run<float>(layer, inputs, outputs);
  return outputs.results(layer);
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(fastrnn::kForwardSchema);
  m.def(fastrnn::kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&fastrnn::layer_forward));
  m.impl("layer_backward", TORCH_BOX(&fastrnn::layer_backward));
}
