// From the operators' arguments to the plain structs of problem/layer.h, for the CPU and CUDA
// alike: every check that keeps a kernel from reading or writing where it must not, and the
// outputs.
//
//   schema -> Layer (checked, laid out) -> ForwardOutputs  -> forward_problem(d)   one a direction
//                                       -> BackwardInputs, BackwardOutputs -> backward_problem(d)
//
// The modules have said all this in friendlier words before; whoever calls torch.ops.fastrnn
// directly gets these.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "problem/layer.h"

// Since torch 2.13; null where the torch that is loaded is older.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// half_weights lets the CPU round w_hh of float32 to float16 where that is faster; CUDA refuses it.
constexpr const char* kForwardSchema =
    "layer_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "str cell, bool save, bool half_weights=False) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor "
    "saved)";
// The same without `saved`, and with an autograd of its own (fastrnn/ops.py) that decides whether
// to save: for graphs that are written down, by TorchScript and torch.export, and run by others.
constexpr const char* kLayerSchema =
    "layer(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, str cell) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)";
// CPU only: inference of layers of one direction upon one another. Of h0, c0 (none for a cell
// without), h_n and c_n there is one tensor [1, B, *] a layer; weights are those of layer 0, then
// of layer 1, ...
constexpr const char* kStackSchema =
    "stack_forward(Tensor x, Tensor[] h0, Tensor[] c0, Tensor[] weights, Tensor? batch_sizes, "
    "str cell) -> (Tensor y, Tensor[] h_n, Tensor[] c_n)";
constexpr const char* kBackwardSchema =
    "layer_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor saved, str cell) "
    "-> (Tensor d_pre, Tensor d_h_all, Tensor d_h0, Tensor d_c0)";
// CPU only: layer_backward and the products after it in one call. needs: bit 0 asks for d_x, bit
// 1 + i for the gradient of weights[i]; an output that is not asked for is empty. w_hr has no
// output here. (One output per weight: compiled C++ code cannot receive a list of tensors. The
// outputs of the second direction have an operator of their own, so that one direction does not pay
// for them.)
constexpr const char* kGradientsSchema =
    "layer_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor saved, str cell, int needs) "
    "-> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh)";
constexpr const char* kBothGradientsSchema =
    "bidirectional_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, "
    "Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor y, Tensor saved, str cell, "
    "int needs) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor d_h_all, "
    "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, "
    "Tensor d_w_ih_reverse, Tensor d_w_hh_reverse, Tensor d_b_ih_reverse, Tensor d_b_hh_reverse)";

// Refuses an argument with one sentence. (STD_TORCH_CHECK would put the function, file and line of
// the machine that compiled this before it.)
// (Without C++ streams, see cpu/runtime/thread_budget.cpp.)
inline const std::string& text(const std::string& part) { return part; }
inline const char* text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string sentence = "fastrnn: ";
  ((sentence += text(parts)), ...);
  throw std::runtime_error(sentence);
}
#define FASTRNN_CHECK(condition, ...) \
  if (!(condition)) ::fastrnn::refuse(__VA_ARGS__)

// Raises what torch's C interface has reported. torch 2.13 and newer keep the message; older ones
// have printed it on stderr.
[[noreturn]] inline void refuse_as_torch() {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* message = torch_exception_get_what_without_backtrace();
    if (message != nullptr && *message != 0) refuse("torch reports: ", std::string(message));
  }
  refuse("a call into torch failed, see the message above.");
}

// A function of torch's C interface reports failure; its headers' macro for this has another name
// in each release.
inline void torch_call(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) refuse_as_torch();
}

// Runs an operator. Errors that are not this library's own sentences become one: those of torch's
// headers name a file of the machine that compiled them.
template <class Operator>
auto guarded(const Operator& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    refuse("there is not enough memory for this call.");
  } catch (const std::length_error&) {
    refuse("there is not enough memory for this call.");
  } catch (const std::exception& error) {
    if (std::strncmp(error.what(), "fastrnn: ", 9) == 0) throw;
    if (std::strstr(error.what(), "API call failed") != nullptr) refuse_as_torch();
    refuse(std::string(error.what()));
  }
}

