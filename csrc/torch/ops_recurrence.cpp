// The operators of time loops with layer normalisation, zoneout and recurrent dropout.
#include "cpu/recurrence.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "torch/cpu_layer.h"
#include "torch/scan_arguments.h"
#include "torch/schemas.h"
#include "torch/thread_pool.h"

namespace fastrnn {
namespace {

constexpr int64_t kMostRecurrenceValues = int64_t(1) << 52;  // of a matrix, see arguments.cpp

ScalarType wide_dtype(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (code == aoti_torch_dtype_float64()) return ScalarType::Double;
  throw_error(name, " must be float32 or float64, got ", dtype_name(t), ".");
}

// The arguments that both operators share: checked, contiguous and kept alive. Every size is
// checked before memory is taken for it, because a tensor without values may have any size.
struct RecurrenceArguments {
  const CellInfo* cell;
  ScalarType dtype;
  int64_t batch, hidden, rows = 0;
  std::vector<int64_t> leading;  // of pre_x and y: [T, B] or [N]
  std::vector<int64_t> step_offset, step_rows;
  bool reverse;
  double epsilon;
  Tensor data;  // pre_x or y
  Tensor h0;
  std::optional<Tensor> c0;
  std::array<std::optional<Tensor>, kRecurrenceParts> parts;

  // is_pre_x: the data are pre_x, else y.
  RecurrenceArguments(const char* data_name, const Tensor& data_, bool is_pre_x, const Tensor& h0_,
                      const std::optional<Tensor>& c0_, const std::vector<Tensor>& tensors,
                      int64_t slots, const std::optional<Tensor>& batch_sizes, bool reverse_,
                      const std::string& cell_name, double epsilon_)
      : cell(find_cell(cell_name)),
        dtype(wide_dtype("h0", h0_)),
        reverse(reverse_),
        epsilon(epsilon_),
        data(data_),
        h0(h0_),
        code_(dtype_code(h0_)) {
    FASTRNN_CHECK(cpu::has_recurrence(*cell), "cell must be one with kernels for options, got '",
                  cell_name, "'.");
    FASTRNN_CHECK(epsilon >= 0 && std::isfinite(epsilon),
                  "epsilon must be a finite number from 0 on, got ", std::to_string(epsilon), ".");
    FASTRNN_CHECK(h0.dim() == 2, "h0 must be [B, H], got ", h0.dim(), " dimensions.");
    batch = h0.size(0);
    hidden = h0.size(1);
    FASTRNN_CHECK(hidden >= 1 && hidden <= kMostRecurrenceValues / 64 / (batch + 1) &&
                      hidden <= (int64_t(1) << 26),
                  "h0 must have a hidden size from 1 to 2^26 and at most 2^46 values, got ",
                  text(sizes_of(h0)), ".");
    h0 = checked("h0", h0_, {batch, hidden});
    FASTRNN_CHECK(c0_.has_value() == (cell->states > 1), "c0 must ",
                  cell->states > 1 ? "be given for " : "not be given for ", cell->name, ".");
    if (c0_) c0 = checked("c0", *c0_, {batch, hidden});
    read_sequence(data_name, is_pre_x ? gate_units() : hidden, batch_sizes);
    read_parts(tensors, slots);
  }

  // A tensor like h0 of these sizes.
  Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    FASTRNN_CHECK(t.is_cpu(), name, " must be on the CPU, got another device.");
    FASTRNN_CHECK(dtype_code(t) == code_, name, " must have the dtype of h0, got ", dtype_name(t),
                  ".");
    FASTRNN_CHECK(sizes_of(t) == sizes, name, " must have the shape ", text(sizes), ", got ",
                  text(sizes_of(t)), ".");
    check_memory(name, t, value_bytes(dtype));
    return as_contiguous(t);
  }
  std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& t,
                                const std::vector<int64_t>& sizes) const {
    return t ? std::optional(checked(name, *t, sizes)) : std::nullopt;
  }
  // The sizes of a tensor with a row for each row of the sequences.
  std::vector<int64_t> row_sizes(int64_t columns) const {
    std::vector<int64_t> sizes = leading;
    sizes.push_back(columns);
    return sizes;
  }
  int64_t gate_units() const { return cell->gates * hidden; }
  bool has(RecurrencePart part) const { return parts[part].has_value(); }
  int64_t saved_width() const {
    return RecurrenceSaved(*cell, hidden, has(kPartGainH), has(kPartZoneH), has(kPartZoneC)).width;
  }

