// The operators for padded batches whose rows have lengths and resets, on the CPU.
//
// Where all rows have all steps, the kernels replace the states of the padded batch before a reset.
// Otherwise a batch is cut into segments (problem/segments.h), whose rows are copied into packed
// order; the kernels for packed rows run, and the results are copied back.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/runtime/thread_budget.h"
#include "problem/segments.h"
#include "torch/cpu_layer.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The marks of a batch, checked.
struct Marks {
  std::vector<int64_t> lengths;  // [B]
  std::vector<uint8_t> resets;   // [T, B] of 0 and 1, or empty: none

  Marks(const OptionalTensor& lengths_, const OptionalTensor& resets_, int64_t steps,
        int64_t batch) {
    read_lengths(lengths_, steps, batch);
    if (resets_) read_resets(*resets_, steps, batch);
  }

  // Whether all rows have all steps.
  bool is_padded(int64_t steps) const {
    return std::all_of(lengths.begin(), lengths.end(),
                       [&](int64_t length) { return length == steps; });
  }

 private:
  void read_lengths(const OptionalTensor& t, int64_t steps, int64_t batch) {
    if (!t) {
      lengths.assign(size_t(batch), steps);
      return;
    }
    FASTRNN_CHECK(t->is_cpu() && t->dim() == 1 && dtype_code(*t) == aoti_torch_dtype_int64(),
                  "lengths must be 1-D int64 on the CPU, got another tensor.");
    FASTRNN_CHECK(t->size(0) == batch, "lengths must have the shape [", batch, "], got ",
                  text(sizes_of(*t)), ".");
    check_memory("lengths", *t, sizeof(int64_t));
    const Tensor own = as_contiguous(*t);
    const auto* values = static_cast<const int64_t*>(own.const_data_ptr());
    lengths.assign(values, values + batch);
    for (const int64_t length : lengths)
      FASTRNN_CHECK(length >= 0 && length <= steps, "lengths must be from 0 to the ", steps,
                    " steps of x, got ", length, ".");
  }

  void read_resets(const Tensor& t, int64_t steps, int64_t batch) {
    const bool is_bool = dtype_code(t) == aoti_torch_dtype_bool();
    FASTRNN_CHECK(
        t.is_cpu() && t.dim() == 2 && (is_bool || dtype_code(t) == aoti_torch_dtype_float64()),
        "resets must be 2-D bool or float64 on the CPU, got another tensor.");
    FASTRNN_CHECK(t.size(0) == steps && t.size(1) == batch, "resets must have the shape ",
                  text(std::vector<int64_t>{steps, batch}), ", got ", text(sizes_of(t)), ".");
    check_memory("resets", t, is_bool ? 1 : sizeof(double));
    const Tensor own = as_contiguous(t);
    const size_t count = size_t(steps * batch);
    bool any = false;
    resets.resize(count);
    for (size_t i = 0; i < count; ++i) {
      double value = 0;
      if (is_bool) {
        value = static_cast<const uint8_t*>(own.const_data_ptr())[i] != 0;
      } else {
        value = static_cast<const double*>(own.const_data_ptr())[i];
        FASTRNN_CHECK(value == 0 || value == 1,
                      "resets must hold only 0 and 1, got another value.");
      }
      resets[i] = value == 1;
      any = any || resets[i];
    }
    if (!any) resets.clear();
  }
};

// Directions of a layer that are cut alike, and their segments.
struct Group {
  int64_t first, count;  // directions
  Segments segments;

  int64_t rows() const { return int64_t(segments.rows.size()); }          // N
  int64_t sequences() const { return int64_t(segments.initial.size()); }  // A
};

// Without resets both directions have the same segments. With resets, a direction that runs
// backwards in time is cut at other places; its rows are in its own order then.
std::vector<Group> groups_of(const Marks& marks, const LayerArguments& layer) {
  const auto cut_for = [&](bool backwards) {
    return cut({layer.steps, layer.batch, marks.lengths.data(),
                marks.resets.empty() ? nullptr : marks.resets.data(), backwards});
  };
  if (marks.resets.empty() || layer.directions == 1)
    return {Group{0, layer.directions, cut_for(false)}};
  return {Group{0, 1, cut_for(false)}, Group{1, 1, cut_for(true)}};
}

