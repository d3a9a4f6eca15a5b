// Number of threads that a call may use: limited by the caller's pool, by the CPUs of this process,
// and by other calls.
#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
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
// runs again. Calls are judged together until they have taken some time (kWindow): they failed if
// ranks slept for more than a third of it. Later calls whose ranks would wait for each other then
// run on one thread for a back-off period, after which calls of a shorter time (kProbe) are judged.
// Each failure in a row doubles the period, up to kMaxBackoff; each success halves it. (At first
// one call is not enough, and a short time is not: on an idle machine it passes until the system
// has moved apart threads that woke up on one CPU.)
class FASTRNN_EXPORT ContentionBackoff {
 public:
  using Clock = std::chrono::steady_clock;

  // Whether calls run on one thread at this time.
  bool is_backing_off(Clock::time_point now) const;
  // Records a call that ran from `begin` to `now`. slept: longest time that one of its ranks slept.
  void record(Clock::time_point begin, Clock::time_point now, Clock::duration slept);
  // Ends the back-off period, as if no call had been recorded.
  void forget();

 private:
  std::atomic<Clock::rep> until_{0};

  std::mutex mutex_;          // of the members below; a call that finds it locked is not recorded
  Clock::duration taken_{0};  // time of the calls that are judged together
  Clock::duration slept_{0};  // part of it that ranks slept
  int calls_ = 0;             // number of these calls
  int failures_ = 0;          // failures in a row, halved by successes
};

// Lets the next call use its threads. For tests, whose calls may have more threads than CPUs.
FASTRNN_EXPORT void forget_contention();

// Whether this process was forked from one that had loaded this library. The threads of the pool do
// not exist in it, and a parallel region would wait for them forever.
FASTRNN_EXPORT bool is_forked();

}  // namespace fastrnn::cpu
