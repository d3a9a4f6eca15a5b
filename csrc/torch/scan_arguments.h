// The arguments of the operators of linear recurrences, checked, contiguous and kept alive, for the
// CPU and CUDA alike.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "problem/scan.h"
#include "torch/arguments.h"

namespace fastrnn {

struct ScanArguments {
  ScalarType dtype;
  std::vector<int64_t> sizes;        // of a: [T, ...]
  std::vector<int64_t> state_sizes;  // of h0
  ScanShape shape;

  ScanArguments(const Tensor& a, bool reverse)
      : dtype(checked_dtype("a", a)), sizes(sizes_of(a)), code_(dtype_code(a)), place_(a) {
    FASTRNN_CHECK(!sizes.empty(), "a must have one dimension or more, got none.");
    state_sizes.assign(sizes.begin() + 1, sizes.end());
    int64_t columns = 1;
    for (const int64_t size : state_sizes) columns *= size;
    shape = {sizes[0], columns, reverse};
  }

  // A tensor of [T, ...].
  Tensor steps(const char* name, const Tensor& t) const { return checked(name, t, sizes); }
  // A state; none if it is not given.
  std::optional<Tensor> state(const char* name, const std::optional<Tensor>& t) const {
    return t ? std::optional(checked(name, *t, state_sizes)) : std::nullopt;
  }

 private:
  Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& expected) const {
    FASTRNN_CHECK(DeviceId(t) == place_, name, " must be on the device of a, got another device.");
    FASTRNN_CHECK(dtype_code(t) == code_, name, " must have the dtype of a, got ", dtype_name(t),
                  ".");
    FASTRNN_CHECK(sizes_of(t) == expected, name, " must have the shape ", text(expected), ", got ",
                  text(sizes_of(t)), ".");
    check_memory(name, t, value_bytes(dtype));
    return as_contiguous(t);
  }

  int32_t code_;
  DeviceId place_;
};

// The arguments of the operators scan_layer and scan_layer_gradients, checked.
struct ScanLayerArguments {
  using OptionalTensor = std::optional<Tensor>;

  ScalarType dtype;
  const ScanCellInfo* cell;
  bool positive;
  ScanShape shape;
  int64_t units, gates;            // gates: blocks of H columns of pre
  std::vector<int64_t> pre_sizes;  // [T, B, G*H]
  std::vector<int64_t> sizes;      // [T, B, H]
  std::vector<int64_t> state_sizes;
  Tensor pre;
  OptionalTensor bias, x, h0, lengths, resets, reset_h;

  ScanLayerArguments(const Tensor& pre_, const OptionalTensor& bias_, const OptionalTensor& x_,
                     const OptionalTensor& h0_, const OptionalTensor& lengths_,
                     const OptionalTensor& resets_, const OptionalTensor& reset_h_,
                     const std::string& cell_name, bool positive_, bool reverse)
      : dtype(checked_dtype("pre", pre_)),
        cell(find(cell_name)),
        positive(positive_),
        pre_sizes(sizes_of(pre_)),
        pre(pre_),
        code_(dtype_code(pre_)),
        place_(pre_) {
    FASTRNN_CHECK(pre_sizes.size() == 3, "pre must have 3 dimensions, got ",
                  int64_t(pre_sizes.size()), ".");
    gates = cell->has_output && x_ ? cell->inputs - 1 : cell->inputs;
    FASTRNN_CHECK(!x_ || cell->has_output, "x must not be given for ", cell->name,
                  ", got a tensor.");
    units = pre_sizes[2] / gates;
    FASTRNN_CHECK(pre_sizes[2] == gates * units, "pre must have a multiple of ", gates,
                  " columns, got ", pre_sizes[2], ".");
    sizes = {pre_sizes[0], pre_sizes[1], units};
    state_sizes = {pre_sizes[1], units};
    shape = {sizes[0], sizes[1] * units, reverse, std::max<int64_t>(sizes[1], 1)};
    pre = checked("pre", pre_, pre_sizes);
    if (bias_) bias = checked("bias", *bias_, {pre_sizes[2]});
    if (x_) x = checked("x", *x_, sizes);
    if (h0_) h0 = checked("h0", *h0_, state_sizes);
    if (lengths_)
      lengths =
          checked("lengths", *lengths_, {sizes[1]}, aoti_torch_dtype_int64(), "dtype int64", 8);
    if (resets_)
      resets = checked("resets", *resets_, {sizes[0], sizes[1]}, aoti_torch_dtype_bool(),
                       "dtype bool", 1);
    FASTRNN_CHECK(!reset_h_ || resets_, "reset_h must be given with resets, got it alone.");
    if (reset_h_) {
      const std::vector<int64_t> own = sizes_of(*reset_h_);
      const bool per_step = own.size() == 3 && own[0] != 1;
      reset_h = checked("reset_h", *reset_h_, {per_step ? sizes[0] : 1, sizes[1], units});
      reset_stride_ = per_step ? shape.columns : 0;
    }
  }