// Runs body(begin, end) for all of n rows of so many bytes, in parallel if there are many. (T=50,
// B=16, H=64 with 3% resets copies 200 KiB twice: a second thread saves 10 of 40 microseconds on
// two cores of an AMD EPYC, Zen 4.)
template <class Body>
void for_rows(int64_t n, int64_t bytes, const Body& body) {
  constexpr int64_t kBytesPerThread = 64 * 1024;
  int64_t parts = std::min<int64_t>(threads(), n * bytes / kBytesPerThread);
  if (cpu::max_threads() > 0) parts = std::min<int64_t>(parts, cpu::max_threads());
  if (parts <= 1 || cpu::is_forked()) return body(0, n);
  struct Context {
    const Body& body;
    int64_t n, parts;
  } context{body, n, parts};
  parallel_for(
      parts,
      [](int64_t begin, int64_t end, void* pointer) {
        const Context& c = *static_cast<Context*>(pointer);
        c.body(c.n * begin / c.parts, c.n * end / c.parts);
      },
      &context);
}

// The rows [*, width] of a tensor [T, B, *] from a column on, at any strides.
class BatchRows {
 public:
  BatchRows(const Tensor& t, ScalarType dtype, int64_t column, int64_t columns)
      : kept_(t.size(2) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t)),
        bytes_(columns * value_bytes(dtype)),
        batch_(kept_.size(1)),
        step_(kept_.stride(0) * value_bytes(dtype)),
        row_(kept_.stride(1) * value_bytes(dtype)),
        data_(static_cast<const char*>(kept_.const_data_ptr()) + column * value_bytes(dtype)) {}

  // Copies the rows of the padded batch into packed order.
  void pack(const std::vector<int64_t>& rows, void* to) const {
    const bool is_even = step_ == batch_ * row_;  // then no row needs a division
    for_rows(int64_t(rows.size()), bytes_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t offset =
            is_even ? rows[i] * row_ : rows[i] / batch_ * step_ + rows[i] % batch_ * row_;
        std::memcpy(static_cast<char*>(to) + i * bytes_, data_ + offset, size_t(bytes_));
      }
    });
  }

 private:
  Tensor kept_;
  int64_t bytes_, batch_, step_, row_;
  const char* data_;
};

// Rows t*B+b of columns of t [T, B, *] in packed order [N, columns], for use within the call.
Tensor packed_rows(const Tensor& t, ScalarType dtype, int64_t column, int64_t columns,
                   const std::vector<int64_t>& rows) {
  Tensor packed = recycled({int64_t(rows.size()), columns}, dtype, t);
  if (columns > 0 && !rows.empty())
    BatchRows(t, dtype, column, columns).pack(rows, packed.data_ptr());
  return packed;
}

// Copies packed rows [N, columns] into columns of a contiguous tensor [T*B, width].
void unpack_rows(const Tensor& packed, const std::vector<int64_t>& rows, ScalarType dtype,
                 int64_t column, int64_t columns, int64_t width, const Tensor& to) {
  const int64_t value = value_bytes(dtype), bytes = columns * value;
  const auto* from = static_cast<const char*>(packed.const_data_ptr());
  auto* data = static_cast<char*>(to.data_ptr()) + column * value;
  if (bytes == 0) return;
  for_rows(int64_t(rows.size()), bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(data + rows[i] * width * value, from + i * bytes, size_t(bytes));
  });
}

// Zeroes the rows of a contiguous tensor [T, B, width] beyond the lengths.
void clear_beyond(const std::vector<int64_t>& lengths, int64_t steps, int64_t row_bytes,
                  const Tensor& to) {
  const int64_t batch = int64_t(lengths.size());
  auto* data = static_cast<char*>(to.data_ptr());
  if (row_bytes == 0) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = lengths[size_t(b)]; t < steps; ++t)
      std::memset(data + (t * batch + b) * row_bytes, 0, size_t(row_bytes));
}

