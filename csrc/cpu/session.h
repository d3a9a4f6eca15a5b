// A session: packed weights and the states of a batch of sequences that arrive step by step.
#pragma once

#include <atomic>
#include <stdexcept>

#include "cpu/packed_stack.h"

namespace fastrnn::cpu {

template <class T>
class SerialStack;

// Only one call at a time may use a session: the other one throws this.
struct SessionBusy : std::runtime_error {
  SessionBusy();
};

// A call that throws leaves the states as they were.
template <class T>
class Session {
 public:
  // shape has one direction. threads: upper bound for a call. With 1, step and run allocate
  // nothing, wait for no thread and make no system call; with more they use those of the pool.
  FASTRNN_EXPORT Session(const StackShape& shape, std::int64_t batch, int threads);
  FASTRNN_EXPORT ~Session();

  // Replaces the weights [L].
  FASTRNN_EXPORT void pack(const LayerWeights<T>* weights);
  // Runs the next step: x [B, I], y [B, R]. They may overlap.
  FASTRNN_EXPORT void step(const T* x, T* y);
  // Runs the next steps: x [T, B, I], y [T, B, R]. They must not overlap. asks: whether a signal
  // may end a long call (set_interrupted).
  FASTRNN_EXPORT void run(const T* x, std::int64_t steps, T* y, bool asks);

  // h [L, B, R], c [L, B, H] (not used if the cell has no c).
  FASTRNN_EXPORT void read_states(T* h, T* c);
  // Null: zero.
  FASTRNN_EXPORT void write_states(const T* h, const T* c);
  // Replaces the states of each of these sequences of the batch by h [L, R] and c [L, H]. Null:
  // zero.
  FASTRNN_EXPORT void write_rows(std::int64_t first, std::int64_t end, const T* h, const T* c);

  const StackShape& shape() const { return stack_.shape(); }
  std::int64_t batch() const { return batch_; }
  std::int64_t h_size() const { return h_size_; }  // L * B * R
  std::int64_t c_size() const { return c_size_; }  // L * B * H, 0: the cell has no c

 private:
  class Use;  // of the session by one call

  T* h() const { return static_cast<T*>(states_.data()); }
  T* c() const { return c_size_ > 0 ? h() + h_size_ : nullptr; }
  T* saved_h() const { return h() + states_size_; }
  T* saved_c() const { return c_size_ > 0 ? saved_h() + h_size_ : nullptr; }
  void run_on_pool(const T* x, std::int64_t steps, T* y);

  PackedStack<T> stack_;
  const std::int64_t batch_, h_size_, c_size_, states_size_;
  const int most_threads_;
  const std::unique_ptr<SerialStack<T>> serial_;  // null with more threads than one
  Workspace states_;  // two copies of h and c: the current ones, and those before a long call
  std::atomic<bool> in_use_{false};
};

}  // namespace fastrnn::cpu