  LayerShape shape() const {
    const Sequence sequence = {int64_t(step_rows.size()), batch, reverse, step_offset.data(),
                               step_rows.data()};
    return {cell->kind, sequence, 0, hidden, 0};
  }
  template <class T>
  RecurrenceParts<T> view() const {
    const auto values = [&](int part) { return values_of<T>(parts[part]); };
    const auto stride = [&](int part) {
      return parts[part] && parts[part]->size(0) == rows && rows != 1 ? hidden : 0;
    };
    return {values(kPartWHh),   values(kPartBHh),   values(kPartGainH), values(kPartGainC),
            values(kPartBiasC), values(kPartMaskH), values(kPartZoneH), values(kPartZoneC),
            stride(kPartZoneH), stride(kPartZoneC), values(kPartBX),    T(epsilon)};
  }

 private:
  void read_sequence(const char* data_name, int64_t columns,
                     const std::optional<Tensor>& batch_sizes) {
    const int64_t dims = batch_sizes ? 2 : 3;
    FASTRNN_CHECK(data.dim() == dims, data_name, " must have ", dims, " dimensions ",
                  batch_sizes ? "with" : "without", " batch_sizes, got ", data.dim(), ".");
    leading = batch_sizes ? std::vector{data.size(0)} : std::vector{data.size(0), batch};
    data = checked(data_name, data, row_sizes(columns));
    if (batch_sizes)
      step_rows = packed_step_rows(*batch_sizes, batch);
    else
      step_rows.assign(batch > 0 ? data.size(0) : 0, batch);
    step_offset.reserve(step_rows.size());
    for (const int64_t size : step_rows) {
      step_offset.push_back(rows);
      rows = std::min(rows + size, kMostRecurrenceValues);
    }
    FASTRNN_CHECK(!batch_sizes || rows == data.size(0), "batch_sizes must add up to the ",
                  data.size(0), " rows of ", data_name, ", got ", rows, ".");
    FASTRNN_CHECK(rows <= kMostRecurrenceValues / 32 / hidden,
                  "the sizes of a layer must multiply to at most 2^47 values, got ", rows,
                  " rows of ", hidden, ".");
  }

  void read_parts(const std::vector<Tensor>& tensors, int64_t slots) {
    FASTRNN_CHECK(slots >= 0 && slots >> kRecurrenceParts == 0 && has_slot(slots, kPartWHh),
                  "slots must hold w_hh and no bit of an unknown part, got ", slots, ".");
    const int count = __builtin_popcountll(std::uint64_t(slots));
    FASTRNN_CHECK(int64_t(tensors.size()) == count, "parts must hold ", count,
                  " tensors, one per slot, got ", int64_t(tensors.size()), ".");
    const bool has_c = cell->states > 1;
    FASTRNN_CHECK(has_c || !(has_slot(slots, kPartGainC) || has_slot(slots, kPartZoneC)),
                  "slots must hold gain_c and zone_c for lstm only, got ", slots, ".");
    FASTRNN_CHECK(has_slot(slots, kPartGainC) || !has_slot(slots, kPartBiasC),
                  "slots must hold bias_c with gain_c only, got ", slots, ".");
    size_t next = 0;
    for (int part = 0; part < kRecurrenceParts; ++part)
      if (has_slot(slots, part)) parts[part] = read_part(part, tensors[next++]);
  }
  Tensor read_part(int part, const Tensor& t) const {
    const char* name = kRecurrencePartNames[part];
    switch (part) {
      case kPartWHh:
        return checked(name, t, {gate_units(), hidden});
      case kPartBHh:
      case kPartBX:
      case kPartGainH:
        return checked(name, t, {gate_units()});
      case kPartMaskH:
        return checked(name, t, {batch, hidden});
      case kPartZoneH:
      case kPartZoneC:
        return checked(name, t, {t.dim() == 2 && t.size(0) == 1 ? 1 : rows, hidden});
      default:
        return checked(name, t, {hidden});
    }
  }

  int32_t code_;
};

// Where a kernel writes a result; null: a placeholder.
template <class T>
T* values_to(const Tensor& t, bool exists = true) {
  return exists ? static_cast<T*>(t.data_ptr()) : nullptr;
}

