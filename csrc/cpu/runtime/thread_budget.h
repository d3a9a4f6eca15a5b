// Number of threads that a call may use: limited by the caller's pool, by the CPUs of this process,
// and by other calls.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

#include "cpu/api.h"

namespace fastrnn::cpu {

// Number of CPUs that the calling thread may use: its affinity, limited by the quota of its control
// group.
FASTRNN_EXPORT int usable_cpus();
// Number of CPUs in a control group's quota, rounded up, or 0 without a quota: the smallest one
// along the path that `membership` (/proc/self/cgroup) names below `root` (/sys/fs/cgroup), version
// 1 or 2.
FASTRNN_EXPORT int quota_cpus(const std::string& membership, const std::string& root);

// Calls from several Python threads share the CPUs: a call gets up to `wanted` of `all` threads
// that earlier calls have left, at least the calling thread.
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
// Largest number of threads that calls had at the same time since the last time this was asked.
FASTRNN_EXPORT int peak_threads();

// If another process occupies a CPU, a team waits whole time slices until the rank without a CPU
// runs again. A call failed in this way if a rank slept for a third of it and for at least a
// millisecond. If all calls fail for some time (kPatience), later calls whose ranks would wait for
// each other run on one thread for a back-off period; then one call tries again. (A short time does
// not count: on an idle machine it passes until the system has moved apart threads that woke up on
// one CPU.) Each failure doubles the period, up to kMaxBackoff; each success halves it; while it is
// not zero, one failing call starts it again.
class FASTRNN_EXPORT ContentionBackoff {
 public:
  using Clock = std::chrono::steady_clock;

  // Whether calls run on one thread at this time.
  bool is_backing_off(Clock::time_point now) const;
  // Records a call that ran from `begin` to `now`. slept: longest time that one of its ranks slept.
  void record(Clock::time_point begin, Clock::time_point now, Clock::duration slept);

 private:
  std::atomic<Clock::rep> until_{0};
  std::atomic<Clock::rep> since_{0};  // start of the first failed call in a row
  std::atomic<int> calls_{0};         // failed calls in a row
  std::atomic<int> failures_{0};      // failures that started a back-off, halved by successes
};

// Whether this process was forked from one that had loaded this library. The threads of the pool do
// not exist in it, and a parallel region would wait for them forever.
FASTRNN_EXPORT bool is_forked();

}  // namespace fastrnn::cpu
