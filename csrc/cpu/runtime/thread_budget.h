// How many threads a call may use: what the caller's pool has, what the system gives this process,
// and what other calls have not taken.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

#include "cpu/api.h"

namespace fastrnn::cpu {

// CPUs that the calling thread may use: its affinity, and the quota of its control group.
FASTRNN_EXPORT int usable_cpus();
// CPUs a control group's quota amounts to, rounded up, or 0 if there is none: the least along the
// path that `membership` (/proc/self/cgroup) names below `root` (/sys/fs/cgroup), version 1 or 2.
FASTRNN_EXPORT int quota_cpus(const std::string& membership, const std::string& root);

// Calls from several Python threads share the CPUs: a call gets what those before it left, at least
// the thread it came on.
class ThreadReservation {
 public:
  ThreadReservation(int wanted, int all);
  ~ThreadReservation();
  ThreadReservation(const ThreadReservation&) = delete;
  ThreadReservation& operator=(const ThreadReservation&) = delete;

  int threads() const { return threads_; }

 private:
  int threads_;
};
// The most threads that calls had together, since this was asked the last time.
FASTRNN_EXPORT int peak_threads();

// CPUs that others use make a team wait whole time slices for a rank that has none: a rank sleeps
// for a third of the call, and a millisecond at least. If that happens in call after call for some
// time (for a moment it does on an idle machine, until threads that woke on one CPU have been moved
// apart), calls whose ranks would wait for each other go alone for some milliseconds;
// then one tries again. Each failure doubles the time, up to kMaxBackoff, each success halves it,
// and until it is down to nothing a single call that waits is enough.
class FASTRNN_EXPORT ContentionBackoff {
 public:
  using Clock = std::chrono::steady_clock;

  // Whether calls go alone at this time.
  bool is_backing_off(Clock::time_point now) const;
  // `slept`: the longest that any rank of a call did, which took from `begin` to `now`.
  void record(Clock::time_point begin, Clock::time_point now, Clock::duration slept);

 private:
  std::atomic<Clock::rep> until_{0};
  std::atomic<Clock::rep> since_{0};  // when the first of them began
  std::atomic<int> calls_{0};         // that waited, in a row
  std::atomic<int> failures_{0};      // of those that would send others alone
};

// Whether this process was forked from one that had loaded this library. The pool's threads did not
// come along, and a parallel region would wait for them for ever.
bool is_forked();

}  // namespace fastrnn::cpu
