// Shims around torch's stable ABI: what the headers of torch 2.11 to 2.14 lack, do slowly or get
// wrong. Each states why it is here; delete it when the oldest supported torch no longer needs it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <vector>

#include "torch/errors.h"

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t value_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
         : dtype == ScalarType::Float                             ? 4
                                                                  : 2;
}
inline bool is_half(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}
// The dtype that the kernels accumulate in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return is_half(dtype) ? ScalarType::Float : dtype;
}

// Returns the value of a `str` argument and frees the argument. (The conversion to std::string in
// the headers of torch 2.11 to 2.14 leaks a string per call.)
inline std::string consume_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  check_torch(torch_string_length(handle, &length));
  check_torch(torch_string_c_str(handle, &data));
  std::string result(data, length);
  check_torch(torch_delete_string(handle));
  return result;
}

// The device of a tensor.
struct DeviceId {
  int32_t type = 0, index = 0;
  explicit DeviceId(const Tensor& t) {
    check_torch(aoti_torch_get_device_type(t.get(), &type));
    check_torch(aoti_torch_get_device_index(t.get(), &index));
  }
  bool operator==(const DeviceId& other) const {
    return type == other.type && index == other.index;
  }
};

// An uninitialised tensor on the device of `like`. This function, unlike empty_strided, obeys
// torch's fill_uninitialized_memory, with which the tests find values that no kernel wrote.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  DeviceId place(like);
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_aten_new_empty(like.get(), sizes.data(), int64_t(sizes.size()), &type,
                                        nullptr, &place.type, place.index, nullptr, &handle));
  return Tensor(handle);
}

// The result of an operator that is not asked for. (A single call of torch, which takes half as
// long as `empty`: a small layer has two of these.)
inline Tensor placeholder(ScalarType dtype, const Tensor& like) {
  const DeviceId device(like);
  const int64_t size = 0, stride = 1;
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(
      1, &size, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device.type, device.index, &handle));
  return Tensor(handle);
}

// torch's number of a dtype. (scalar_type() calls torch up to 22 times to translate it, and fails
// for a dtype that it does not know.)
inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  check_torch(aoti_torch_get_dtype(t.get(), &code));
  return code;
}
inline std::string dtype_name(const Tensor& t) {
  try {
    return torch::headeronly::toString(t.scalar_type());
  } catch (const std::exception&) {
    return "another dtype";
  }
}
// The dtype of the tensor that all others must match.
inline ScalarType checked_dtype(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (code == aoti_torch_dtype_float64()) return ScalarType::Double;
  if (code == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
  if (code == aoti_torch_dtype_float16()) return ScalarType::Half;
  throw_error(name, " must be float16, bfloat16, float32 or float64, got ", dtype_name(t), ".");
}
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace fastrnn
