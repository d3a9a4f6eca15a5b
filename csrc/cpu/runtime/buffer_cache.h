// A cache of large buffers. Fresh memory costs a page fault per 4 KB, which took a quarter of the
// time of training an LSTM with B=64, H=512; so buffers that a call or a graph releases are kept
// for later calls. Any number of graphs and threads may hold buffers at the same time. No thread
// ever waits here: while another thread uses the cache, buffers are allocated from and returned to
// the system directly. So a forked child cannot inherit a locked cache either.
//
// The cache frees a buffer that the last 64 acquisitions have not used, and holds at most three
// times the memory that recent calls used at once, within 16 and 256 MiB. So a training loop keeps
// all its buffers, and a program with many shapes does not keep old ones.
#pragma once

#include <cstddef>
#include <stdexcept>

#include "cpu/api.h"

namespace fastrnn::cpu {

// There is no memory for a buffer.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Returns at least `bytes` bytes, aligned for any vector. Throws OutOfMemory.
FASTRNN_EXPORT void* acquire_buffer(std::size_t bytes);
// bytes: as in acquire_buffer.
FASTRNN_EXPORT void release_buffer(void* buffer, std::size_t bytes) noexcept;

// Asks for huge pages (one page fault instead of 512) for large memory of another allocator that is
// about to be written.
FASTRNN_EXPORT void use_huge_pages(void* buffer, std::size_t bytes) noexcept;

// Bytes in the cache.
FASTRNN_EXPORT std::size_t cached_bytes();
// Frees all buffers in the cache.
FASTRNN_EXPORT void release_cached_buffers();
// Number of buffers allocated from the system since the process started.
FASTRNN_EXPORT std::size_t fresh_buffers();

// A buffer that lives as long as a call.
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
