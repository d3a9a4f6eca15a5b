#include "cpu/runtime/thread_budget.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>

namespace fastrnn::cpu {
namespace {

std::atomic<int> reserved{0};       // threads of all running calls
std::atomic<int> peak_reserved{0};  // largest value of reserved
std::atomic<bool> forked{false};

constexpr std::chrono::milliseconds kWindow(20), kProbe(5), kMinBackoff(4);
constexpr int kMaxDoublings = 7;  // of kMinBackoff: half a second

// No thread of the parent runs in the child.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  reserved.store(0);
  forked.store(true);
});

// Reads a file line by line. Uses C's functions, because C++ streams of this library could conflict
// with those of the process.
class Lines {
 public:
  explicit Lines(const std::string& path) : file_(std::fopen(path.c_str(), "r")) {}
  ~Lines() {
    if (file_ != nullptr) std::fclose(file_);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;

  // Returns false at the end.
  bool next(std::string& line) {
    line.clear();
    if (file_ == nullptr) return false;
    int c;
    while ((c = std::fgetc(file_)) != EOF && c != '\n') {
      if (++read_ > kMost) return false;  // not a file of a control group
      line.push_back(char(c));
    }
    return c != EOF || !line.empty();
  }

 private:
  static constexpr std::size_t kMost = 1 << 20;  // bytes
  std::FILE* file_;
  std::size_t read_ = 0;
};

// Number of CPUs that the files of a control group's folder allow, 0: no limit.
double quota_of(const std::string& folder) {
  double quota = 0, period = 0;
  std::string line;
  if (Lines(folder + "/cpu.max").next(line)) {  // "max 100000" or "200000 100000"
    if (std::sscanf(line.c_str(), "%lf %lf", &quota, &period) != 2) return 0;
  } else {
    if (Lines(folder + "/cpu.cfs_quota_us").next(line)) std::sscanf(line.c_str(), "%lf", &quota);
    if (Lines(folder + "/cpu.cfs_period_us").next(line)) std::sscanf(line.c_str(), "%lf", &period);
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

int affinity_cpus() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return std::max(CPU_COUNT(&mask), 1);
  // There are more CPUs than bits in the mask.
  return std::max(int(std::thread::hardware_concurrency()), 1);
}

}  // namespace

int quota_cpus(const std::string& membership, const std::string& root) {
  Lines lines(membership);
  double least = 0;
  for (std::string line; lines.next(line);) {  // 0::/path or 4:cpu,cpuacct:/path
    const std::size_t one = line.find(':'), two = line.find(':', one + 1);
    if (one == std::string::npos || two == std::string::npos) continue;
    const std::string controllers = line.substr(one + 1, two - one - 1);
    const bool is_cpu = ("," + controllers + ",").find(",cpu,") != std::string::npos;
    if (!controllers.empty() && !is_cpu) continue;
    const std::string top = root + (controllers.empty() ? "" : "/" + controllers);
    // In a container the path may be the host's; the container's own limit is then at the top.
    for (std::string path = line.substr(two + 1);; path.erase(path.rfind('/'))) {
      const double quota = quota_of(top + path);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  constexpr double kMost = 1 << 20;  // CPUs
  return int(std::ceil(std::min(least, kMost)));
}

int usable_cpus() {
  static const int quota = quota_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
  const int cpus = affinity_cpus();
  return quota > 0 ? std::min(cpus, quota) : cpus;
}

ThreadReservation::ThreadReservation(int wanted, int all) {
  int before = reserved.load(std::memory_order_relaxed);
  do {
    threads_ = std::clamp(all - before, 1, wanted);
  } while (!reserved.compare_exchange_weak(before, before + threads_, std::memory_order_relaxed));
  const int now = before + threads_;
  int peak = peak_reserved.load(std::memory_order_relaxed);
  while (peak < now && !peak_reserved.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
}

int peak_threads() { return peak_reserved.exchange(0, std::memory_order_relaxed); }

ThreadReservation::~ThreadReservation() { reserved.fetch_sub(threads_, std::memory_order_relaxed); }

bool ContentionBackoff::is_backing_off(Clock::time_point now) const {
  return now.time_since_epoch().count() < until_.load(std::memory_order_relaxed);
}

void ContentionBackoff::record(Clock::time_point begin, Clock::time_point now,
                               Clock::duration slept) {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return;
  taken_ += now - begin;
  slept_ += slept;
  ++calls_;
  const bool probes = failures_ > 0;
  if (taken_ < (probes ? kProbe : kWindow) || (calls_ < 2 && !probes)) return;
  if (slept_ * 3 > taken_) {
    until_.store(
        (now + kMinBackoff * (1 << std::min(failures_, kMaxDoublings))).time_since_epoch().count(),
        std::memory_order_relaxed);
    ++failures_;
  } else {
    failures_ /= 2;
  }
  taken_ = slept_ = Clock::duration(0);
  calls_ = 0;
}

void ContentionBackoff::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  until_.store(0, std::memory_order_relaxed);
  taken_ = slept_ = Clock::duration(0);
  calls_ = failures_ = 0;
}

bool is_forked() { return forked.load(std::memory_order_relaxed); }

}  // namespace fastrnn::cpu
