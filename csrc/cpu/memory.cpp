#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "settings.h"

namespace fastrnn::cpu {
namespace {

constexpr std::size_t kMostKept = std::size_t(256) << 20;  // bytes; the oldest go first
constexpr std::size_t kHugePage = std::size_t(2) << 20;

// Sizes are rounded up to eighths of a power of two, so that a buffer fits the next call too if its
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
    throw std::runtime_error("fastrnn: there is no memory for a buffer of " +
                             std::to_string(bytes) + " bytes.");
  use_huge_pages(buffer, bytes);
  return buffer;
}

void discard(void* buffer, std::size_t bytes) {
  ::operator delete(buffer, std::align_val_t(bytes >= 2 * kHugePage ? kHugePage : 64));
}

// FASTRNN_POISON=1 fills every buffer with NaN before use: what is read unwritten shows.
bool poisoned() {
  static const bool is_on = poison_setting();
  return is_on;
}

struct Kept {
  void* buffer;
  std::size_t bytes;
};

struct Shelf {
  std::mutex mutex;
  std::vector<Kept> kept;  // oldest first
  std::size_t bytes = 0;
};

Shelf& shelf() {
  static Shelf* the_shelf = new Shelf;  // outlives every tensor that gives its buffer back at exit
  return *the_shelf;
}

}  // namespace

void* take_buffer(std::size_t wanted) {
  const std::size_t bytes = rounded(wanted);
  void* found = nullptr;
  {
    Shelf& s = shelf();
    const std::unique_lock lock(s.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      for (auto kept = s.kept.rbegin(); kept != s.kept.rend(); ++kept) {  // the newest is warmest
        if (kept->bytes != bytes) continue;
        found = kept->buffer;
        s.bytes -= bytes;
        s.kept.erase(std::next(kept).base());
        break;
      }
    }
  }
  if (found == nullptr) found = fresh(bytes);
  if (poisoned()) {
    const float nan = std::numeric_limits<float>::quiet_NaN();  // two of them: a double NaN as well
    for (std::size_t at = 0; at + 4 <= bytes; at += 4)
      std::memcpy(static_cast<char*>(found) + at, &nan, 4);
  }
  return found;
}

void give_buffer(void* buffer, std::size_t wanted) noexcept {
  const std::size_t bytes = rounded(wanted);
  Shelf& s = shelf();
  const std::unique_lock lock(s.mutex, std::try_to_lock);
  if (!lock.owns_lock() || bytes > kMostKept) return discard(buffer, bytes);
  while (s.bytes + bytes > kMostKept) {
    s.bytes -= s.kept.front().bytes;
    discard(s.kept.front().buffer, s.kept.front().bytes);
    s.kept.erase(s.kept.begin());
  }
  try {
    s.kept.push_back({buffer, bytes});
    s.bytes += bytes;
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

std::size_t kept_bytes() {
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  return s.bytes;
}

void release_kept_buffers() {
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  for (const Kept& kept : s.kept) discard(kept.buffer, kept.bytes);
  s.kept.clear();
  s.bytes = 0;
}

}  // namespace fastrnn::cpu
