// A session: packed weights and the states of a batch of sequences that arrive step by step.
#pragma once

#include <atomic>

#include "cpu/packed_stack.h"

namespace fastrnn::cpu {

// Only one call at a time may use a session; another one throws std::runtime_error. A call that
// throws leaves the states as they were.
template <class T>
class Session {
 public:
  // shape has one direction. threads: upper bound for a call, 0: the threads of the pool.
  FASTRNN_EXPORT Session(const StackShape& shape, std::int64_t batch, int threads);

  // Replaces the weights [L].
  FASTRNN_EXPORT void pack(const LayerWeights<T>* weights);
  // Runs the next steps: x [T, B, I], y [T, B, R]. They may overlap.
  FASTRNN_EXPORT void run(const T* x, std::int64_t steps, T* y);

  // h [L, B, R], c [L, B, H] (not used if the cell has no c).
  FASTRNN_EXPORT void read_states(T* h, T* c);
  // Null: zero.
  FASTRNN_EXPORT void write_states(const T* h, const T* c);

  const StackShape& shape() const { return stack_.shape(); }
  std::int64_t batch() const { return batch_; }

 private:
  class Use;  // of the session by one call

  T* h(int which) const { return static_cast<T*>(states_.data()) + which * states_size_; }
  T* c(int which) const { return c_size_ > 0 ? h(which) + h_size_ : nullptr; }

  PackedStack<T> stack_;
  const std::int64_t batch_, h_size_, c_size_, states_size_;
  const int most_threads_;
  Workspace states_;  // two copies of h and c: a call reads one and writes the other
  int current_ = 0;   // the copy with the states before the next step
  std::atomic<bool> in_use_{false};
};

}  // namespace fastrnn::cpu