template <class T>
void add(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// A state after a reset in the layer's compute type, or zeros.
class ResetState {
 public:
  // like: the initial state.
  ResetState(const char* name, const LayerArguments& layer, const OptionalTensor& t,
             const Tensor& like) {
    if (!t) return;
    layer.check_like(name, *t);
    std::vector<int64_t> expected = sizes_of(like);
    if (t->dim() == 4) expected.insert(expected.begin(), layer.steps);
    FASTRNN_CHECK(sizes_of(*t) == expected, name, " must have the shape ", text(sizes_of(like)),
                  ", or one with ", layer.steps, " steps before, got ", text(sizes_of(*t)), ".");
    const Tensor own = layer.to_compute(*t);
    const int64_t last = own.dim() - 1;
    kept_ = own.size(last) == 1 || own.stride(last) == 1 ? own : torch::stable::contiguous(own);
    const int64_t bytes = value_bytes(layer.compute);
    step_ = last == 3 ? kept_->stride(0) * bytes : 0;
    direction_ = kept_->stride(last - 2) * bytes;
    row_ = kept_->stride(last - 1) * bytes;
  }

  // Null: zeros.
  const char* at(int64_t t, int64_t d, int64_t b) const {
    if (!kept_) return nullptr;
    return static_cast<const char*>(kept_->const_data_ptr()) + t * step_ + d * direction_ +
           b * row_;
  }

 private:
  OptionalTensor kept_;
  int64_t step_ = 0, direction_ = 0, row_ = 0;
};

// Returns the initial states of the segments [count, A, units]. state: [D, B, units], contiguous.
Tensor initial_states(const LayerArguments& layer, const Group& group, const Tensor& state,
                      const ResetState& reset) {
  const int64_t units = state.size(2), batch = layer.batch;
  const size_t bytes = size_t(units * value_bytes(layer.compute));
  Tensor initial = empty({group.count, group.sequences(), units}, layer.compute, state);
  auto* to = static_cast<char*>(initial.data_ptr());
  const auto* from = static_cast<const char*>(state.const_data_ptr());
  if (bytes == 0) return initial;
  for (int64_t d = group.first; d < group.first + group.count; ++d) {
    for (const int64_t index : group.segments.initial) {
      const int64_t b = index % batch;
      const char* row =
          index < batch ? from + size_t(d * batch + b) * bytes : reset.at(index / batch - 1, d, b);
      row == nullptr ? std::memset(to, 0, bytes) : std::memcpy(to, row, bytes);
      to += bytes;
    }
  }
  return initial;
}

// Copies the final states of the rows from those of the segments [count, A, units], or, for rows
// without steps, from the initial state [D, B, units]. to: [D, B, units].
void final_states(const LayerArguments& layer, const Group& group, const Tensor& states,
                  const Tensor& initial, const Tensor& to) {
  const int64_t units = initial.size(2), batch = layer.batch, count = group.sequences();
  const size_t bytes = size_t(units * value_bytes(layer.compute));
  const auto* own = static_cast<const char*>(states.const_data_ptr());
  const auto* before = static_cast<const char*>(initial.const_data_ptr());
  auto* data = static_cast<char*>(to.data_ptr());
  if (bytes == 0) return;
  for (int64_t d = 0; d < group.count; ++d) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t last = group.segments.final[size_t(b)];
      const size_t row = size_t((group.first + d) * batch + b) * bytes;
      std::memcpy(data + row, last < count ? own + size_t(d * count + last) * bytes : before + row,
                  bytes);
    }
  }
}

// The backward of final_states: returns the gradients of the segments' final states.
// gradient: [D, B, units], contiguous.
Tensor final_gradients(const LayerArguments& layer, const Group& group, const Tensor& gradient) {
  const int64_t units = gradient.size(2), batch = layer.batch, count = group.sequences();
  const size_t bytes = size_t(units * value_bytes(layer.compute));
  Tensor packed = empty({group.count, count, units}, layer.compute, gradient);
  auto* to = static_cast<char*>(packed.data_ptr());
  const auto* from = static_cast<const char*>(gradient.const_data_ptr());
  if (bytes == 0 || count == 0) return packed;
  std::memset(to, 0, size_t(group.count * count) * bytes);
  for (int64_t d = 0; d < group.count; ++d) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t last = group.segments.final[size_t(b)];
      if (last < count)
        std::memcpy(to + size_t(d * count + last) * bytes,
                    from + size_t((group.first + d) * batch + b) * bytes, bytes);
    }
  }
  return packed;
}

