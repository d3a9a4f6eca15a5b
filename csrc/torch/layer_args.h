// From the operators' arguments to the plain structs of problem.h, for the CPU and CUDA alike:
// every check that keeps a kernel from reading or writing where it must not.
//
// The modules have said all this in friendlier words before; whoever calls torch.ops.fastrnn
// directly gets these.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "../problem.h"

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kForwardSchema =
    "layer_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "str cell, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)";
constexpr const char* kBackwardSchema =
    "layer_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor saved, str cell) "
    "-> (Tensor d_pre, Tensor d_h_all, Tensor d_h0, Tensor d_c0)";

inline bool is_half(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}
// What the kernels add in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return is_half(dtype) ? ScalarType::Float : dtype;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int i = int(sizes.size()) - 2; i >= 0; --i)
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string result = "[";
  for (size_t i = 0; i < sizes.size(); ++i)
    result += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return result + "]";
}
inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline void check_sizes(const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected[i];
  STD_TORCH_CHECK(same, "fastrnn: ", name, " must have the shape ", text(expected), ", got ",
                  text(sizes_of(t)), ".");
}

// A matrix whose rows are contiguous, and how far apart they are: the tensor's own memory if it is
// laid out so (all leading dimensions collapse into one stride), else a copy.
struct Rows {
  Tensor kept;
  void* data;
  int64_t stride;

  explicit Rows(const Tensor& t) : kept(t) {
    if (!collapses(t, stride)) {
      kept = torch::stable::contiguous(t);
      stride = t.size(t.dim() - 1);
    }
    data = kept.data_ptr();
  }

 private:
  static bool collapses(const Tensor& t, int64_t& stride) {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const int64_t last = int64_t(sizes.size()) - 1;
    if (sizes[last] != 1 && strides[last] != 1) return false;
    bool found = false;
    int64_t expected = 0;
    stride = sizes[last];
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (!found) {
        stride = strides[i];
        if (stride < sizes[last]) return false;  // rows that overlap: expanded
        found = true;
      } else if (strides[i] != expected) {
        return false;
      }
      expected = strides[i] * sizes[i];
    }
    return true;
  }
};

// One direction's parameters.
struct Direction {
  Rows w_ih, w_hh;
  std::optional<Tensor> b_ih, b_hh;
  std::optional<Rows> w_hr;

  template <class S>
  LayerWeights<S> view() const {
    return {static_cast<const S*>(w_ih.data),
            static_cast<const S*>(w_hh.data),
            b_ih ? static_cast<const S*>(b_ih->data_ptr()) : nullptr,
            b_hh ? static_cast<const S*>(b_hh->data_ptr()) : nullptr,
            w_hr ? static_cast<const S*>(w_hr->data) : nullptr,
            w_ih.stride,
            w_hh.stride,
            w_hr ? w_hr->stride : 0};
  }
};

// The arguments that both operators share, checked and laid out for kernels of the type `compute`.
struct Layer {
  const CellInfo* cell;
  ScalarType dtype, compute;
  int64_t steps, batch, input_size, hidden_size, proj_size, rows, directions;
  bool packed;
  std::vector<int64_t> step_offset, step_rows;
  std::vector<Direction> direction;
  Tensor h0;
  std::optional<Tensor> c0;