inline int64_t value_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
         : dtype == ScalarType::Float                             ? 4
                                                                  : 2;
}
inline bool is_half(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}
// What the kernels add in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return is_half(dtype) ? ScalarType::Float : dtype;
}

// The text of a `str` argument, which is freed. (The conversion to std::string that the headers of
// torch 2.11 to 2.14 offer leaks a string a call.)
inline std::string take_text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  torch_call(torch_string_length(handle, &length));
  torch_call(torch_string_c_str(handle, &data));
  std::string result(data, length);
  torch_call(torch_delete_string(handle));
  return result;
}

// Where a tensor lives.
struct Place {
  int32_t type = 0, index = 0;
  explicit Place(const Tensor& t) {
    torch_call(aoti_torch_get_device_type(t.get(), &type));
    torch_call(aoti_torch_get_device_index(t.get(), &index));
  }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// An uninitialised tensor beside `like`. This entry, unlike empty_strided, obeys torch's
// fill_uninitialized_memory, with which the tests find values that no kernel wrote.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  Place place(like);
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  torch_call(aoti_torch_aten_new_empty(like.get(), sizes.data(), int64_t(sizes.size()), &type,
                                       nullptr, &place.type, place.index, nullptr, &handle));
  return Tensor(handle);
}

// torch's number of a dtype; scalar_type() asks torch up to 22 times to translate it, and fails if
// it does not know it.
inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  torch_call(aoti_torch_get_dtype(t.get(), &code));
  return code;
}
inline std::string dtype_name(const Tensor& t) {
  try {
    return torch::headeronly::toString(t.scalar_type());
  } catch (const std::exception&) {
    return "another dtype";
  }
}
// The dtype of the tensor that the others have to be like.
inline ScalarType checked_dtype(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (code == aoti_torch_dtype_float64()) return ScalarType::Double;
  if (code == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
  if (code == aoti_torch_dtype_float16()) return ScalarType::Half;
  refuse(name, " must be float16, bfloat16, float32 or float64, got ", dtype_name(t), ".");
}
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Bounds that keep every size of a buffer, padded to whole vectors, far below 2^63 bytes. Tensors
// of no memory, expanded or without elements, reach them.
constexpr int64_t kMostValues = int64_t(1) << 52;
constexpr int64_t kPadding = 64;  // values of the widest block of units

inline int64_t checked_product(int64_t a, int64_t b) {
  FASTRNN_CHECK(a == 0 || (a <= kMostValues && b <= kMostValues / a),
                "the sizes of a layer must multiply to at most 2^52 values, got ", a, " times ", b,
                ".");
  return a * b;
}

// A storage may have been resized after a tensor was made in it.
inline void check_memory(const char* name, const Tensor& t, int64_t value_bytes) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t offset = 0, bytes = 0;
  torch_call(aoti_torch_get_storage_offset(t.get(), &offset));
  torch_call(aoti_torch_get_storage_size(t.get(), &bytes));
  int64_t values = offset + 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    values += (sizes[i] - 1) * strides[i];
  }
  FASTRNN_CHECK(values <= bytes / value_bytes, name, " must have memory for all of its ", values,
                " values, got a storage of ", bytes, " bytes.");
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

template <class Expected>
void check_sizes(const char* name, const Tensor& t, const Expected& expected) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected.begin()[i];
  FASTRNN_CHECK(same, name, " must have the shape ",
                text(std::vector<int64_t>(expected.begin(), expected.end())), ", got ",
                text(sizes_of(t)), ".");
}
inline void check_sizes(const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  check_sizes<std::initializer_list<int64_t>>(name, t, expected);
}

// A matrix whose rows are contiguous, and how far apart they are: the tensor's own memory if it is
// laid out so (all leading dimensions collapse into one stride), else a copy.
struct Rows {
  Tensor kept;
  const void* data;
  int64_t stride;

  explicit Rows(const Tensor& t) : kept(t) {
    if (!collapses(t, stride)) {
      kept = torch::stable::contiguous(t);
      stride = t.size(t.dim() - 1);
    }
    data = kept.const_data_ptr();  // of a lazy clone too: to ask for more would copy it
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
            b_ih ? static_cast<const S*>(b_ih->const_data_ptr()) : nullptr,
            b_hh ? static_cast<const S*>(b_hh->const_data_ptr()) : nullptr,
            w_hr ? static_cast<const S*>(w_hr->data) : nullptr,
            w_ih.stride,
            w_hh.stride,
            w_hr ? w_hr->stride : 0};
  }
};