// The backward of initial_states: adds the gradients of the segments' initial states [count, A, *]
// to d_state [D, B, *] and d_reset, [D, B, *] or [T, D, B, *], and that of a row without steps,
// whose final state is its initial one. d_final: [D, B, *] or null.
template <class T>
void initial_gradients(const LayerArguments& layer, const Group& group, const Tensor& gradient,
                       const OptionalTensor& d_final, const Tensor& d_state,
                       const OptionalTensor& d_reset) {
  const int64_t units = d_state.size(2), batch = layer.batch, count = group.sequences();
  const auto* from = static_cast<const T*>(gradient.const_data_ptr());
  auto* to_state = static_cast<T*>(d_state.data_ptr());
  auto* to_reset = d_reset ? static_cast<T*>(d_reset->data_ptr()) : nullptr;
  const int64_t step = d_reset && d_reset->dim() == 4 ? layer.directions * batch * units : 0;
  for (int64_t d = group.first; d < group.first + group.count; ++d) {
    for (const int64_t index : group.segments.initial) {
      const int64_t row = d * batch + index % batch;
      if (index < batch)
        add(from, units, to_state + row * units);
      else if (to_reset != nullptr)
        add(from, units, to_reset + (index / batch - 1) * step + row * units);
      from += units;
    }
    if (!d_final) continue;
    const auto* ends = static_cast<const T*>(d_final->const_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = d * batch + b;
      if (group.segments.final[size_t(b)] >= count)
        add(ends + row * units, units, to_state + row * units);
    }
  }
}

// Adds packed rows [N, columns] to those of a tensor [T*B, columns].
template <class T>
void add_rows(const Tensor& packed, const std::vector<int64_t>& rows, int64_t columns,
              const Tensor& to) {
  const auto* from = static_cast<const T*>(packed.const_data_ptr());
  auto* data = static_cast<T*>(to.data_ptr());
  for_rows(int64_t(rows.size()), columns * int64_t(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add(from + i * columns, columns, data + rows[i] * columns);
  });
}

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = empty(sizes, dtype, like);
  size_t bytes = size_t(value_bytes(dtype));
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (bytes > 0) std::memset(t.data_ptr(), 0, bytes);
  return t;
}

// A layer over a marked batch, checked: its arguments for the padded batch, and those for the
// packed rows of each group. There are no groups if the kernels run the padded batch; its resets
// are in `resets` then.
struct MarkedLayer {
  LayerArguments padded;
  Marks marks;
  std::vector<Group> groups;
  std::vector<LayerArguments> packed;
  LayerResets resets;

  MarkedLayer(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
              const std::vector<Tensor>& weights, int64_t slots, const OptionalTensor& lengths,
              const OptionalTensor& resets, const OptionalTensor& reset_h,
              const OptionalTensor& reset_c, const std::string& cell, ScalarType compute)
      : padded("x", x, h0, c0, weights, slots, std::nullopt, cell, compute),
        marks(lengths, resets, padded.steps, padded.batch) {
    FASTRNN_CHECK(!padded.single, "h0 must be [D, B, R], got 2 dimensions.");
    check_input(padded, x);
    FASTRNN_CHECK(!reset_c || padded.c0, "reset_c must not be given for ", cell, ", got a tensor.");
    const ResetState after_h("reset_h", padded, reset_h, padded.h0);
    const ResetState after_c("reset_c", padded, reset_c, padded.c0 ? *padded.c0 : padded.h0);
    // fastrnn/ops/ragged.py computes the gradients of cells with parameters, from packed rows; the
    // time loops of cells that reduce over units replace no states.
    const bool may_replace =
        marks.resets.empty() || (padded.cell->parameters == 0 && !padded.cell->computes_rows);
    if (may_replace && marks.is_padded(padded.steps)) {
      if (!marks.resets.empty()) replace_states(reset_h, reset_c);
      return;
    }
    groups = groups_of(marks, padded);
    for (const Group& group : groups) packed.push_back(packed_layer(group, after_h, after_c));
  }

 private:
  void replace_states(const OptionalTensor& reset_h, const OptionalTensor& reset_c) {
    const auto states = [&](const OptionalTensor& t, const Tensor& like) {
      return t ? padded.contiguous_compute(*t) : zeros(sizes_of(like), padded.compute, like);
    };
    resets.mask = marks.resets.data();
    resets.h = states(reset_h, padded.h0);
    if (padded.c0) resets.c = states(reset_c, *padded.c0);
  }