FourTensors recurrence(Tensor pre_x_, Tensor h0_, std::optional<Tensor> c0_,
                       std::vector<Tensor> parts, int64_t slots, std::optional<Tensor> batch_sizes,
                       bool reverse, StringHandle cell, double epsilon, bool saves) {
  const std::string cell_name = consume_string(cell);
  return guarded([&] {
    const RecurrenceArguments layer("pre_x", pre_x_, true, h0_, c0_, parts, slots, batch_sizes,
                                    reverse, cell_name, epsilon);
    const Tensor& pre_x = layer.data;
    const Tensor y = ordinary(layer.row_sizes(layer.hidden), layer.dtype, pre_x);
    const Tensor h_n = empty({layer.batch, layer.hidden}, layer.dtype, pre_x);
    const bool has_c = layer.c0.has_value();
    const Tensor c_n = has_c ? empty({layer.batch, layer.hidden}, layer.dtype, pre_x)
                             : placeholder(layer.dtype, pre_x);
    const Tensor saved = saves ? recycled({layer.rows, layer.saved_width()}, layer.dtype, pre_x)
                               : placeholder(layer.dtype, pre_x);
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      cpu::recurrence(
          Recurrence<T>{layer.shape(), layer.view<T>(), values_of<T>(pre_x), values_of<T>(layer.h0),
                        values_of<T>(layer.c0), values_to<T>(y), values_to<T>(h_n),
                        values_to<T>(c_n, has_c), values_to<T>(saved, saves)},
          threads(), parallel_for);
    };
    layer.dtype == ScalarType::Double ? run(0.0) : run(0.0f);
    return FourTensors(y, h_n, c_n, saved);
  });
}

FiveTensors recurrence_gradients(std::optional<Tensor> d_y_, std::optional<Tensor> d_h_n_,
                                 std::optional<Tensor> d_c_n_, Tensor h0_,
                                 std::optional<Tensor> c0_, std::vector<Tensor> parts,
                                 int64_t slots, std::optional<Tensor> batch_sizes, bool reverse,
                                 StringHandle cell, double epsilon, Tensor y_, Tensor saved_) {
  const std::string cell_name = consume_string(cell);
  return guarded([&] {
    const RecurrenceArguments layer("y", y_, false, h0_, c0_, parts, slots, batch_sizes, reverse,
                                    cell_name, epsilon);
    const std::vector<int64_t> state{layer.batch, layer.hidden};
    const Tensor& y = layer.data;
    const Tensor saved = layer.checked("saved", saved_, {layer.rows, layer.saved_width()});
    const auto d_y = layer.checked("d_y", d_y_, layer.row_sizes(layer.hidden));
    const auto d_h_n = layer.checked("d_h_n", d_h_n_, state);
    FASTRNN_CHECK(layer.c0 || !d_c_n_, "d_c_n must not be given for ", cell_name, ".");
    const auto d_c_n = layer.checked("d_c_n", d_c_n_, state);
    const Tensor d_pre_x = recycled(layer.row_sizes(layer.gate_units()), layer.dtype, y);
    const bool same = layer.cell->pre == layer.cell->gates && !layer.has(kPartGainH);
    const Tensor d_a = same ? d_pre_x : recycled({layer.rows, layer.gate_units()}, layer.dtype, y);
    const Tensor d_h0 = empty(state, layer.dtype, y);
    const bool has_c = layer.c0.has_value();
    const Tensor d_c0 = has_c ? empty(state, layer.dtype, y) : placeholder(layer.dtype, y);
    const Tensor d_vectors = empty({recurrence_vectors(*layer.cell, layer.hidden)}, layer.dtype, y);
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      cpu::recurrence_gradients(
          RecurrenceGradients<T>{layer.shape(), layer.view<T>(), values_of<T>(layer.h0),
                                 values_of<T>(layer.c0), values_of<T>(y), values_of<T>(saved),
                                 values_of<T>(d_y), values_of<T>(d_h_n), values_of<T>(d_c_n),
                                 values_to<T>(d_pre_x), values_to<T>(d_a), values_to<T>(d_h0),
                                 values_to<T>(d_c0, has_c), values_to<T>(d_vectors)},
          threads(), parallel_for);
    };
    layer.dtype == ScalarType::Double ? run(0.0) : run(0.0f);
    return FiveTensors(d_pre_x, same ? placeholder(layer.dtype, y) : d_a, d_h0, d_c0, d_vectors);
  });
}

// A matrix of this dtype, in contiguous memory.
Tensor matrix(const char* name, const Tensor& t, ScalarType dtype, int32_t code) {
  FASTRNN_CHECK(t.is_cpu(), name, " must be on the CPU, got another device.");
  FASTRNN_CHECK(dtype_code(t) == code, name, " must have the dtype of the first matrix, got ",
                dtype_name(t), ".");
  FASTRNN_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim(), ".");
  FASTRNN_CHECK(t.size(0) <= kMostRecurrenceValues / 64 / (t.size(1) + 1), name,
                " must have at most 2^46 values, got ", text(sizes_of(t)), ".");
  check_memory(name, t, value_bytes(dtype));
  return as_contiguous(t);
}

// A product of matrices without values may have any number of values.
void check_product(int64_t rows, int64_t columns) {
  FASTRNN_CHECK(rows <= kMostRecurrenceValues / 64 / (columns + 1),
                "a product must have at most 2^46 values, got ", rows, " rows and ", columns,
                " columns.");
}

