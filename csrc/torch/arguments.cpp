#include "torch/arguments.h"

#include <algorithm>

namespace fastrnn {
namespace {

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

std::string slot_names(int64_t slots) {
  std::string names;
  for (int slot = 0; slot < kWeightSlots; ++slot)
    if (has_slot(slots, slot))
      names += (names.empty() ? "" : ", ") + std::string(kWeightSlotNames[slot]);
  return names;
}

void check_slots(int64_t slots, const CellInfo& cell) {
  const bool is_known =
      slots >> kSequenceSlotsEnd == 0 && count_between(slots, kGainIh, kFirstSequenceSlot) == 0;
  if (cell.dense) {
    FASTRNN_CHECK(is_known && has_slot(slots, kWIh) && has_slot(slots, kWHh),
                  "slots must hold w_ih and w_hh and no bit of an unknown slot, got ", slots, ".");
    FASTRNN_CHECK(has_slot(slots, kBIh) == has_slot(slots, kBHh),
                  "slots must hold both biases or none, got ", slots, ".");
  } else {
    FASTRNN_CHECK(
        is_known && has_slot(slots, kWIh) && !has_slot(slots, kWHh) && !has_slot(slots, kBHh),
        "slots must hold w_ih, neither w_hh nor b_hh, and no bit of an unknown slot for ",
        cell.name, ", got ", slots, ".");
  }
  FASTRNN_CHECK(has_slot(slots, kWUnit) == (cell.parameters > 0), "slots must ",
                cell.parameters > 0 ? "" : "not ", "hold w_unit for ", cell.name, ", got ", slots,
                ".");
}

}  // namespace

void check_memory(const char* name, const Tensor& t, int64_t value_bytes) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t offset = 0, bytes = 0;
  check_torch(aoti_torch_get_storage_offset(t.get(), &offset));
  check_torch(aoti_torch_get_storage_size(t.get(), &bytes));
  int64_t values = offset + 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    values += (sizes[i] - 1) * strides[i];
  }
  FASTRNN_CHECK(values <= bytes / value_bytes, name, " must have memory for all of its ", values,
                " values, got a storage of ", bytes, " bytes.");
}

std::vector<int64_t> packed_step_rows(const Tensor& batch_sizes, int64_t batch) {
  FASTRNN_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu() &&
                    dtype_code(batch_sizes) == aoti_torch_dtype_int64(),
                "batch_sizes must be a 1-D int64 tensor on the CPU, got another.");
  check_memory("batch_sizes", batch_sizes, value_bytes(ScalarType::Long));
  const Tensor sizes = as_contiguous(batch_sizes);
  const int64_t steps = sizes.size(0);
  const auto* values = static_cast<const int64_t*>(sizes.const_data_ptr());
  std::vector<int64_t> rows(values, values + steps);
  int64_t before = batch;
  for (int64_t t = 0; t < steps; ++t) {
    FASTRNN_CHECK(rows[t] > 0 && rows[t] <= before && (t > 0 || rows[0] == batch),
                  "batch_sizes must start with the batch size ", batch,
                  ", be positive and not increase, got ", rows[t], " at step ", t, ".");
    before = rows[t];
  }
  return rows;
}