  // sequence: x (forward) or y (backward), [T,B,*] or packed [N,*].
  Layer(const char* sequence_name, const Tensor& sequence, const Tensor& h0_,
        const std::optional<Tensor>& c0_, const std::vector<Tensor>& weights,
        const std::optional<Tensor>& batch_sizes, const std::string& cell_name,
        ScalarType compute_type)
      : cell(find_cell(cell_name)),
        dtype(sequence.scalar_type()),
        compute(compute_type),
        packed(batch_sizes.has_value()),
        h0(h0_),
        c0(c0_) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || is_half(dtype),
                    "fastrnn: ", sequence_name, " must be float16, bfloat16, float32 or float64.");
    STD_TORCH_CHECK(sequence.dim() == (packed ? 2 : 3), "fastrnn: ", sequence_name, " must have ",
                    packed ? 2 : 3, " dimensions ", packed ? "with" : "without",
                    " batch_sizes, got ", sequence.dim(), ".");
    STD_TORCH_CHECK(h0.dim() == 3, "fastrnn: h0 must be [D, B, R], got ", h0.dim(), " dimensions.");
    directions = h0.size(0);
    batch = h0.size(1);
    STD_TORCH_CHECK(directions == 1 || directions == 2,
                    "fastrnn: h0 must have 1 or 2 directions, got ", directions, ".");
    const int64_t count = int64_t(weights.size()) / directions;
    STD_TORCH_CHECK(count >= 2 && count <= 5 && count * directions == int64_t(weights.size()),
                    "fastrnn: weights must hold 2 to 5 tensors a direction, got ", weights.size(),
                    " for ", directions, " direction(s).");
    const bool bias = count >= 4, projected = count == 3 || count == 5;
    STD_TORCH_CHECK(!projected || cell->states == 2,
                    "fastrnn: weights hold a projection, which only lstm has, for ", cell->name,
                    ".");
    const int64_t out = h0.size(2);
    for (const Tensor& w : weights) {
      STD_TORCH_CHECK(w.dim() == 1 || w.dim() == 2, "fastrnn: weights must be 1-D or 2-D.");
      check_like("weights", w, sequence);
    }
    STD_TORCH_CHECK(weights[0].dim() == 2, "fastrnn: w_ih must be 2-D.");
    input_size = weights[0].size(1);
    hidden_size = weights[0].size(0) / cell->gates;
    proj_size = projected ? out : 0;
    check_like("h0", h0, sequence);
    check_sizes("h0", h0, {directions, batch, projected ? proj_size : hidden_size});
    STD_TORCH_CHECK(c0.has_value() == (cell->states == 2), "fastrnn: c0 must ",
                    cell->states == 2 ? "be given for " : "not be given for ", cell->name, ".");
    if (c0) {
      check_like("c0", *c0, sequence);
      check_sizes("c0", *c0, {directions, batch, hidden_size});
    }
    h0 = torch::stable::contiguous(cast(h0, compute));
    if (c0) c0 = torch::stable::contiguous(cast(*c0, compute));
    const int64_t gate_rows = cell->gates * hidden_size;
    direction.reserve(directions);
    for (int64_t d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * count];
      check_sizes("w_ih", w[0], {gate_rows, input_size});
      check_sizes("w_hh", w[1], {gate_rows, out});
      if (bias) check_sizes("b_ih", w[2], {gate_rows});
      if (bias) check_sizes("b_hh", w[3], {gate_rows});
      if (projected) check_sizes("w_hr", w[count - 1], {proj_size, hidden_size});
      direction.push_back(Direction{
          Rows(cast(w[0], compute)), Rows(cast(w[1], compute)),
          bias ? std::optional(torch::stable::contiguous(cast(w[2], compute))) : std::nullopt,
          bias ? std::optional(torch::stable::contiguous(cast(w[3], compute))) : std::nullopt,
          projected ? std::optional(Rows(cast(w[count - 1], compute))) : std::nullopt});
    }
    read_steps(sequence_name, sequence, batch_sizes);
  }

  int64_t out() const { return proj_size > 0 ? proj_size : hidden_size; }  // R

  LayerShape shape(int64_t d) const {
    return {cell->kind,         d == 1,          steps, batch, input_size, hidden_size, proj_size,
            step_offset.data(), step_rows.data()};
  }

  static void check_like(const char* name, const Tensor& t, const Tensor& like) {
    int32_t type, index, like_type, like_index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &like_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &like_index));
    STD_TORCH_CHECK(type == like_type && index == like_index, "fastrnn: ", name,
                    " must be on the device of the input.");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "fastrnn: ", name,
                    " must have the dtype of the input.");
  }

 private:
  static const CellInfo* find_cell(const std::string& name) {
    std::string known;
    for (const CellInfo& info : kCells) {
      if (name == info.name) return &info;
      known += std::string(known.empty() ? "" : ", ") + info.name;
    }
    STD_TORCH_CHECK(false, "fastrnn: cell must be one of ", known, ", got '", name, "'.");
    return nullptr;
  }

  void read_steps(const char* name, const Tensor& sequence,
                  const std::optional<Tensor>& batch_sizes) {
    if (!packed) {
      steps = sequence.size(0);
      STD_TORCH_CHECK(sequence.size(1) == batch, "fastrnn: ", name, " has the batch ",
                      sequence.size(1), " and h0 has ", batch, ".");
      rows = steps * batch;
      step_rows.assign(steps, batch);
    } else {
      STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                          batch_sizes->scalar_type() == ScalarType::Long,
                      "fastrnn: batch_sizes must be a 1-D int64 tensor on the CPU.");
      const Tensor sizes = torch::stable::contiguous(*batch_sizes);
      steps = sizes.size(0);
      const auto* values = static_cast<const int64_t*>(sizes.data_ptr());
      step_rows.assign(values, values + steps);
      rows = 0;
      int64_t before = batch;
      for (int64_t t = 0; t < steps; ++t) {
        STD_TORCH_CHECK(
            step_rows[t] > 0 && step_rows[t] <= before && (t > 0 || step_rows[0] == batch),
            "fastrnn: batch_sizes must start with the batch size ", batch,
            ", be positive and not increase, got ", step_rows[t], " at step ", t, ".");
        before = step_rows[t];
        rows += step_rows[t];
      }
      STD_TORCH_CHECK(rows == sequence.size(0), "fastrnn: ", name, " has ", sequence.size(0),
                      " rows and batch_sizes add up to ", rows, ".");
    }
    step_offset.resize(steps);
    for (int64_t t = 0, offset = 0; t < steps; offset += step_rows[t++]) step_offset[t] = offset;
  }
};

