// The operators' schemas and their CPU implementation.
#include "layer_args.h"

#include <tuple>

#include "../cpu/kernels.h"

namespace fastrnn {
namespace {

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
}

int threads() { return int(torch::stable::get_num_threads()); }

template <class T>
void run_forward(const Layer& layer, const Tensor& x, const Tensor& y, const Tensor& h_n,
                 const std::optional<Tensor>& c_n, const Tensor& saved) {
  const Rows x_rows(x);
  const int64_t out = layer.out();
  for (int64_t d = 0; d < layer.directions; ++d) {
    LayerForward<T, T> problem{};
    problem.shape = layer.shape(d);
    problem.weights = layer.direction[d].view<T>();
    problem.x = static_cast<const T*>(x_rows.data);
    problem.x_stride = x_rows.stride;
    problem.h0 = direction_of<T>(layer.h0, d);
    problem.c0 = direction_of<T>(layer.c0, d);
    problem.y = static_cast<T*>(y.data_ptr()) + d * out;
    problem.y_stride = layer.directions * out;
    problem.h_n = direction_of<T>(h_n, d);
    problem.c_n = direction_of<T>(c_n, d);
    if (saved.numel() > 0) problem.saved = direction_of<T>(saved, d);
    cpu::forward<T>(problem, threads(), parallel_for);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(Tensor x, Tensor h0,
                                                         std::optional<Tensor> c0,
                                                         std::vector<Tensor> weights,
                                                         std::optional<Tensor> batch_sizes,
                                                         std::string cell, bool save) {
  const ScalarType dtype = x.scalar_type(), compute = accumulate_type(dtype);
  const Layer layer("x", x, h0, c0, weights, batch_sizes, cell, compute);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == layer.input_size, "fastrnn: x has the input size ",
                  x.size(x.dim() - 1), " and w_ih has ", layer.input_size, ".");
  Tensor y = empty(output_sizes(layer), compute, x);
  Tensor h_n = empty({layer.directions, layer.batch, layer.out()}, compute, x);
  std::optional<Tensor> c_n;
  if (c0) c_n = empty({layer.directions, layer.batch, layer.hidden_size}, compute, x);
  Tensor saved =
      save && layer.cell->saved > 0
          ? empty({layer.directions, layer.rows, layer.cell->saved * layer.hidden_size}, compute, x)
          : empty({0}, compute, x);
  if (compute == ScalarType::Double) {
    run_forward<double>(layer, x, y, h_n, c_n, saved);
  } else {
    run_forward<float>(layer, cast(x, compute), y, h_n, c_n, saved);
  }
  return {cast(y, dtype), cast(h_n, dtype), c_n ? cast(*c_n, dtype) : empty({0}, dtype, x), saved};
}

template <class T>
void run_backward(const Layer& layer, const Tensor& y, const Tensor& saved,
                  const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                  const std::optional<Tensor>& d_c_n, const Tensor& d_pre, const Tensor& d_h_all,
                  const Tensor& d_h0, const std::optional<Tensor>& d_c0) {
  const Rows y_rows(y);
  std::optional<Rows> d_y_rows;
  if (d_y) d_y_rows.emplace(*d_y);
  const int64_t out = layer.out();
  for (int64_t d = 0; d < layer.directions; ++d) {
    LayerBackward<T, T> problem{};
    problem.shape = layer.shape(d);
    problem.weights = layer.direction[d].view<T>();
    problem.h0 = direction_of<T>(layer.h0, d);
    problem.c0 = direction_of<T>(layer.c0, d);
    problem.y = static_cast<const T*>(y_rows.data) + d * out;
    problem.y_stride = y_rows.stride;
    if (layer.cell->saved > 0) problem.saved = direction_of<T>(saved, d);
    if (d_y_rows) {
      problem.d_y = static_cast<const T*>(d_y_rows->data) + d * out;
      problem.d_y_stride = d_y_rows->stride;
    }
    problem.d_h_n = direction_of<T>(d_h_n, d);
    problem.d_c_n = direction_of<T>(d_c_n, d);
    problem.d_pre = direction_of<T>(d_pre, d);
    if (layer.proj_size > 0) problem.d_h_all = direction_of<T>(d_h_all, d);
    problem.d_h0 = direction_of<T>(d_h0, d);
    problem.d_c0 = direction_of<T>(d_c0, d);
    cpu::backward<T>(problem, threads(), parallel_for);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_backward(
    std::optional<Tensor> d_y, std::optional<Tensor> d_h_n, std::optional<Tensor> d_c_n, Tensor h0,
    std::optional<Tensor> c0, std::vector<Tensor> weights, std::optional<Tensor> batch_sizes,
    Tensor y, Tensor saved, std::string cell) {
  const ScalarType dtype = y.scalar_type(), compute = accumulate_type(dtype);
  const Layer layer("y", y, h0, c0, weights, batch_sizes, cell, compute);
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n);
  auto ready = [&](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(cast(*t, compute))) : std::nullopt;
  };
  const int64_t directions = layer.directions, hidden = layer.hidden_size;
  Tensor d_pre = empty({directions, layer.rows, layer.cell->pre * hidden}, compute, y);
  Tensor d_h_all = layer.proj_size > 0
                       ? empty({directions, layer.rows, layer.proj_size}, compute, y)
                       : empty({0}, compute, y);
  Tensor d_h0 = empty({directions, layer.batch, layer.out()}, compute, y);
  std::optional<Tensor> d_c0;
  if (c0) d_c0 = empty({directions, layer.batch, hidden}, compute, y);
  const auto d_y_ready = d_y ? std::optional(cast(*d_y, compute)) : std::nullopt;
  if (compute == ScalarType::Double) {
    run_backward<double>(layer, y, saved, d_y_ready, ready(d_h_n), ready(d_c_n), d_pre, d_h_all,
                         d_h0, d_c0);
  } else {
    run_backward<float>(layer, cast(y, compute), saved, d_y_ready, ready(d_h_n), ready(d_c_n),
                        d_pre, d_h_all, d_h0, d_c0);
  }
  return {d_pre, d_h_all, cast(d_h0, dtype), d_c0 ? cast(*d_c0, dtype) : empty({0}, dtype, y)};
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