// The arguments that the operators share, checked and laid out for kernels of the type `compute`.
// They speak of sequences, or of one step of one direction: then x is [B, I] without batch_sizes,
// and y, the states and their gradients are [B, *] as well. (A cell that made views of [1, B, *]
// would pay for each in torch's graph more than for the step.)
struct Layer {
  const CellInfo* cell;
  ScalarType dtype, compute;
  int32_t code;  // dtype, as torch numbers it
  Place place;
  int64_t steps, batch, input_size, hidden_size, proj_size, rows, directions;
  bool packed, single;  // single: one step
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
        dtype(checked_dtype(sequence_name, sequence)),
        compute(compute_type),
        code(dtype_code(sequence)),
        place(sequence),
        packed(batch_sizes.has_value()),
        single(!packed && h0_.dim() == 2),
        h0(h0_),
        c0(c0_) {
    FASTRNN_CHECK(single || h0.dim() == 3, "h0 must be [D, B, R], got ", h0.dim(), " dimensions.");
    const int64_t dims = packed || single ? 2 : 3;
    FASTRNN_CHECK(sequence.dim() == dims, sequence_name, " must have ", dims, " dimensions ",
                  packed   ? "with batch_sizes"
                  : single ? "with a 2-D h0"
                           : "without batch_sizes",
                  ", got ", sequence.dim(), ".");
    directions = single ? 1 : h0.size(0);
    batch = h0.size(single ? 0 : 1);
    FASTRNN_CHECK(directions == 1 || directions == 2, "h0 must have 1 or 2 directions, got ",
                  directions, ".");
    const int64_t count = int64_t(weights.size()) / directions;
    FASTRNN_CHECK(count >= 2 && count <= 5 && count * directions == int64_t(weights.size()),
                  "weights must hold 2 to 5 tensors a direction, got ", weights.size(), " for ",
                  directions, " direction(s).");
    const bool bias = count >= 4, projected = count == 3 || count == 5;
    FASTRNN_CHECK(!projected || cell->states == 2,
                  "weights must hold a projection for lstm only, got one for ", cell->name, ".");
    check_memory(sequence_name, sequence, value_bytes(dtype));
    for (const Tensor& w : weights) check_like("weights", w);
    FASTRNN_CHECK(weights[0].dim() == 2, "w_ih must be 2-D, got ", weights[0].dim(),
                  " dimension(s).");
    input_size = weights[0].size(1);
    hidden_size = weights[0].size(0) / cell->gates;
    const int64_t out = h0.size(single ? 1 : 2);
    for (const int64_t size : {batch, input_size, hidden_size, out}) checked_product(size, 1);
    FASTRNN_CHECK(!projected || out > 0,
                  "h0 must have a size of 1 or more with a projection, got 0.");
    proj_size = projected ? out : 0;
    check_like("h0", h0);
    check_sizes("h0", h0, state_sizes(projected ? proj_size : hidden_size));
    FASTRNN_CHECK(c0.has_value() == (cell->states == 2), "c0 must ",
                  cell->states == 2 ? "be given for " : "not be given for ", cell->name, ".");
    if (c0) {
      check_like("c0", *c0);
      check_sizes("c0", *c0, state_sizes(hidden_size));
    }
    h0 = ready(h0);
    if (c0) c0 = ready(*c0);
    const int64_t gate_rows = cell->gates * hidden_size;
    direction.reserve(directions);
    for (int64_t d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * count];
      check_sizes("w_ih", w[0], {gate_rows, input_size});
      check_sizes("w_hh", w[1], {gate_rows, out});
      if (bias) check_sizes("b_ih", w[2], {gate_rows});
      if (bias) check_sizes("b_hh", w[3], {gate_rows});
      if (projected) check_sizes("w_hr", w[count - 1], {proj_size, hidden_size});
      direction.push_back(
          Direction{Rows(widened(w[0])), Rows(widened(w[1])),
                    bias ? std::optional(ready(w[2])) : std::nullopt,
                    bias ? std::optional(ready(w[3])) : std::nullopt,
                    projected ? std::optional(Rows(widened(w[count - 1]))) : std::nullopt});
    }
    read_steps(sequence_name, sequence, batch_sizes);
    check_products();
  }

  int64_t out() const { return proj_size > 0 ? proj_size : hidden_size; }  // R

  LayerShape shape(int64_t d) const {
    const Sequence sequence = {int64_t(step_rows.size()), batch, d == 1, step_offset.data(),
                               step_rows.data()};
    return {cell->kind, sequence, input_size, hidden_size, proj_size};
  }

  // The shape of y: [T, B, D*R], packed [N, D*R], of one step [B, R].
  std::vector<int64_t> output_sizes() const {
    if (packed || single) return {rows, directions * out()};
    return {steps, batch, directions * out()};
  }
  // The shape of a state of so many units: [D, B, units], of one step [B, units].
  std::vector<int64_t> state_sizes(int64_t units) const {
    if (single) return {batch, units};
    return {directions, batch, units};
  }

  void check_like(const char* name, const Tensor& t) const {
    FASTRNN_CHECK(Place(t) == place, name, " must be on the device of the input, got another.");
    FASTRNN_CHECK(dtype_code(t) == code, name, " must have the dtype ",
                  torch::headeronly::toString(dtype), " of the input, got ", dtype_name(t), ".");
    check_memory(name, t, value_bytes(dtype));
  }

  // What check_like has passed, in the type to compute in; what was computed, in the caller's.
  Tensor widened(const Tensor& t) const {
    return compute == dtype ? t : torch::stable::to(t, compute);
  }
  Tensor narrowed(const Tensor& t) const {
    return compute == dtype ? t : torch::stable::to(t, dtype);
  }
  // Widened, and contiguous.
  Tensor ready(const Tensor& t) const { return dense(widened(t)); }
  std::optional<Tensor> ready(const std::optional<Tensor>& t) const {
    return t ? std::optional(ready(*t)) : std::nullopt;
  }

 private:
  static const CellInfo* find_cell(const std::string& name) {
    std::string known;
    for (const CellInfo& info : kCells)
      if (name == info.name) return &info;
    for (const CellInfo& info : kCells)
      known += (known.empty() ? "" : ", ") + std::string(info.name);
    refuse("cell must be one of ", known, ", got '", name, "'.");
  }

  void read_steps(const char* name, const Tensor& sequence,
                  const std::optional<Tensor>& batch_sizes) {
    if (!packed) {
      steps = single ? 1 : sequence.size(0);
      const int64_t own_batch = sequence.size(single ? 0 : 1);
      FASTRNN_CHECK(own_batch == batch, name, " must have the batch ", batch, " of h0, got ",
                    own_batch, ".");
      rows = checked_product(steps, batch);
      step_rows.assign(batch > 0 ? steps : 0, batch);  // T may be anything where nothing has rows
    } else {
      FASTRNN_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                        dtype_code(*batch_sizes) == aoti_torch_dtype_int64(),
                    "batch_sizes must be a 1-D int64 tensor on the CPU, got another.");
      check_memory("batch_sizes", *batch_sizes, value_bytes(ScalarType::Long));
      const Tensor sizes = dense(*batch_sizes);
      steps = sizes.size(0);
      const auto* values = static_cast<const int64_t*>(sizes.const_data_ptr());
      step_rows.assign(values, values + steps);
      rows = 0;
      int64_t before = batch;
      for (int64_t t = 0; t < steps; ++t) {
        FASTRNN_CHECK(
            step_rows[t] > 0 && step_rows[t] <= before && (t > 0 || step_rows[0] == batch),
            "batch_sizes must start with the batch size ", batch,
            ", be positive and not increase, got ", step_rows[t], " at step ", t, ".");
        before = step_rows[t];
        rows = std::min(rows + step_rows[t], kMostValues);
      }
      FASTRNN_CHECK(rows == sequence.size(0), name, " must have the ", rows,
                    " rows that batch_sizes add up to, got ", sequence.size(0), ".");
    }
    step_offset.reserve(step_rows.size());
    int64_t offset = 0;
    for (const int64_t size : step_rows) {
      step_offset.push_back(offset);
      offset += size;
    }
  }

  // Of outputs, workspaces and what is saved; a chunk of rows has 4 times the batch at most.
  void check_products() const {
    const int64_t width = checked_product(4 * cell->pre + cell->saved, hidden_size + kPadding);
    const int64_t most = std::max({input_size, out(), hidden_size}) + kPadding;
    checked_product(width, most);
    checked_product(checked_product(std::max(rows, 4 * batch), directions), std::max(width, most));
  }
};

