// The operator for inference with int8 weights.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/int8.h"
#include "torch/arguments.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

// The tensors of a direction, by their order.
enum Int8Weight : int {
  kPanelsIh,
  kPanelsHh,
  kScalesIh,
  kScalesHh,
  kSumsIh,
  kSumsHh,
  kBias,
  kInt8Weights
};
constexpr const char* kInt8WeightNames[kInt8Weights] = {
    "panels_ih", "panels_hh", "scales_ih", "scales_hh", "sums_ih", "sums_hh", "bias"};

// A tensor of the given type and shape in contiguous memory, in a CPU tensor.
Tensor checked(const char* name, const Tensor& t, int32_t code, const char* type,
               int64_t value_bytes, const std::vector<int64_t>& sizes) {
  FASTRNN_CHECK(t.is_cpu(), name, " must be on the CPU, got another device.");
  FASTRNN_CHECK(dtype_code(t) == code, name, " must be ", type, ", got ", dtype_name(t), ".");
  FASTRNN_CHECK(sizes_of(t) == sizes, name, " must have the shape ", text(sizes), ", got ",
                text(sizes_of(t)), ".");
  check_memory(name, t, value_bytes);
  return as_contiguous(t);
}
Tensor checked_float(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  return checked(name, t, aoti_torch_dtype_float32(), "float32", 4, sizes);
}

// The tensors of a call: checked, contiguous and kept alive.
struct Int8Arguments {
  const CellInfo* cell;
  int64_t directions, batch, input_size, hidden_size, rows;
  std::vector<int64_t> step_rows, step_offset, output_sizes;
  std::optional<Rows> x;
  std::optional<Tensor> h0, c0;
  std::vector<Tensor> weights;

  Int8Arguments(const Tensor& x_, const Tensor& h0_, const std::optional<Tensor>& c0_,
                const std::vector<Tensor>& weights_, const std::optional<Tensor>& batch_sizes,
                const std::string& cell_name)
      : cell(find_cell(cell_name)) {
    FASTRNN_CHECK(has_int8(*cell), "cell must be one that has int8 kernels, got '", cell_name,
                  "'.");
    FASTRNN_CHECK(h0_.dim() == 3, "h0 must be [D, B, H], got ", h0_.dim(), " dimensions.");
    directions = h0_.size(0);
    batch = h0_.size(1);
    hidden_size = h0_.size(2);
    FASTRNN_CHECK(directions == 1 || directions == 2, "h0 must have 1 or 2 directions, got ",
                  directions, ".");
    const int64_t dims = batch_sizes ? 2 : 3;
    FASTRNN_CHECK(x_.dim() == dims, "x must have ", dims, " dimensions ",
                  batch_sizes ? "with" : "without", " batch_sizes, got ", x_.dim(), ".");
    input_size = x_.size(dims - 1);
    for (const auto& [name, size] : {std::pair("x", input_size), std::pair("h0", hidden_size)})
      FASTRNN_CHECK(size >= 1 && size <= kInt8MostColumns, name, " must have 1 to ",
                    kInt8MostColumns, " features, got ", size, ".");
    read_steps(x_, batch_sizes);
    const std::vector<int64_t> states{directions, batch, hidden_size};
    x.emplace(checked_rows(x_));
    h0 = checked_float("h0", h0_, states);
    FASTRNN_CHECK(c0_.has_value() == (cell->states == 2), "c0 must ",
                  cell->states == 2 ? "be given for " : "not be given for ", cell->name, ".");
    if (c0_) c0 = checked_float("c0", *c0_, states);
    read_weights(weights_);
  }

  Int8Forward problem(int64_t d) const {
    Int8Forward result{};
    const Sequence sequence = {int64_t(step_rows.size()), batch, d == 1, step_offset.data(),
                               step_rows.data()};
    result.shape = {cell->kind, sequence, input_size, hidden_size, 0};
    const auto values = [&](int index) {
      return weights[d * kInt8Weights + index].const_data_ptr();
    };
    const auto matrix = [&](int panels, int scales, int sums) {
      return Int8Matrix{static_cast<const int8_t*>(values(panels)),
                        static_cast<const float*>(values(scales)),
                        static_cast<const int32_t*>(values(sums))};
    };
    result.w_ih = matrix(kPanelsIh, kScalesIh, kSumsIh);
    result.w_hh = matrix(kPanelsHh, kScalesHh, kSumsHh);
    result.bias = static_cast<const float*>(values(kBias));
    result.x = static_cast<const float*>(x->data);
    result.x_stride = x->stride;
    const int64_t offset = d * batch * hidden_size;
    result.h0 = static_cast<const float*>(h0->const_data_ptr()) + offset;
    if (c0) result.c0 = static_cast<const float*>(c0->const_data_ptr()) + offset;
    return result;
  }

