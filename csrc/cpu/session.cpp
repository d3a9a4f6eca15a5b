#include "cpu/session.h"

#include <algorithm>

#include "cpu/runtime/thread_pool.h"
#include "cpu/serial_stack.h"

namespace fastrnn::cpu {
namespace {

template <class T>
void copy_or_clear(const T* from, std::int64_t size, T* to) {
  if (from != nullptr)
    std::copy_n(from, size, to);
  else
    std::fill_n(to, size, T(0));
}

// Replaces rows of states [layers, batch, units] by from [layers, units], or by zeros if null.
template <class T>
void replace_rows(T* states, std::int64_t layers, std::int64_t batch, std::int64_t units,
                  std::int64_t first, std::int64_t end, const T* from) {
  for (std::int64_t layer = 0; layer < layers; ++layer)
    for (std::int64_t row = first; row < end; ++row)
      copy_or_clear(from == nullptr ? nullptr : from + layer * units, units,
                    states + (layer * batch + row) * units);
}

}  // namespace

SessionBusy::SessionBusy()
    : std::runtime_error(
          "Session: only one call at a time is possible, but a call of another thread is running "
          "(or was running when this process was forked).") {}

template <class T>
class Session<T>::Use {
 public:
  explicit Use(Session& session) : session_(session) {
    if (session.in_use_.exchange(true, std::memory_order_acquire)) throw SessionBusy();
  }
  ~Use() { session_.in_use_.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  Session& session_;
};

template <class T>
Session<T>::Session(const StackShape& shape, std::int64_t batch, int threads)
    : stack_(shape, threads),
      batch_(batch),
      h_size_(shape.h_size(batch)),
      c_size_(shape.c_size(batch)),
      states_size_(h_size_ + c_size_),
      most_threads_(threads),
      serial_(threads == 1 ? std::make_unique<SerialStack<T>>(stack_, batch) : nullptr),
      states_(std::size_t(2 * states_size_) * sizeof(T)) {
  std::fill_n(h(), 2 * states_size_, T(0));
}

template <class T>
Session<T>::~Session() = default;

template <class T>
void Session<T>::pack(const LayerWeights<T>* weights) {
  const Use use(*this);
  stack_.pack(weights);
}

template <class T>
void Session<T>::step(const T* x, T* y) {
  const Use use(*this);
  if (serial_ != nullptr) return serial_->run(x, 1, y, h(), c(), false);
  // The call must not read what it has written, and x may overlap y.
  const std::int64_t x_size = batch_ * shape().input_size;
  const Workspace copy(std::size_t(x_size) * sizeof(T));
  T* const copied = static_cast<T*>(copy.data());
  std::copy_n(x, x_size, copied);
  run_on_pool(copied, 1, y);
}

template <class T>
void Session<T>::run(const T* x, std::int64_t steps, T* y, bool asks) {
  const Use use(*this);
  if (serial_ == nullptr) return run_on_pool(x, steps, y);
  std::copy_n(h(), states_size_, saved_h());
  try {
    serial_->run(x, steps, y, h(), c(), asks);
  } catch (...) {
    std::copy_n(saved_h(), states_size_, h());
    throw;
  }
}

template <class T>
void Session<T>::run_on_pool(const T* x, std::int64_t steps, T* y) {
  const ThreadPool pool = thread_pool();
  std::copy_n(h(), states_size_, saved_h());
  try {
    stack_.forward({steps, batch_, x, saved_h(), saved_c(), y, h(), c()},
                   std::min(pool.threads(), most_threads_), pool.parallel_for);
  } catch (...) {
    std::copy_n(saved_h(), states_size_, h());
    throw;
  }
}

template <class T>
void Session<T>::read_states(T* to_h, T* to_c) {
  const Use use(*this);
  std::copy_n(h(), h_size_, to_h);
  if (c_size_ > 0) std::copy_n(c(), c_size_, to_c);
}

template <class T>
void Session<T>::write_states(const T* from_h, const T* from_c) {
  const Use use(*this);
  copy_or_clear(from_h, h_size_, h());
  if (c_size_ > 0) copy_or_clear(from_c, c_size_, c());
}

template <class T>
void Session<T>::write_rows(std::int64_t first, std::int64_t end, const T* from_h,
                            const T* from_c) {
  const Use use(*this);
  const std::int64_t layers = shape().layers;
  replace_rows(h(), layers, batch_, shape().output_size(), first, end, from_h);
  if (c_size_ > 0) replace_rows(c(), layers, batch_, shape().hidden_size, first, end, from_c);
}

template class Session<float>;
template class Session<double>;

}  // namespace fastrnn::cpu