inline void check_input(const Layer& layer, const Tensor& x) {
  const int64_t size = x.size(x.dim() - 1);
  FASTRNN_CHECK(size == layer.input_size, "x must have the input size ", layer.input_size,
                " of w_ih, got ", size, ".");
}

// What backward is given beyond the layer itself.
inline void check_backward(const Layer& layer, const Tensor& y, const Tensor& saved,
                           const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                           const std::optional<Tensor>& d_c_n) {
  layer.check_like("y", y);
  check_sizes("y", y, layer.output_sizes());
  if (layer.cell->saved > 0) {
    check_sizes("saved", saved,
                {layer.directions, layer.rows, layer.cell->saved * layer.hidden_size});
    const ScalarType expected = accumulate_type(layer.dtype);
    const int32_t code =
        expected == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    FASTRNN_CHECK(dtype_code(saved) == code && saved.is_contiguous() && Place(saved) == layer.place,
                  "saved must be what layer_forward returned, got another tensor.");
    check_memory("saved", saved, value_bytes(accumulate_type(layer.dtype)));
  }
  if (d_y) {
    layer.check_like("d_y", *d_y);
    check_sizes("d_y", *d_y, layer.output_sizes());
  }
  if (d_h_n) {
    layer.check_like("d_h_n", *d_h_n);
    check_sizes("d_h_n", *d_h_n, layer.state_sizes(layer.out()));
  }
  FASTRNN_CHECK(!d_c_n || layer.c0, "d_c_n must not be given for ", layer.cell->name,
                ", got a tensor.");
  if (d_c_n) {
    layer.check_like("d_c_n", *d_c_n);
    check_sizes("d_c_n", *d_c_n, layer.state_sizes(layer.hidden_size));
  }
}

