// The thread pool of the process, for calls that come from Python without torch's operators.
#pragma once

#include "cpu/api.h"

namespace fastrnn::cpu {

struct ThreadPool {
  ParallelFor parallel_for;
  int (*threads)();  // number of threads that a call on this thread may use
};

// libfastrnn_torch.so sets torch's pool when it is loaded.
FASTRNN_EXPORT void set_thread_pool(const ThreadPool& pool);
// The pool that was set, else one without threads.
FASTRNN_EXPORT ThreadPool thread_pool();

}  // namespace fastrnn::cpu
