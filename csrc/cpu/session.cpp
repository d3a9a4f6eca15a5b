#include "cpu/session.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>

#include "cpu/runtime/thread_pool.h"

namespace fastrnn::cpu {
namespace {

template <class T>
bool overlap(const T* a, std::int64_t a_size, const T* b, std::int64_t b_size) {
  const std::less<const T*> before;
  return before(a, b + b_size) && before(b, a + a_size);
}

template <class T>
void copy_or_clear(const T* from, std::int64_t size, T* to) {
  if (from != nullptr)
    std::copy_n(from, size, to);
  else
    std::fill_n(to, size, T(0));
}

}  // namespace

template <class T>
class Session<T>::Use {
 public:
  explicit Use(Session& session) : session_(session) {
    if (session.in_use_.exchange(true, std::memory_order_acquire))
      throw std::runtime_error(
          "Session: only one call at a time is possible, but a call of another thread is running "
          "(or was running when this process was forked).");
  }
  ~Use() { session_.in_use_.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  Session& session_;
};

template <class T>
Session<T>::Session(const StackShape& shape, std::int64_t batch, int threads)
    : stack_(shape, threads > 0 ? threads : thread_pool().threads()),
      batch_(batch),
      h_size_(shape.h_size(batch)),
      c_size_(shape.c_size(batch)),
      states_size_(h_size_ + c_size_),
      most_threads_(threads),
      states_(std::size_t(2 * states_size_) * sizeof(T)) {
  std::fill_n(h(0), 2 * states_size_, T(0));
}

template <class T>
void Session<T>::pack(const LayerWeights<T>* weights) {
  const Use use(*this);
  stack_.pack(weights);
}

template <class T>
void Session<T>::run(const T* x, std::int64_t steps, T* y) {
  const Use use(*this);
  const std::int64_t x_size = steps * batch_ * shape().input_size;
  std::optional<Workspace> copy;
  if (overlap(x, x_size, y, steps * batch_ * shape().output_size())) {
    copy.emplace(std::size_t(x_size) * sizeof(T));
    T* const copied = static_cast<T*>(copy->data());
    std::copy_n(x, x_size, copied);
    x = copied;
  }
  const ThreadPool pool = thread_pool();
  const int threads = most_threads_ == 1 ? 1 : pool.threads();
  stack_.forward({steps, batch_, x, h(current_), c(current_), y, h(1 - current_), c(1 - current_)},
                 most_threads_ > 0 ? std::min(threads, most_threads_) : threads, pool.parallel_for);
  current_ = 1 - current_;
}

template <class T>
void Session<T>::read_states(T* to_h, T* to_c) {
  const Use use(*this);
  std::copy_n(h(current_), h_size_, to_h);
  if (c_size_ > 0) std::copy_n(c(current_), c_size_, to_c);
}

template <class T>
void Session<T>::write_states(const T* from_h, const T* from_c) {
  const Use use(*this);
  copy_or_clear(from_h, h_size_, h(current_));
  if (c_size_ > 0) copy_or_clear(from_c, c_size_, c(current_));
}

template class Session<float>;
template class Session<double>;

}  // namespace fastrnn::cpu