LayerArguments::LayerArguments(const char* data_name, const Tensor& data, const Tensor& h0_,
                               const std::optional<Tensor>& c0_, const std::vector<Tensor>& weights,
                               int64_t slots, const std::optional<std::vector<Tensor>>& sequence,
                               const std::string& cell_name, ScalarType compute_type)
    : cell(find_cell(cell_name)),
      dtype(checked_dtype(data_name, data)),
      compute(compute_type),
      code(dtype_code(data)),
      place(data),
      packed(has_slot(slots, kBatchSizes)),
      single(!packed && h0_.dim() == 2),
      h0(h0_),
      c0(c0_) {
  FASTRNN_CHECK(single || h0.dim() == 3, "h0 must be [D, B, R], got ", h0.dim(), " dimensions.");
  const int64_t dims = packed || single ? 2 : 3;
  FASTRNN_CHECK(data.dim() == dims, data_name, " must have ", dims, " dimensions ",
                packed   ? "with batch_sizes"
                : single ? "with a 2-D h0"
                         : "without batch_sizes",
                ", got ", data.dim(), ".");
  directions = single ? 1 : h0.size(0);
  batch = h0.size(single ? 0 : 1);
  FASTRNN_CHECK(directions == 1 || directions == 2, "h0 must have 1 or 2 directions, got ",
                directions, ".");
  check_memory(data_name, data, value_bytes(dtype));
  read_weights(weights, slots);
  read_sequence(data_name, data, slots, sequence);
  check_products();
}

void LayerArguments::read_weights(const std::vector<Tensor>& weights, int64_t slots) {
  check_slots(slots, *cell);
  const int64_t count = count_slots(slots);
  FASTRNN_CHECK(count * directions == int64_t(weights.size()), "weights must hold ", count,
                " tensors per direction (", slot_names(slots), "), got ", weights.size(), " for ",
                directions, " direction(s).");
  const bool projected = has_slot(slots, kWHr);
  FASTRNN_CHECK(!projected || cell->projects,
                "weights must hold a projection for lstm only, got one for ", cell->name, ".");
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
  FASTRNN_CHECK(c0.has_value() == (cell->states > 1), "c0 must ",
                cell->states > 1 ? "be given for " : "not be given for ", cell->name, ".");
  if (c0) {
    check_like("c0", *c0);
    check_sizes("c0", *c0, state_sizes(cell_units()));
  }
  h0 = contiguous_compute(h0);
  if (c0) c0 = contiguous_compute(*c0);
  const int64_t gate_rows = cell->gates * hidden_size;
  direction.reserve(directions);
  for (int64_t d = 0; d < directions; ++d) {
    const Tensor* next = &weights[d * count];
    const auto matrix = [&](WeightSlot slot, int64_t rows, int64_t columns) {
      check_sizes(kWeightSlotNames[slot], *next, {rows, columns});
      return Rows(to_compute(*next++));
    };
    const auto optional_matrix = [&](WeightSlot slot, int64_t rows, int64_t columns) {
      return has_slot(slots, slot) ? std::optional(matrix(slot, rows, columns)) : std::nullopt;
    };
    const auto vector = [&](WeightSlot slot, int64_t size) -> std::optional<Tensor> {
      if (!has_slot(slots, slot)) return std::nullopt;
      check_sizes(kWeightSlotNames[slot], *next, {size});
      return contiguous_compute(*next++);
    };
    // in the order of the slots; an initialiser list evaluates from left to right
    direction.push_back(Direction{matrix(kWIh, gate_rows, input_size),
                                  optional_matrix(kWHh, gate_rows, out), vector(kBIh, gate_rows),
                                  vector(kBHh, gate_rows),
                                  optional_matrix(kWHr, proj_size, hidden_size),
                                  vector(kWUnit, cell->parameters * hidden_size)});
  }
}

void LayerArguments::read_sequence(const char* data_name, const Tensor& data, int64_t slots,
                                   const std::optional<std::vector<Tensor>>& sequence) {
  const int64_t count = sequence ? int64_t(sequence->size()) : 0;
  FASTRNN_CHECK(count_sequence_slots(slots) == count, "sequence must hold ",
                count_sequence_slots(slots), " tensors, one per slot, got ", count, ".");
  if (packed)
    read_packed(data_name, data, sequence->front());  // the first slot
  else
    read_padded(data_name, data);
  step_offset.reserve(step_rows.size());
  int64_t offset = 0;
  for (const int64_t size : step_rows) {
    step_offset.push_back(offset);
    offset += size;
  }
}

