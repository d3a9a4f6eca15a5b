// Large buffers that are used again. Fresh memory costs a page fault every 4 KB, which took a
// quarter of the time of training an LSTM at B=64, H=512; what a call or a graph gives back is kept
// for the next one. Any number of graphs and threads may hold buffers at once. Nobody ever waits
// here: where another thread is inside, a buffer comes straight from the system and goes straight
// back, so a forked child cannot inherit a lock that nobody opens.
//
// A buffer that the last 64 acquisitions passed over is freed, and the kept buffers are limited to
// three times the memory that recent calls used at once, within 16 and 256 MiB. So a training loop
// keeps all its buffers, and a program of many shapes does not keep old ones.
#pragma once

#include <cstddef>

#include "cpu/api.h"

namespace fastrnn::cpu {

// At least `bytes` bytes, aligned for any vector. Throws std::bad_alloc.
FASTRNN_EXPORT void* acquire_buffer(std::size_t bytes);
// `bytes` as it was asked for.
FASTRNN_EXPORT void release_buffer(void* buffer, std::size_t bytes) noexcept;

// One page fault where there were 512, for large memory of another allocator that is about to be
// written.
FASTRNN_EXPORT void use_huge_pages(void* buffer, std::size_t bytes) noexcept;

// Bytes of the buffers that are ready for the next call.
FASTRNN_EXPORT std::size_t cached_bytes();
// Frees them all.
FASTRNN_EXPORT void release_cached_buffers();
// Number of buffers that were allocated since the process started.
FASTRNN_EXPORT std::size_t fresh_buffers();

// A buffer for the length of a call.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), data_(acquire_buffer(bytes)) {}
  ~Workspace() { release_buffer(data_, bytes_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  std::size_t bytes_;
  void* data_;
};

}  // namespace fastrnn::cpu
