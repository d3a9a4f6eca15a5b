// The caches of this machine, as far as plans depend on them.
#pragma once

#include <cstdint>

#include "cpu/api.h"

namespace fastrnn::cpu {

// Bytes of a core's private cache (L2) if the cache behind it is so slow that a product waits for
// its weights, or 0. Intel's server CPUs: L3 delivers about 25 GB/s to a core, where a product of
// few rows needs twice that. On AMD's Zen L3 keeps up, so there it is 0. FASTRNN_L2_KB, read at
// first use, overrides this.
std::int64_t slow_cache_boundary();

// Changes it, for tests; a negative number restores the choice at first use.
FASTRNN_EXPORT void set_slow_cache_boundary(std::int64_t bytes);

}  // namespace fastrnn::cpu
