#include "cpu/runtime/cache.h"

#include <unistd.h>

#include <atomic>
#include <string>

#include "cpu/runtime/settings.h"

namespace fastrnn::cpu {
namespace {

// Intel's CPUs with an L2 of at least this size have a distributed L3 that is slow for one core.
[[maybe_unused]] constexpr std::int64_t kMinPrivateBytes = 1024 * 1024;

std::int64_t first_choice() {
  const std::int64_t kilobytes = l2_kb_setting();
  if (kilobytes >= 0) return kilobytes * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (cpu_vendor() == std::string("intel")) {
    const std::int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes >= kMinPrivateBytes) return bytes;
  }
#endif
  return 0;
}

std::atomic<std::int64_t>& boundary() {
  static std::atomic<std::int64_t> bytes{first_choice()};
  return bytes;
}

}  // namespace

std::int64_t slow_cache_boundary() { return boundary().load(std::memory_order_relaxed); }
void set_slow_cache_boundary(std::int64_t bytes) {
  boundary().store(bytes < 0 ? first_choice() : bytes);
}

}  // namespace fastrnn::cpu