  // A tensor in the layer's dtype.
  Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& expected) const {
    return checked(name, t, expected, code_, "the dtype of pre", value_bytes(dtype));
  }

  template <class S>
  ScanMarks<S> marks() const;
  // The inputs of a cell: blocks of columns of pre, then x.
  template <class S>
  void fill(ScanInput<S> (&in)[kMostScanInputs]) const;

 private:
  static const ScanCellInfo* find(const std::string& name) {
    std::string known;
    for (const ScanCellInfo& info : kScanCells) {
      if (info.kind == ScanCell::kLinear) continue;  // an operator of its own
      if (name == info.name) return &info;
      known += (known.empty() ? "" : ", ") + std::string(info.name);
    }
    throw_error("cell must be one of ", known, ", got '", name, "'.");
  }
  Tensor checked(const char* name, const Tensor& t, const std::vector<int64_t>& expected,
                 int32_t code, const char* type, int64_t bytes) const {
    FASTRNN_CHECK(DeviceId(t) == place_, name,
                  " must be on the device of pre, got another device.");
    FASTRNN_CHECK(dtype_code(t) == code, name, " must have ", type, ", got ", dtype_name(t), ".");
    FASTRNN_CHECK(sizes_of(t) == expected, name, " must have the shape ", text(expected), ", got ",
                  text(sizes_of(t)), ".");
    check_memory(name, t, bytes);
    return as_contiguous(t);
  }

  int32_t code_;
  DeviceId place_;
  int64_t reset_stride_ = 0;
};

template <class S>
const S* values_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const S*>(t->const_data_ptr()) : nullptr;
}
template <class S>
const S* values_of(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
S* results_of(const Tensor& t) {
  return static_cast<S*>(t.data_ptr());
}

template <class S>
ScanMarks<S> ScanLayerArguments::marks() const {
  return {values_of<std::int64_t>(lengths), values_of<std::uint8_t>(resets), values_of<S>(reset_h),
          reset_stride_};
}
template <class S>
void ScanLayerArguments::fill(ScanInput<S> (&in)[kMostScanInputs]) const {
  const S *data = values_of<S>(pre), *b = values_of<S>(bias);
  for (int64_t i = 0; i < gates; ++i)
    in[i] = {data + i * units, gates * units, b == nullptr ? nullptr : b + i * units};
  if (x) in[gates] = {values_of<S>(x), units, nullptr};
}

// Runs function(tag) with the type that a dtype has in memory.
template <class S>
struct StorageTag {
  using Type = S;
};
template <class Half, class Brain, class Function>
void with_storage(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Half:
      return function(StorageTag<Half>());
    case ScalarType::BFloat16:
      return function(StorageTag<Brain>());
    case ScalarType::Float:
      return function(StorageTag<float>());
    default:  // checked_dtype raises for all but these four
      return function(StorageTag<double>());
  }
}

}  // namespace fastrnn
