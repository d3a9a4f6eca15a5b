// Waiting, starting and interrupting a team (team.h).
#include "cpu/runtime/team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_budget.h"

namespace fastrnn::cpu {
namespace {

constexpr int kSpins = 2048;  // some tens of microseconds: longer than the imbalance of most steps

inline void pause_spin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (ready()) return true;
    pause_spin();
  }
  return ready();
}

// Sleeps while `word` holds `value`. It may return early: the caller checks again.
template <class Word>
void sleep_while(std::atomic<Word>& word, std::uint32_t value) {
  static_assert(sizeof(word) == sizeof(value));
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
template <class Word>
void wake_all(std::atomic<Word>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

std::atomic<bool (*)()> interrupted{nullptr};
constexpr std::chrono::milliseconds kCheckInterval(100);

struct Call {
  int threads;
  void (*body)(void*, int, int);
  void* context;
  std::atomic<int> granted{0};
};

// Number of ranks that run: all, or rank 0 alone. The other ranks wait for this number, because
// only the thread with the first chunk can tell whether each rank got its own thread.
void grant(Call& call, int granted) {
  call.granted.store(granted);
  wake_all(call.granted);
}
int await_grant(Call& call) {
  auto granted = [&] { return call.granted.load(std::memory_order_acquire); };
  if (!spin_until([&] { return granted() != 0; }))
    while (granted() == 0) sleep_while(call.granted, 0);
  return granted();
}

// The pool splits [0, threads) into chunks; the calling thread runs the first one.
void run_piece(std::int64_t begin, std::int64_t end, void* pointer) {
  Call& call = *static_cast<Call*>(pointer);
  if (begin == 0) {
    const int granted = end - begin == 1 ? call.threads : 1;
    grant(call, granted);
    call.body(call.context, 0, granted);
  } else if (const int granted = await_grant(call); granted > 1) {
    call.body(call.context, int(begin), granted);
  }
}

void run_on_new_threads(Call& call) {
  std::vector<std::thread> others;
  try {
    others.reserve(call.threads);
    for (int rank = 1; rank < call.threads; ++rank)
      others.emplace_back([&call, rank] { run_piece(rank, rank + 1, &call); });
    run_piece(0, 1, &call);
  } catch (const std::exception&) {  // a thread could not be created
    run_piece(0, call.threads, &call);
  }
  for (std::thread& other : others) other.join();
}

}  // namespace

std::chrono::nanoseconds Barrier::wait_for(int other, std::uint32_t goal) {
  if (spin_until([&] { return has_arrived(other, goal); })) return {};
  const auto begin = std::chrono::steady_clock::now();
  Flag& awaited = flag(other);
  awaited.sleepers.fetch_add(1);
  for (;;) {
    const std::uint32_t seen = awaited.count.load();
    if (std::int32_t(seen - goal) >= 0) break;
    sleep_while(awaited.count, seen);
  }
  awaited.sleepers.fetch_sub(1);
  return std::chrono::steady_clock::now() - begin;
}

void Barrier::wake(int rank) { wake_all(flag(rank).count); }

void set_interrupted(bool (*function)()) { interrupted.store(function); }

void Interruption::check() {
  left_ = kWorkPerCheck;
  const auto now = std::chrono::steady_clock::now();
  if (last_ == std::chrono::steady_clock::time_point()) last_ = now;
  if (now - last_ < kCheckInterval) return;
  last_ = now;
  const auto ask = interrupted.load();
  if (ask != nullptr && ask()) requested_.store(true, std::memory_order_relaxed);
}

void run_team(int threads, ParallelFor parallel_for, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
  Call call{threads, body, context};
  if (is_forked()) {
    run_on_new_threads(call);
  } else {
    parallel_for(threads, run_piece, &call);
  }
}

}  // namespace fastrnn::cpu