 private:
  static Rows checked_rows(const Tensor& x) {
    FASTRNN_CHECK(x.is_cpu(), "x must be on the CPU, got another device.");
    FASTRNN_CHECK(dtype_code(x) == aoti_torch_dtype_float32(), "x must be float32, got ",
                  dtype_name(x), ".");
    check_memory("x", x, 4);
    return Rows(x);
  }

  void read_steps(const Tensor& x, const std::optional<Tensor>& batch_sizes) {
    if (batch_sizes) {
      step_rows = packed_step_rows(*batch_sizes, batch);
      output_sizes = {x.size(0), directions * hidden_size};
    } else {
      FASTRNN_CHECK(x.size(1) == batch, "x must have the batch ", batch, " of h0, got ", x.size(1),
                    ".");
      step_rows.assign(batch > 0 ? x.size(0) : 0, batch);
      output_sizes = {x.size(0), batch, directions * hidden_size};
    }
    rows = 0;
    for (const int64_t count : step_rows) {
      step_offset.push_back(rows);
      rows += count;
      FASTRNN_CHECK(!batch_sizes || rows <= x.size(0), "x must have the rows that batch_sizes add ",
                    "up to, got ", x.size(0), ".");
    }
    FASTRNN_CHECK(!batch_sizes || rows == x.size(0), "x must have the ", rows,
                  " rows that batch_sizes add up to, got ", x.size(0), ".");
  }

  void read_weights(const std::vector<Tensor>& all) {
    FASTRNN_CHECK(int64_t(all.size()) == directions * kInt8Weights, "weights must hold ",
                  int64_t(kInt8Weights), " tensors per direction, got ", int64_t(all.size()),
                  " for ", directions, " direction(s).");
    const int64_t blocks = int8_blocks(hidden_size), gates = cell->gates;
    weights.reserve(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
      const int which = int(i % kInt8Weights);
      const char* name = kInt8WeightNames[which];
      const std::vector<int64_t> row{blocks, gates, kInt8Units};
      if (which <= kPanelsHh) {
        const int64_t columns = which == kPanelsIh ? input_size : hidden_size;
        weights.push_back(checked(name, all[i], aoti_torch_dtype_int8(), "int8", 1,
                                  {blocks, int8_quads(columns), gates, kInt8Units, kInt8Depth}));
      } else if (which <= kScalesHh) {
        weights.push_back(checked_float(name, all[i], row));
      } else if (which <= kSumsHh) {
        weights.push_back(checked(name, all[i], aoti_torch_dtype_int32(), "int32", 4, row));
      } else {
        weights.push_back(checked_float(name, all[i], {blocks, cell->pre, kInt8Units}));
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> recurrent_int8(Tensor x, Tensor h0, std::optional<Tensor> c0,
                                                  std::vector<Tensor> weights,
                                                  std::optional<Tensor> batch_sizes,
                                                  StringHandle cell_handle) {
  return guarded([&] {
    const std::string cell = consume_string(cell_handle);
    const Int8Arguments layer(x, h0, c0, weights, batch_sizes, cell);
    const std::vector<int64_t> states{layer.directions, layer.batch, layer.hidden_size};
    Tensor y = empty(layer.output_sizes, ScalarType::Float, x);
    Tensor h_n = empty(states, ScalarType::Float, x);
    Tensor c_n = layer.c0 ? empty(states, ScalarType::Float, x) : placeholder(ScalarType::Float, x);
    Int8Forward problems[cpu::kMaxDirections];
    for (int64_t d = 0; d < layer.directions; ++d) {
      const int64_t offset = d * layer.batch * layer.hidden_size;
      problems[d] = layer.problem(d);
      problems[d].y = static_cast<float*>(y.data_ptr()) + d * layer.hidden_size;
      problems[d].y_stride = layer.directions * layer.hidden_size;
      problems[d].h_n = static_cast<float*>(h_n.data_ptr()) + offset;
      if (layer.c0) problems[d].c_n = static_cast<float*>(c_n.data_ptr()) + offset;
    }
    cpu::int8_forward(problems, int(layer.directions), threads(), parallel_for);
    return std::tuple(y, h_n, c_n);
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent_int8", TORCH_BOX(&fastrnn::recurrent_int8));
}
