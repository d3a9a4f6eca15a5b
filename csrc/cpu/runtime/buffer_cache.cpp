#include "cpu/runtime/buffer_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/runtime/settings.h"

namespace fastrnn::cpu {
namespace {

// Limits of the bytes in the cache, see max_bytes.
constexpr std::size_t kMaxCached = std::size_t(256) << 20;
constexpr std::size_t kMinCached = std::size_t(16) << 20;
// A cached buffer is freed after this many acquisitions that did not use it. A training step
// acquires four buffers per layer, so the first of 16 layers still finds its buffers in the next
// step.
constexpr std::uint64_t kPatience = 64;
constexpr std::size_t kHugePage = std::size_t(2) << 20;

// Rounds a size up to eighths of a power of two, so that a buffer also fits the next call if its
// batch is a little smaller or larger.
std::size_t rounded(std::size_t bytes) {
  std::size_t step = 64;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* fresh(std::size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  void* buffer = ::operator new(bytes, std::align_val_t(huge ? kHugePage : 64), std::nothrow);
  if (buffer == nullptr)
    throw OutOfMemory("fastrnn: there is no memory for a buffer of " + std::to_string(bytes) +
                      " bytes.");
  use_huge_pages(buffer, bytes);
  return buffer;
}

void discard(void* buffer, std::size_t bytes) {
  ::operator delete(buffer, std::align_val_t(bytes >= 2 * kHugePage ? kHugePage : 64));
}

// FASTRNN_POISON=1 fills every buffer with NaN before use, so that reading values that were not
// written shows.
bool poisoned() {
  static const bool is_on = poison_setting();
  return is_on;
}

struct CachedBuffer {
  void* buffer;
  std::size_t bytes;
  std::uint64_t released;  // number of acquisitions until its release
};

std::atomic<std::size_t> used_bytes{0};  // of all acquired buffers
std::atomic<std::size_t> fresh_count{0};

struct BufferCache {
  std::mutex mutex;
  std::vector<CachedBuffer> cached;  // oldest first
  std::size_t bytes = 0;             // of all cached buffers
  std::uint64_t acquisitions = 0;
  // Largest used_bytes during the current kPatience acquisitions, and during the kPatience before
  // them.
  std::size_t peak = 0;
  std::size_t last_peak = 0;

  // Forward, backward and gradients each use a workspace, the last two together with d_pre. None of
  // these uses exceeds the peak, so three times the peak holds all buffers of a training step.
  std::size_t max_bytes() const {
    return std::clamp(3 * std::max(peak, last_peak), kMinCached, kMaxCached);
  }

  void count_acquisition() {
    const std::size_t used = used_bytes.load(std::memory_order_relaxed);
    if (acquisitions++ % kPatience == 0) {
      last_peak = peak;
      peak = 0;
    }
    peak = std::max(peak, used);
  }

  // Returns null if no cached buffer has this size.
  void* acquire(std::size_t size) {
    // The newest buffer is the one most likely to be in the cache of the CPU.
    for (auto found = cached.rbegin(); found != cached.rend(); ++found) {
      if (found->bytes != size) continue;
      void* buffer = found->buffer;
      bytes -= size;
      cached.erase(std::next(found).base());
      return buffer;
    }
    return nullptr;
  }

  void discard_oldest() {
    bytes -= cached.front().bytes;
    discard(cached.front().buffer, cached.front().bytes);
    cached.erase(cached.begin());
  }

  void discard_unused() {
    while (!cached.empty() && acquisitions - cached.front().released > kPatience) discard_oldest();
  }
};

BufferCache& buffer_cache() {
  static BufferCache* the_cache = new BufferCache;  // outlives tensors that release at exit
  return *the_cache;
}

}  // namespace

void* acquire_buffer(std::size_t wanted) {
  const std::size_t bytes = rounded(wanted);
  used_bytes.fetch_add(bytes, std::memory_order_relaxed);
  void* found = nullptr;
  {
    BufferCache& cache = buffer_cache();
    const std::unique_lock lock(cache.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      cache.count_acquisition();
      found = cache.acquire(bytes);
      cache.discard_unused();
    }
  }
  if (found == nullptr) {
    try {
      found = fresh(bytes);
    } catch (...) {
      used_bytes.fetch_sub(bytes, std::memory_order_relaxed);
      throw;
    }
    fresh_count.fetch_add(1, std::memory_order_relaxed);
  }
  if (poisoned()) {
    const float nan = std::numeric_limits<float>::quiet_NaN();  // two of them make a double NaN
    for (std::size_t at = 0; at + 4 <= bytes; at += 4)
      std::memcpy(static_cast<char*>(found) + at, &nan, 4);
  }
  return found;
}

void release_buffer(void* buffer, std::size_t wanted) noexcept {
  const std::size_t bytes = rounded(wanted);
  used_bytes.fetch_sub(bytes, std::memory_order_relaxed);
  BufferCache& cache = buffer_cache();
  const std::unique_lock lock(cache.mutex, std::try_to_lock);
  if (!lock.owns_lock() || bytes > cache.max_bytes()) return discard(buffer, bytes);
  while (cache.bytes + bytes > cache.max_bytes()) cache.discard_oldest();
  try {
    cache.cached.push_back({buffer, bytes, cache.acquisitions});
    cache.bytes += bytes;
  } catch (const std::bad_alloc&) {
    discard(buffer, bytes);
  }
}

void use_huge_pages(void* buffer, std::size_t bytes) noexcept {
#if defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePage) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(buffer);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

std::size_t cached_bytes() {
  BufferCache& cache = buffer_cache();
  const std::lock_guard lock(cache.mutex);
  return cache.bytes;
}

std::size_t fresh_buffers() { return fresh_count.load(std::memory_order_relaxed); }

void release_cached_buffers() {
  BufferCache& cache = buffer_cache();
  const std::lock_guard lock(cache.mutex);
  while (!cache.cached.empty()) cache.discard_oldest();
}

}  // namespace fastrnn::cpu