  LayerArguments packed_layer(const Group& group, const ResetState& after_h,
                              const ResetState& after_c) const {
    LayerArguments own = padded;
    own.packed = true;
    own.directions = group.count;
    own.direction.assign(padded.direction.begin() + group.first,
                         padded.direction.begin() + group.first + group.count);
    own.batch = group.sequences();
    own.rows = group.rows();
    own.step_rows = group.segments.batch_sizes;
    own.steps = int64_t(own.step_rows.size());
    own.step_offset.clear();
    int64_t offset = 0;
    for (const int64_t size : own.step_rows) {
      own.step_offset.push_back(offset);
      offset += size;
    }
    own.h0 = initial_states(padded, group, padded.h0, after_h);
    if (padded.c0) own.c0 = initial_states(padded, group, *padded.c0, after_c);
    return own;
  }
};

// The values that a group's directions have saved [count, T*B, S*H].
Tensor saved_of(const Tensor& saved, const Group& group) {
  if (saved.dim() != 3 || saved.size(0) == group.count) return saved;
  Tensor whole = saved;
  return torch::stable::narrow(whole, 0, group.first, group.count);
}

// Zeroes the values [D, T*B, S*H] of the rows from `rows` on.
void clear_saved_beyond(int64_t rows, const Tensor& saved) {
  const int64_t bytes = saved.size(2) * (dtype_code(saved) == aoti_torch_dtype_float64() ? 8 : 4);
  const int64_t rest = saved.size(1) - rows;
  for (int64_t d = 0; d < saved.size(0); ++d)
    std::memset(static_cast<char*>(saved.data_ptr()) + (d * saved.size(1) + rows) * bytes, 0,
                size_t(rest * bytes));
}

FourTensors run_marked(const MarkedLayer& marked, const Tensor& x, bool save) {
  const LayerArguments& layer = marked.padded;
  const ForwardOutputs results(layer, save, x, for_saved);
  if (marked.groups.empty()) {
    run_forward(layer, layer.to_compute(x), results, WeightFormat::kNative, marked.resets);
    return results.tensors(layer);
  }
  const int64_t out = layer.out(), width = layer.directions * out;
  const ScalarType compute = layer.compute;
  clear_beyond(marked.marks.lengths, layer.steps, width * value_bytes(compute), results.y);
  for (size_t i = 0; i < marked.groups.size(); ++i) {
    const Group& group = marked.groups[i];
    const LayerArguments& own = marked.packed[i];
    const Tensor rows = packed_rows(x, layer.dtype, 0, layer.input_size, group.segments.rows);
    const ForwardOutputs packed(
        recycled(own.output_sizes(), compute, x), empty(own.state_sizes(out), compute, x),
        layer.c0 ? OptionalTensor(empty(own.state_sizes(own.cell_units()), compute, x))
                 : std::nullopt,
        results.saved ? OptionalTensor(saved_of(*results.saved, group)) : std::nullopt);
    run_forward(own, layer.to_compute(rows), packed);
    unpack_rows(packed.y, group.segments.rows, compute, group.first * out, group.count * out, width,
                results.y);
    final_states(layer, group, packed.h_n, layer.h0, results.h_n);
    if (layer.c0) final_states(layer, group, *packed.c_n, *layer.c0, *results.c_n);
    // the gradient of w_hr is a product over all T*B rows
    if (packed.saved && layer.proj_size > 0) clear_saved_beyond(group.rows(), *packed.saved);
  }
  return results.tensors(layer);
}

FourTensors forward_of(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                       const std::vector<Tensor>& weights, int64_t slots,
                       const OptionalTensor& lengths, const OptionalTensor& resets,
                       const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                       const std::string& cell, bool save) {
  const ScalarType dtype = checked_dtype("x", x);
  const auto layer_in = [&](ScalarType compute) {
    return MarkedLayer(x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell, compute);
  };
  if (dtype == ScalarType::BFloat16) {
    const MarkedLayer marked = layer_in(dtype);
    const auto computes = [](const LayerArguments& layer) {
      return cpu::computes_bfloat16(layer.shape(0));
    };
    if (marked.groups.empty() ? computes(marked.padded)
                              : std::all_of(marked.packed.begin(), marked.packed.end(), computes))
      return run_marked(marked, x, save);
  }
  return run_marked(layer_in(accumulate_type(dtype)), x, save);
}

