// Divides the workspace of a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn::cuda {

// Places arrays one after the other: `add` returns the offset of the next one.
class WorkspaceBuilder {
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
