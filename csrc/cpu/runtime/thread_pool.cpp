#include "cpu/runtime/thread_pool.h"

namespace fastrnn::cpu {
namespace {

void run_here(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  body(0, n, context);
}

// Set before the first call and never changed afterwards.
ThreadPool current{run_here, [] { return 1; }};

}  // namespace

void set_thread_pool(const ThreadPool& pool) { current = pool; }
ThreadPool thread_pool() { return current; }

}  // namespace fastrnn::cpu