FourTensors ragged_forward(Tensor x, Tensor h0, OptionalTensor c0, std::vector<Tensor> weights,
                           int64_t slots, OptionalTensor lengths, OptionalTensor resets,
                           OptionalTensor reset_h, OptionalTensor reset_c, StringHandle cell,
                           int64_t outputs) {
  return guarded([&] {
    return forward_of(x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c,
                      consume_string(cell), has_slot(outputs, kSaved));
  });
}

ThreeTensors ragged_layer(Tensor x, Tensor h0, OptionalTensor c0, std::vector<Tensor> weights,
                          int64_t slots, OptionalTensor lengths, OptionalTensor resets,
                          OptionalTensor reset_h, OptionalTensor reset_c, StringHandle cell) {
  return guarded([&] {
    auto [y, h_n, c_n, saved] = forward_of(x, h0, c0, weights, slots, lengths, resets, reset_h,
                                           reset_c, consume_string(cell), false);
    return ThreeTensors(y, h_n, c_n);
  });
}

// Computes the gradients of a batch that is not padded in the layer's compute type. Adds those of
// the states after a reset to d_reset_h and d_reset_c. Of the inputs, y and d_y have the caller's
// type: they are packed before they are converted.
template <class T>
Gradients run_groups(const MarkedLayer& marked, const Tensor& x, const Tensor& y,
                     const Tensor& saved, const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                     const OptionalTensor& d_c_n, const std::vector<Tensor>& weights, int64_t slots,
                     int64_t outputs, const OptionalTensor& d_reset_h,
                     const OptionalTensor& d_reset_c) {
  const LayerArguments& layer = marked.padded;
  const ScalarType compute = layer.compute;
  const int64_t out = layer.out(), count = count_slots(slots);
  Gradients all{placeholder(compute, x), zeros(sizes_of(layer.h0), compute, x), {}, {}, {}};
  if (layer.c0) all.d_c0 = zeros(sizes_of(*layer.c0), compute, x);
  if (layer.proj_size > 0)
    all.d_h_all = zeros({layer.directions, layer.rows, layer.proj_size}, compute, x);
  const bool needs_x = has_slot(outputs, kDX), is_one = marked.groups.size() == 1;
  if (needs_x) {
    all.d_x = is_one ? ordinary(sizes_of(x), compute, x) : zeros(sizes_of(x), compute, x);
    if (is_one)
      clear_beyond(marked.marks.lengths, layer.steps, layer.input_size * int64_t(sizeof(T)),
                   all.d_x);
  }
  for (size_t i = 0; i < marked.groups.size(); ++i) {
    const Group& group = marked.groups[i];
    const LayerArguments& own = marked.packed[i];
    const std::vector<int64_t>& rows = group.segments.rows;
    const auto packed_outputs = [&](const Tensor& t) {
      return packed_rows(t, layer.dtype, group.first * out, group.count * out, rows);
    };
    const BackwardInputs packed(
        own, packed_outputs(y), saved_of(saved, group),
        d_y ? OptionalTensor(packed_outputs(*d_y)) : std::nullopt,
        d_h_n ? OptionalTensor(final_gradients(layer, group, *d_h_n)) : std::nullopt,
        d_c_n ? OptionalTensor(final_gradients(layer, group, *d_c_n)) : std::nullopt);
    const std::vector<Tensor> own_weights(weights.begin() + group.first * count,
                                          weights.begin() + (group.first + group.count) * count);
    const int64_t of_weights = outputs >> (kDWIh + group.first * kGradientsPerDirection) << kDWIh;
    const int64_t before_weights = outputs & ((int64_t(1) << kDWIh) - 1);
    const Gradients found =
        run_gradients(own, packed, packed_rows(x, layer.dtype, 0, layer.input_size, rows),
                      own_weights, slots, of_weights | before_weights, recycled);
    if (needs_x && is_one)
      unpack_rows(found.d_x, rows, compute, 0, layer.input_size, layer.input_size, all.d_x);
    else if (needs_x)
      add_rows<T>(found.d_x, rows, layer.input_size, all.d_x);
    initial_gradients<T>(layer, group, found.d_h0, d_h_n, all.d_h0, d_reset_h);
    if (layer.c0) initial_gradients<T>(layer, group, *found.d_c0, d_c_n, *all.d_c0, d_reset_c);
    if (all.d_h_all && group.rows() > 0) {
      const size_t size = size_t(layer.proj_size) * sizeof(T);
      for (int64_t d = 0; d < group.count; ++d)
        std::memcpy(
            static_cast<char*>(all.d_h_all->data_ptr()) + (group.first + d) * layer.rows * size,
            static_cast<const char*>(found.d_h_all->const_data_ptr()) + d * group.rows() * size,
            size_t(group.rows()) * size);
    }
    all.d_weights.insert(all.d_weights.end(), found.d_weights.begin(), found.d_weights.end());
  }
  return all;
}

