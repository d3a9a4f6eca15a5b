// The waiting side of the team (team.h).
#include "team.h"

#include <sched.h>

namespace fastrnn::cpu {
namespace {

constexpr int kSpins = 4096;  // some tens of microseconds: longer than any step's imbalance

inline void pause_spin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
void spin_until(Ready ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < kSpins) {
      pause_spin();
    } else {
      sched_yield();
    }
  }
}

struct Call {
  int threads;
  void (*body)(void*, int, int);
  void* context;
  std::atomic<int> granted{0};
};

// The pool cuts [0, threads) into pieces. Only the first piece, which the calling thread runs, can
// tell whether each rank got a thread of its own; it tells the others.
void run_piece(std::int64_t begin, std::int64_t end, void* pointer) {
  Call& call = *static_cast<Call*>(pointer);
  if (begin == 0) {
    const int granted = end - begin == 1 ? call.threads : 1;
    call.granted.store(granted, std::memory_order_release);
    call.body(call.context, 0, granted);
    return;
  }
  int granted = 0;
  spin_until([&] { return (granted = call.granted.load(std::memory_order_acquire)) != 0; });
  if (granted > 1) call.body(call.context, int(begin), granted);
}

}  // namespace

void Barrier::wait_for(int other, std::uint64_t goal) const {
  spin_until([&] { return flag(other).count.load(std::memory_order_acquire) >= goal; });
}

void run_team(int threads, ParallelFor parallel_for, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
  Call call{threads, body, context};
  parallel_for(threads, run_piece, &call);
}

}  // namespace fastrnn::cpu