// What one direction reads of h0, c0 and their gradients [D, B, *], or null.
template <class S>
S* direction_of(const Tensor& t, int64_t d) {
  return static_cast<S*>(t.data_ptr()) + d * t.size(1) * t.size(2);
}
template <class S>
S* direction_of(const std::optional<Tensor>& t, int64_t d) {
  return t ? direction_of<S>(*t, d) : nullptr;
}

// The shape of y: [T, B, D*R] or [N, D*R].
inline std::vector<int64_t> output_sizes(const Layer& layer) {
  const int64_t width = layer.directions * layer.out();
  if (layer.packed) return {layer.rows, width};
  return {layer.steps, layer.batch, width};
}

// What backward is given beyond the layer itself.
inline void check_backward(const Layer& layer, const Tensor& y, const Tensor& saved,
                           const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                           const std::optional<Tensor>& d_c_n) {
  check_sizes("y", y, output_sizes(layer));
  if (layer.cell->saved > 0) {
    check_sizes("saved", saved,
                {layer.directions, layer.rows, layer.cell->saved * layer.hidden_size});
    STD_TORCH_CHECK(saved.scalar_type() == accumulate_type(layer.dtype) && saved.is_contiguous(),
                    "fastrnn: saved must be what layer_forward returned.");
  }
  if (d_y) {
    Layer::check_like("d_y", *d_y, y);
    check_sizes("d_y", *d_y, output_sizes(layer));
  }
  if (d_h_n) {
    Layer::check_like("d_h_n", *d_h_n, y);
    check_sizes("d_h_n", *d_h_n, {layer.directions, layer.batch, layer.out()});
  }
  STD_TORCH_CHECK(!d_c_n || layer.c0, "fastrnn: d_c_n must not be given for ", layer.cell->name,
                  ".");
  if (d_c_n) {
    Layer::check_like("d_c_n", *d_c_n, y);
    check_sizes("d_c_n", *d_c_n, {layer.directions, layer.batch, layer.hidden_size});
  }
}

}  // namespace fastrnn