// What a direction writes of states and their gradients [D, B, *], of values saved [D, N, *], or
// null.
inline int64_t direction_offset(const Tensor& t, int64_t d) {
  return d == 0 ? 0 : d * t.size(1) * t.size(2);
}
template <class S>
S* output_of(const Tensor& t, int64_t d) {
  return static_cast<S*>(t.data_ptr()) + direction_offset(t, d);
}
template <class S>
S* output_of(const std::optional<Tensor>& t, int64_t d) {
  return t ? output_of<S>(*t, d) : nullptr;
}
// The same of what it reads.
template <class S>
const S* input_of(const Tensor& t, int64_t d) {
  return static_cast<const S*>(t.const_data_ptr()) + direction_offset(t, d);
}
template <class S>
const S* input_of(const std::optional<Tensor>& t, int64_t d) {
  return t ? input_of<S>(*t, d) : nullptr;
}

// Where large tensors come from.
using Allocate = Tensor (*)(const std::vector<int64_t>& sizes, ScalarType dtype,
                            const Tensor& like);

struct ForwardOutputs {
  Tensor y, h_n;
  std::optional<Tensor> c_n, saved;

  // All in the layer's compute type, saved in what that accumulates in.
  ForwardOutputs(const Layer& layer, bool save, const Tensor& like, Allocate allocate = empty)
      : y(empty(layer.output_sizes(), layer.compute, like)),
        h_n(empty(layer.state_sizes(layer.out()), layer.compute, like)) {
    if (layer.c0) c_n = empty(layer.state_sizes(layer.hidden_size), layer.compute, like);
    if (save && layer.cell->saved > 0)
      saved = allocate({layer.directions, layer.rows, layer.cell->saved * layer.hidden_size},
                       accumulate_type(layer.compute), like);
  }

  // As the schema returns them.
  FourTensors results(const Layer& layer) const {
    return {layer.narrowed(y), layer.narrowed(h_n),
            c_n ? layer.narrowed(*c_n) : empty({0}, layer.dtype, y),
            saved ? *saved : empty({0}, accumulate_type(layer.dtype), y)};
  }
};

