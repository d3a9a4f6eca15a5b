// The operators on CUDA tensors: checks, outputs and workspace as on the CPU, then kernels on the
// current stream of the tensors' device. saved is float32 for half types, gradients have their own.
#include "cuda/api.h"

#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "torch/problems.h"

namespace fastrnn {

// The cells of the CUDA operators: those of the registry.
const CellInfo* find_cell(const std::string& name) {
  std::string known;
  for (const CellInfo& info : kCells)
    if (name == info.name) return &info;
  for (const CellInfo& info : kCells) known += (known.empty() ? "" : ", ") + std::string(info.name);
  throw_error("cell must be one of ", known, ", got '", name, "'.");
}

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

// The states after a reset, [1 or T, D, B, *]; without a tensor they are zeros.
class ResetState {
 public:
  ResetState(const char* name, const LayerArguments& layer, const std::optional<Tensor>& state,
             int64_t units)
      : units_(units), batch_(layer.batch) {
    if (!state) return;
    layer.check_like(name, *state);
    const std::vector<int64_t> own = sizes_of(*state);
    const int64_t steps = own.empty() ? 0 : own[0];
    const std::vector<int64_t> expected = {steps, layer.directions, layer.batch, units};
    FASTRNN_CHECK(own == expected && (steps == 1 || steps == layer.steps), name,
                  " must have the shape [1 or ", layer.steps, ", ", layer.directions, ", ",
                  layer.batch, ", ", units, "], got ", text(own), ".");
    state_ = as_contiguous(*state);
    stride_ = steps == 1 ? 0 : layer.directions * layer.batch * units;
  }

  // Zeros for its gradient, of the type in which kernels add.
  Tensor gradient(const LayerArguments& layer, const Tensor& like) const {
    const ScalarType dtype = accumulate_type(layer.dtype);
    if (!state_) return placeholder(dtype, like);
    Tensor zeros = empty(sizes_of(*state_), dtype, like);
    torch::stable::zero_(zeros);
    return zeros;
  }

  // Of a direction; null: zeros.
  template <class S>
  const S* view(int64_t d) const {
    return state_ ? static_cast<const S*>(state_->const_data_ptr()) + offset(d) : nullptr;
  }
  template <class A>
  A* gradient_view(const Tensor& gradient, int64_t d) const {
    return state_ ? static_cast<A*>(gradient.data_ptr()) + offset(d) : nullptr;
  }
  int64_t stride() const { return stride_; }

 private:
  int64_t offset(int64_t d) const { return d * batch_ * units_; }

  int64_t units_, batch_, stride_ = 0;
  std::optional<Tensor> state_;
};

// The resets of a call. A call without them has an empty mask.
struct CallResets {
  std::optional<Tensor> mask;  // [D, T, B]
  std::optional<ResetState> h, c;

  CallResets() = default;
  CallResets(const LayerArguments& layer, const Tensor& resets,
             const std::optional<Tensor>& reset_h, const std::optional<Tensor>& reset_c) {
    FASTRNN_CHECK(!layer.packed && !layer.single,
                  "resets must be given with x [T, B, I] and h0 [D, B, R], got other shapes.");
    FASTRNN_CHECK(DeviceId(resets) == layer.place && dtype_code(resets) == aoti_torch_dtype_bool(),
                  "resets must be bool on the device of the input, got another tensor.");
    const std::vector<int64_t> expected = {layer.directions, layer.steps, layer.batch};
    FASTRNN_CHECK(sizes_of(resets) == expected, "resets must have the shape ", text(expected),
                  ", got ", text(sizes_of(resets)), ".");
    check_memory("resets", resets, 1);
    FASTRNN_CHECK(!reset_c || layer.c0, "reset_c must not be given for ", layer.cell->name,
                  ", got a tensor.");
    mask = as_contiguous(resets);
    h.emplace("reset_h", layer, reset_h, layer.out());
    c.emplace("reset_c", layer, reset_c, layer.cell_units());
  }

