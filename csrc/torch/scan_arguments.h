// The arguments of the operators of linear recurrences, checked, contiguous and kept alive, for the
// CPU and CUDA alike.
#pragma once

#include <optional>
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

template <class S>
const S* values_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const S*>(t->const_data_ptr()) : nullptr;
}
template <class S>
const S* values_of(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
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