// The results of ragged_gradients in their order.
std::vector<Tensor> gradients_of(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                                 const OptionalTensor& d_c_n, const Tensor& x, const Tensor& h0,
                                 const OptionalTensor& c0, const std::vector<Tensor>& weights,
                                 int64_t slots, const OptionalTensor& lengths,
                                 const OptionalTensor& resets, const OptionalTensor& reset_h,
                                 const OptionalTensor& reset_c, const Tensor& y,
                                 const Tensor& saved, const std::string& cell, int64_t outputs) {
  const ScalarType compute = accumulate_type(checked_dtype("x", x));
  MarkedLayer marked(x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell, compute);
  const LayerArguments& layer = marked.padded;
  check_no_parameters(layer);
  check_backward(layer, y, saved, d_y, d_h_n, d_c_n);
  const auto zeros_for = [&](const OptionalTensor& t, int output) {
    if (!t || !has_slot(outputs, output)) return OptionalTensor();
    return OptionalTensor(zeros(sizes_of(*t), compute, x));
  };
  const OptionalTensor d_reset_h = zeros_for(reset_h, kDResetH);
  const OptionalTensor d_reset_c = zeros_for(reset_c, kDResetC);
  if (marked.resets.mask != nullptr) {
    marked.resets.d_h = d_reset_h;
    marked.resets.d_c = d_reset_c;
  }
  const auto run = compute == ScalarType::Double ? run_groups<double> : run_groups<float>;
  const Gradients found =
      marked.groups.empty()
          ? run_gradients(layer, BackwardInputs(layer, y, saved, d_y, d_h_n, d_c_n), x, weights,
                          slots, outputs, ordinary, nullptr, marked.resets)
          : run(marked, x, y, saved, d_y, layer.contiguous_compute(d_h_n),
                layer.contiguous_compute(d_c_n), weights, slots, outputs, d_reset_h, d_reset_c);
  std::vector<Tensor> all = found.tensors(layer);
  while (int64_t(all.size()) < kDResetH) all.push_back(placeholder(layer.dtype, x));
  for (const OptionalTensor& d_reset : {d_reset_h, d_reset_c})
    all.push_back(d_reset ? layer.from_compute(*d_reset) : placeholder(layer.dtype, x));
  return all;
}

template <size_t... I>
auto tuple_of(const std::vector<Tensor>& tensors, std::index_sequence<I...>) {
  return std::make_tuple(tensors[I]...);
}

auto ragged_gradients(OptionalTensor d_y, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor x,
                      Tensor h0, OptionalTensor c0, std::vector<Tensor> weights, int64_t slots,
                      OptionalTensor lengths, OptionalTensor resets, OptionalTensor reset_h,
                      OptionalTensor reset_c, Tensor y, Tensor saved, StringHandle cell,
                      int64_t outputs) {
  return guarded([&] {
    return tuple_of(gradients_of(d_y, d_h_n, d_c_n, x, h0, c0, weights, slots, lengths, resets,
                                 reset_h, reset_c, y, saved, consume_string(cell), outputs),
                    std::make_index_sequence<kRaggedGradientOutputs>());
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("ragged_forward", TORCH_BOX(&fastrnn::ragged_forward));
  m.impl("ragged_layer", TORCH_BOX(&fastrnn::ragged_layer));
  m.impl("ragged_gradients", TORCH_BOX(&fastrnn::ragged_gradients));
}