  template <class S>
  Resets<S> view(const LayerArguments& layer, int64_t d) const {
    if (!mask) return {};
    const auto* values = static_cast<const uint8_t*>(mask->const_data_ptr());
    return {values + d * layer.steps * layer.batch, h->template view<S>(d), c->template view<S>(d),
            h->stride(), c->stride()};
  }
};

// The gradients at the states after a reset.
struct ResetGradients {
  Tensor h, c;
};

template <class S>
void run(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs,
         const CallResets& resets) {
  const Rows rows(x);
  cuda::Forward<S> problems[2]{};
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = forward_problem<S, cuda::Accumulate<S>>(layer, d, rows, outputs);
    problems[d].resets = resets.view<S>(layer, d);
  }
  run_kernels<S>(layer, problems, x);
}

template <class S>
void run(const LayerArguments& layer, const BackwardInputs& inputs, const BackwardOutputs& outputs,
         const CallResets& resets, const std::optional<ResetGradients>& d_resets) {
  using A = cuda::Accumulate<S>;
  cuda::Backward<S> problems[2]{};
  for (int64_t d = 0; d < layer.directions; ++d) {
    problems[d] = backward_problem<S, A>(layer, d, inputs, outputs);
    problems[d].resets = resets.view<S>(layer, d);
    if (!d_resets) continue;
    problems[d].d_reset_h = resets.h->gradient_view<A>(d_resets->h, d);
    problems[d].d_reset_c = resets.c->gradient_view<A>(d_resets->c, d);
  }
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
  run_in(layer.dtype, layer, x, results, CallResets());
  return results.tensors(layer);
}

FourTensors recurrent_reset_forward(Tensor x, Tensor h0, std::optional<Tensor> c0,
                                    std::vector<Tensor> weights, int64_t slots, Tensor resets,
                                    std::optional<Tensor> reset_h, std::optional<Tensor> reset_c,
                                    StringHandle cell_handle, int64_t outputs) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const DeviceGuard guard = on_device_of("x", x);
    const LayerArguments layer("x", x, h0, c0, weights, slots, std::nullopt, cell,
                               checked_dtype("x", x));
    check_input(layer, x);
    const CallResets own(layer, resets, reset_h, reset_c);
    const ForwardOutputs results(layer, has_slot(outputs, kSaved), x);
    run_in(layer.dtype, layer, x, results, own);
    return results.tensors(layer);
  });
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
  run_in(layer.dtype, layer, inputs, outputs, CallResets(), std::optional<ResetGradients>());
  return outputs.tensors(layer);
}

SixTensors recurrent_reset_backward(std::optional<Tensor> d_y, std::optional<Tensor> d_h_n,
                                    std::optional<Tensor> d_c_n, std::optional<Tensor> d_c_steps,
                                    Tensor h0, std::optional<Tensor> c0,
                                    std::vector<Tensor> weights, int64_t slots, Tensor resets,
                                    std::optional<Tensor> reset_h, std::optional<Tensor> reset_c,
                                    Tensor y, Tensor saved, StringHandle cell_handle) {
  return guarded([&]() -> SixTensors {
    const std::string cell = consume_string(cell_handle);
    const DeviceGuard guard = on_device_of("y", y);
    const LayerArguments layer("y", y, h0, c0, weights, slots, std::nullopt, cell,
                               checked_dtype("y", y));
    check_backward(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
    const CallResets own(layer, resets, reset_h, reset_c);
    const ResetGradients d_resets{own.h->gradient(layer, y), own.c->gradient(layer, y)};
    const BackwardInputs inputs(layer, y, saved, d_y, d_h_n, d_c_n, d_c_steps);
    const BackwardOutputs outputs(layer, y);
    run_in(layer.dtype, layer, inputs, outputs, own, std::optional(d_resets));
    return std::tuple_cat(outputs.tensors(layer), std::tuple(d_resets.h, d_resets.c));
  });
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
  m.impl("recurrent_reset_forward", TORCH_BOX(&fastrnn::recurrent_reset_forward));
  m.impl("recurrent_reset_backward", TORCH_BOX(&fastrnn::recurrent_reset_backward));
}
