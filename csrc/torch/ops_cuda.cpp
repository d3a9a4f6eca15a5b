// The operators on CUDA tensors: checks, outputs and workspace as on the CPU, then kernels on the
// current stream of the tensors' device. saved is float32 for half types, gradients have their own.
#include "cuda/api.h"

#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "torch/problems.h"

namespace fastrnn {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Reads torch's switch for TF32 in cuDNN, whose layers these replace; the stable ABI does not offer
// it, so fastrnn/_library.py brings the function. It is asked at each call: graphs that were made
// before the switch was set obey it too. Without Python TF32 is used, as by cuDNN.
using Switch = int (*)();
std::atomic<Switch> tf32_switch{nullptr};

bool is_tf32_allowed() {
  const Switch ask = tf32_switch.load();
  return ask == nullptr || ask() != 0;
}

// The address of a function without arguments, or 0; returns the one before it.
int64_t read_tf32_from(int64_t address) {
  return reinterpret_cast<int64_t>(tf32_switch.exchange(reinterpret_cast<Switch>(address)));
}

// One CUDA tensor among the arguments is enough to get here.
DeviceGuard on_device_of(const char* name, const Tensor& t) {
  FASTRNN_CHECK(t.is_cuda(), name,
                " must be on a CUDA device like the other tensors, got one that is not.");
  return DeviceGuard(t.get_device_index());
}

// The kernels of one call, for all directions. Their memory goes back to torch's allocator, which
// hands it out again in the order of the stream, so nothing has to wait.
template <class S, class Problem>
void run_kernels(const LayerArguments& layer, const Problem* problems, const Tensor& like) {
  cuda::Context context{};
  check_torch(aoti_torch_get_current_cuda_stream(layer.place.index, &context.stream));
  context.tf32 = layer.dtype == ScalarType::Float && is_tf32_allowed();
  // The handle of the current device and stream.
  check_torch(torch_get_current_cuda_blas_handle(&context.blas));
  const int directions = int(layer.directions);
  const cuda::Plan plan = cuda::plan<S>(problems, directions, context);
  const int64_t bytes = int64_t(cuda::workspace_bytes<S>(problems, directions, plan));
  const Tensor workspace = empty({bytes}, ScalarType::Byte, like);
  cuda::run<S>(problems, directions, plan, workspace.data_ptr(), context);
}

template <class S>
void run(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs) {
  const Rows rows(x);
  cuda::Forward<S> problems[2]{};
  for (int64_t d = 0; d < layer.directions; ++d)
    problems[d] = forward_problem<S, cuda::Accumulate<S>>(layer, d, rows, outputs);
  run_kernels<S>(layer, problems, x);
}

template <class S>
void run(const LayerArguments& layer, const BackwardInputs& inputs,
         const BackwardOutputs& outputs) {
  cuda::Backward<S> problems[2]{};
  for (int64_t d = 0; d < layer.directions; ++d)
    problems[d] = backward_problem<S, cuda::Accumulate<S>>(layer, d, inputs, outputs);
  run_kernels<S>(layer, problems, outputs.d_pre);
}

template <class... Arguments>
void run_in(ScalarType dtype, const Arguments&... arguments) {
  switch (dtype) {
    case ScalarType::Half:
      return run<cuda::Float16>(arguments...);
    case ScalarType::BFloat16:
      return run<cuda::BFloat16>(arguments...);
    case ScalarType::Float:
      return run<float>(arguments...);
    default:  // Layer refuses everything but these four
      return run<double>(arguments...);
  }
}

FourTensors forward_of(const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0,
                       const std::vector<Tensor>& weights, int64_t slots,
                       const std::optional<std::vector<Tensor>>& sequence, const std::string& cell,
                       int64_t outputs) {
  const LayerArguments layer("x", x, h0, c0, weights, slots, sequence, cell, checked_dtype("x", x));
  check_input(layer, x);
  const ForwardOutputs results(layer, has_slot(outputs, kSaved), x);
  run_in(layer.dtype, layer, x, results);
  return results.tensors(layer);
}

FourTensors recurrent_forward(Tensor x, Tensor h0, std::optional<Tensor> c0,
                              std::vector<Tensor> weights, int64_t slots,
                              std::optional<std::vector<Tensor>> sequence, StringHandle cell_handle,
                              int64_t outputs, int64_t weight_format) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const DeviceGuard guard = on_device_of("x", x);
    FASTRNN_CHECK(weight_format == 0,
                  "weight_format is for the CPU, got tensors on a CUDA device.");
    return forward_of(x, h0, c0, weights, slots, sequence, cell, outputs);
  });
}

FiveTensors recurrent_states(Tensor x, Tensor h0, std::optional<Tensor> c0,
                             std::vector<Tensor> weights, int64_t slots,
                             std::optional<std::vector<Tensor>> sequence,
                             StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const DeviceGuard guard = on_device_of("x", x);
    return with_step_states(
        forward_of(x, h0, c0, weights, slots, sequence, cell, int64_t(1) << kSaved), cell);
  });
}

ThreeTensors recurrent_layer(Tensor x, Tensor h0, std::optional<Tensor> c0,
                             std::vector<Tensor> weights, int64_t slots,
                             std::optional<std::vector<Tensor>> sequence, StringHandle cell) {
  auto [y, h_n, c_n, saved] = recurrent_forward(x, h0, c0, weights, slots, sequence, cell, 0, 0);
  return {y, h_n, c_n};
}

FourTensors backward_of(const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                        const std::optional<Tensor>& d_c_n, const std::optional<Tensor>& d_c_steps,
                        const Tensor& h0, const std::optional<Tensor>& c0,
                        const std::vector<Tensor>& weights, int64_t slots,
                        const std::optional<std::vector<Tensor>>& sequence, const Tensor& y,
                        const Tensor& saved, const std::string& cell) {
  const DeviceGuard guard = on_device_of("y", y);
  const LayerArguments layer("y", y, h0, c0, weights, slots, sequence, cell, checked_dtype("y", y));
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
  const BackwardInputs inputs(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
  const BackwardOutputs outputs(layer, y);
  run_in(layer.dtype, layer, inputs, outputs);
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

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn, m) { m.def("read_tf32_from(int address) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("read_tf32_from", TORCH_BOX(&fastrnn::read_tf32_from));
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastrnn::recurrent_forward));
  m.impl("recurrent_layer", TORCH_BOX(&fastrnn::recurrent_layer));
  m.impl("recurrent_backward", TORCH_BOX(&fastrnn::recurrent_backward));
  m.impl("recurrent_states", TORCH_BOX(&fastrnn::recurrent_states));
  m.impl("recurrent_states_backward", TORCH_BOX(&fastrnn::recurrent_states_backward));
}