// The kernels write no product of matrices that share a dimension of size 0.
void fill_empty_product(const Tensor& product, int64_t shared, ScalarType dtype) {
  if (shared == 0 && product.numel() > 0)
    std::memset(product.data_ptr(), 0, size_t(product.numel() * value_bytes(dtype)));
}

// The products after backward (problem/layer.h) of d [N, K] with x [N, M] and w [K, M].
template <class T>
void run_products(const Tensor& d, const Tensor* x, const Tensor* w, int64_t columns,
                  const Tensor* d_x, const Tensor* d_w, const Tensor* sums) {
  const int64_t rows = d.size(0), offset = 0;
  const Sequence sequence = {rows > 0 ? 1 : 0, rows, false, &offset, &rows};
  const auto input = [](const Tensor* t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
  };
  const auto output = [](const Tensor* t) { return t ? static_cast<T*>(t->data_ptr()) : nullptr; };
  LayerGradients<T> problem{};
  problem.shape = {CellKind::kRnnTanh, sequence, columns, d.size(1), 0};
  problem.w_ih = input(w);
  problem.w_ih_stride = problem.x_stride = columns;
  problem.x = input(x);
  problem.rows = {0, rows};
  problem.d_pre = input(&d);
  problem.d_x = output(d_x);
  problem.d_w_ih = output(d_w);
  problem.d_b_ih = output(sums);
  cpu::gradients(&problem, 1, threads(), parallel_for);
}

void run_products(ScalarType dtype, const Tensor& d, const Tensor* x, const Tensor* w,
                  int64_t columns, const Tensor* d_x, const Tensor* d_w, const Tensor* sums) {
  (dtype == ScalarType::Double ? run_products<double> : run_products<float>)(d, x, w, columns, d_x,
                                                                             d_w, sums);
}

Tensor recurrence_product(Tensor x_, Tensor w_) {
  return guarded([&] {
    const ScalarType dtype = wide_dtype("x", x_);
    const int32_t code = dtype_code(x_);
    const Tensor x = matrix("x", x_, dtype, code), w = matrix("w", w_, dtype, code);
    FASTRNN_CHECK(x.size(1) == w.size(1), "w must have the ", x.size(1), " columns of x, got ",
                  w.size(1), ".");
    check_product(x.size(0), w.size(0));
    const Tensor transposed = torch::stable::contiguous(torch::stable::transpose(w, 0, 1));
    const Tensor result = recycled({x.size(0), w.size(0)}, dtype, x);
    run_products(dtype, x, nullptr, &transposed, w.size(0), &result, nullptr, nullptr);
    fill_empty_product(result, x.size(1), dtype);
    return result;
  });
}

ThreeTensors recurrence_product_gradients(Tensor d_, std::optional<Tensor> x_,
                                          std::optional<Tensor> w_) {
  return guarded([&] {
    const ScalarType dtype = wide_dtype("d", d_);
    const int32_t code = dtype_code(d_);
    const Tensor d = matrix("d", d_, dtype, code);
    FASTRNN_CHECK(x_ || w_, "x or w must be given, got neither.");
    const Tensor x = x_ ? matrix("x", *x_, dtype, code) : d;
    const Tensor w = w_ ? matrix("w", *w_, dtype, code) : d;
    const int64_t columns = (x_ ? x : w).size(1);
    FASTRNN_CHECK(!x_ || x.size(0) == d.size(0), "x must have the ", d.size(0), " rows of d, got ",
                  x.size(0), ".");
    FASTRNN_CHECK(!w_ || (w.size(0) == d.size(1) && w.size(1) == columns),
                  "w must have a row for each of the ", d.size(1),
                  " columns of d and the columns of x, got ", text(sizes_of(w)), ".");
    if (w_) check_product(d.size(0), columns);
    if (x_) check_product(d.size(1), columns);
    const Tensor none = placeholder(dtype, d);
    const Tensor d_x = w_ ? ordinary({d.size(0), columns}, dtype, d) : none;
    const Tensor d_w = x_ ? ordinary({d.size(1), columns}, dtype, d) : none;
    const Tensor sums = x_ ? empty({d.size(1)}, dtype, d) : none;
    run_products(dtype, d, x_ ? &x : nullptr, w_ ? &w : nullptr, columns, w_ ? &d_x : nullptr,
                 x_ ? &d_w : nullptr, x_ ? &sums : nullptr);
    if (w_) fill_empty_product(d_x, d.size(1), dtype);
    return ThreeTensors(d_x, d_w, sums);
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&fastrnn::recurrence));
  m.impl("recurrence_gradients", TORCH_BOX(&fastrnn::recurrence_gradients));
  m.impl("recurrence_product", TORCH_BOX(&fastrnn::recurrence_product));
  m.impl("recurrence_product_gradients", TORCH_BOX(&fastrnn::recurrence_product_gradients));
}