template <class S, class A>
LayerForward<S, A> forward_problem(const Layer& layer, int64_t d, const Rows& x,
                                   const ForwardOutputs& outputs) {
  LayerForward<S, A> problem{};
  problem.shape = layer.shape(d);
  problem.weights = layer.direction[d].view<S>();
  problem.x = static_cast<const S*>(x.data);
  problem.x_stride = x.stride;
  problem.h0 = input_of<S>(layer.h0, d);
  problem.c0 = input_of<S>(layer.c0, d);
  problem.y = static_cast<S*>(outputs.y.data_ptr()) + d * layer.out();
  problem.y_stride = layer.directions * layer.out();
  problem.h_n = output_of<S>(outputs.h_n, d);
  problem.c_n = output_of<S>(outputs.c_n, d);
  problem.saved = output_of<A>(outputs.saved, d);
  return problem;
}

struct BackwardInputs {
  Rows y;
  Tensor saved;
  std::optional<Rows> d_y;
  std::optional<Tensor> d_h_n, d_c_n;

  BackwardInputs(const Layer& layer, const Tensor& y_, const Tensor& saved_,
                 const std::optional<Tensor>& d_y_, const std::optional<Tensor>& d_h_n_,
                 const std::optional<Tensor>& d_c_n_)
      : y(layer.widened(y_)),
        saved(saved_),
        d_h_n(layer.ready(d_h_n_)),
        d_c_n(layer.ready(d_c_n_)) {
    if (d_y_) d_y.emplace(layer.widened(*d_y_));
  }
};

struct BackwardOutputs {
  Tensor d_pre;
  std::optional<Tensor> d_h_all;
  Tensor d_h0;
  std::optional<Tensor> d_c0;

  // All in the layer's compute type.
  BackwardOutputs(const Layer& layer, const Tensor& like, Allocate allocate = empty)
      : BackwardOutputs(layer, like, allocate, allocate) {}
  // d_pre from elsewhere: not every caller returns it.
  BackwardOutputs(const Layer& layer, const Tensor& like, Allocate allocate, Allocate allocate_pre)
      : d_pre(allocate_pre({layer.directions, layer.rows, layer.cell->pre * layer.hidden_size},
                           layer.compute, like)),
        d_h0(empty(layer.state_sizes(layer.out()), layer.compute, like)) {
    if (layer.proj_size > 0)
      d_h_all = allocate({layer.directions, layer.rows, layer.proj_size}, layer.compute, like);
    if (layer.c0) d_c0 = empty(layer.state_sizes(layer.hidden_size), layer.compute, like);
  }

  // As the schema returns them.
  FourTensors results(const Layer& layer) const {
    return {d_pre, d_h_all ? *d_h_all : empty({0}, layer.compute, d_pre), layer.narrowed(d_h0),
            d_c0 ? layer.narrowed(*d_c0) : empty({0}, layer.dtype, d_pre)};
  }
};

template <class S, class A>
LayerBackward<S, A, S> backward_problem(const Layer& layer, int64_t d, const BackwardInputs& inputs,
                                        const BackwardOutputs& outputs) {
  LayerBackward<S, A, S> problem{};
  problem.shape = layer.shape(d);
  problem.weights = layer.direction[d].view<S>();
  problem.h0 = input_of<S>(layer.h0, d);
  problem.c0 = input_of<S>(layer.c0, d);
  problem.y = static_cast<const S*>(inputs.y.data) + d * layer.out();
  problem.y_stride = inputs.y.stride;
  if (layer.cell->saved > 0) problem.saved = input_of<A>(inputs.saved, d);
  if (inputs.d_y) {
    problem.d_y = static_cast<const S*>(inputs.d_y->data) + d * layer.out();
    problem.d_y_stride = inputs.d_y->stride;
  }
  problem.d_h_n = input_of<S>(inputs.d_h_n, d);
  problem.d_c_n = input_of<S>(inputs.d_c_n, d);
  problem.d_pre = output_of<S>(outputs.d_pre, d);
  problem.d_h_all = output_of<S>(outputs.d_h_all, d);
  problem.d_h0 = output_of<S>(outputs.d_h0, d);
  problem.d_c0 = output_of<S>(outputs.d_c0, d);
  return problem;
}

}  // namespace fastrnn
