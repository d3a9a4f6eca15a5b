// Makes torch's thread pool the pool of the kernels.
#include "torch/thread_pool.h"

#include "cpu/runtime/thread_pool.h"

namespace fastrnn {
namespace {

[[maybe_unused]] const bool is_set = [] {
  cpu::set_thread_pool({parallel_for, threads});
  return true;
}();

}  // namespace
}  // namespace fastrnn