void LayerArguments::read_padded(const char* data_name, const Tensor& data) {
  steps = single ? 1 : data.size(0);
  const int64_t own_batch = data.size(single ? 0 : 1);
  FASTRNN_CHECK(own_batch == batch, data_name, " must have the batch ", batch, " of h0, got ",
                own_batch, ".");
  rows = checked_product(steps, batch);
  step_rows.assign(batch > 0 ? steps : 0, batch);  // T may be anything where nothing has rows
}

void LayerArguments::read_packed(const char* data_name, const Tensor& data,
                                 const Tensor& batch_sizes) {
  step_rows = packed_step_rows(batch_sizes, batch);
  steps = int64_t(step_rows.size());
  rows = 0;
  for (const int64_t count : step_rows) rows = std::min(rows + count, kMostValues);
  FASTRNN_CHECK(rows == data.size(0), data_name, " must have the ", rows,
                " rows that batch_sizes add up to, got ", data.size(0), ".");
}

// Of outputs, workspaces and what is saved; a chunk of rows has 4 times the batch at most.
void LayerArguments::check_products() const {
  const int64_t columns = 4 * cell->gradient_columns() + cell->saved + cell->states;
  const int64_t width = checked_product(columns, hidden_size + kPadding);
  const int64_t most = std::max({input_size, out(), hidden_size}) + kPadding;
  checked_product(width, most);
}

void LayerArguments::check_like(const char* name, const Tensor& t) const {
  FASTRNN_CHECK(DeviceId(t) == place, name, " must be on the device of the input, got another.");
  FASTRNN_CHECK(dtype_code(t) == code, name, " must have the dtype ",
                torch::headeronly::toString(dtype), " of the input, got ", dtype_name(t), ".");
  check_memory(name, t, value_bytes(dtype));
}

void check_input(const LayerArguments& layer, const Tensor& x) {
  const int64_t size = x.size(x.dim() - 1);
  FASTRNN_CHECK(size == layer.input_size, "x must have the input size ", layer.input_size,
                " of w_ih, got ", size, ".");
}

void check_kept(const LayerArguments& layer, const char* name, const Tensor& kept,
                std::initializer_list<int64_t> sizes) {
  check_sizes(name, kept, sizes);
  const ScalarType expected = accumulate_type(layer.dtype);
  const int32_t code =
      expected == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  FASTRNN_CHECK(dtype_code(kept) == code && kept.is_contiguous() && DeviceId(kept) == layer.place,
                name, " must be the result of recurrent_forward, got another tensor.");
  check_memory(name, kept, value_bytes(expected));
}

void check_backward(const LayerArguments& layer, const Tensor& y, const Tensor& saved,
                    const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                    const std::optional<Tensor>& d_c_n, const std::optional<Tensor>& d_c_steps) {
  if (layer.cell->saved > 0)
    check_kept(layer, "saved", saved,
               {layer.directions, layer.rows, layer.cell->saved * layer.hidden_size});
  check_gradients(layer, y, d_y, d_h_n, d_c_n, d_c_steps);
}

void check_gradients(const LayerArguments& layer, const Tensor& y, const std::optional<Tensor>& d_y,
                     const std::optional<Tensor>& d_h_n, const std::optional<Tensor>& d_c_n,
                     const std::optional<Tensor>& d_c_steps) {
  layer.check_like("y", y);
  check_sizes("y", y, layer.output_sizes());
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
    check_sizes("d_c_n", *d_c_n, layer.state_sizes(layer.cell_units()));
  }
  FASTRNN_CHECK(!d_c_steps || layer.c0, "d_c_steps must not be given for ", layer.cell->name,
                ", got a tensor.");
  if (d_c_steps) {
    layer.check_like("d_c_steps", *d_c_steps);
    check_sizes("d_c_steps", *d_c_steps, {layer.directions, layer.rows, layer.cell_units()});
  }
}

// What a direction writes of states and their gradients [D, B, *], of values saved [D, N, *], or
}  // namespace fastrnn
