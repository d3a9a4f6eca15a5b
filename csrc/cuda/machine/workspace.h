// How a call's workspace is divided.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn::cuda {

// Parts of a workspace, one after the other.
class Parts {
 public:
  template <class T>
  std::size_t add(std::int64_t values) {
    const std::size_t at = bytes_;
    bytes_ += (std::size_t(values) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr std::size_t kAlign = 256;
  std::size_t bytes_ = 0;
};

}  // namespace fastrnn::cuda
