// A team of threads that runs a sequence together. It starts once per call on the caller's pool,
// runs to the end, and synchronises by flags in memory (about 60 ns while both sides spin; a
// parallel region takes 800 ns). Waiting threads spin briefly, then sleep on a futex, so that a
// busy machine can use their CPUs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/api.h"

namespace fastrnn::cpu {

constexpr int kMaxTeam = 256;

// Each rank counts its arrivals in its own cache line; other ranks wait for this count.
class Barrier {
 public:
  static constexpr std::size_t kBytes = 128;  // per rank; also the alignment

  Barrier(int threads, void* memory) : flags_(static_cast<Flag*>(memory)) {
    for (int rank = 0; rank < threads; ++rank) new (&flag(rank)) Flag;
  }

  // Everything that the rank did before is visible to ranks that wait for it.
  FASTRNN_INLINE void arrive(int rank) {
    Flag& own = flag(rank);
    const std::uint32_t count = own.count.load(std::memory_order_relaxed) + 1;
    own.count.store(count);  // sequentially consistent with `sleepers`: one side sees the other
    if (own.sleepers.load() != 0) wake(rank);
  }
  // Waits until every rank of [first, first + size) has arrived as often as this one.
  FASTRNN_INLINE void wait(int rank, int first, int size) {
    if (size == 1) return;
    const std::uint32_t goal = flag(rank).count.load(std::memory_order_relaxed);
    for (int other = first; other < first + size; ++other) add_sleep(rank, await(other, goal));
  }
  // Longest time that a rank has slept in total.
  std::chrono::nanoseconds longest_sleep(int threads) const {
    std::chrono::nanoseconds longest{0};
    for (int rank = 0; rank < threads; ++rank) longest = std::max(longest, flag(rank).slept);
    return longest;
  }
  // Waits until the rank has arrived `goal` times. Returns how long the caller slept.
  FASTRNN_INLINE std::chrono::nanoseconds await(int rank, std::uint32_t goal) {
    return has_arrived(rank, goal) ? std::chrono::nanoseconds(0) : wait_for(rank, goal);
  }
  FASTRNN_INLINE void add_sleep(int rank, std::chrono::nanoseconds time) {
    flag(rank).slept += time;
  }

 private:
  // Counts may wrap around: ranks are never half the range apart.
  FASTRNN_INLINE bool has_arrived(int rank, std::uint32_t goal) const {
    return std::int32_t(flag(rank).count.load(std::memory_order_acquire) - goal) >= 0;
  }
  // Spins briefly, then sleeps. Returns how long it slept.
  FASTRNN_EXPORT std::chrono::nanoseconds wait_for(int other, std::uint32_t goal);
  FASTRNN_EXPORT void wake(int rank);

  struct alignas(128) Flag {
    std::atomic<std::uint32_t> count{0};
    std::atomic<std::uint32_t> sleepers{0};  // ranks that sleep until this count changes
    std::chrono::nanoseconds slept{0};       // time that this rank slept, waiting for others
  };
  static_assert(sizeof(Flag) == kBytes);
  FASTRNN_INLINE Flag& flag(int rank) const { return flags_[rank]; }

  Flag* const flags_;
};

// Work of a step that ranks may take from each other: items 0 ... size-1 per rank. A rank takes its
// own items from the front; ranks that have finished theirs take from the back. Even and odd steps
// have separate counts, so that one can be refilled while the other is in use.
class WorkQueues {
 public:
  static constexpr std::size_t kBytes = 128;  // per rank; also the alignment

  WorkQueues(int threads, void* memory) : queues_(static_cast<Queue*>(memory)) {
    for (int rank = 0; rank < threads; ++rank) new (&queue(rank)) Queue;
  }

  // Refills a rank's queue. Call it from this rank only, when no rank is in a step of this parity
  // any more.
  FASTRNN_INLINE void refill(int rank, int parity) {
    queue(rank).taken[parity].store({0, 0}, std::memory_order_relaxed);
  }
  // Takes an item from a rank's queue. Returns false if it is empty.
  FASTRNN_INLINE bool take(int rank, int parity, std::int64_t size, bool from_front,
                           std::int64_t& item) {
    auto& taken = queue(rank).taken[parity];
    Taken before = taken.load(std::memory_order_relaxed), after;
    do {
      if (before.front + before.back >= size) return false;
      after = before;
      item = from_front ? after.front++ : size - ++after.back;
    } while (!taken.compare_exchange_weak(before, after, std::memory_order_relaxed));
    return true;
  }

 private:
  struct alignas(8) Taken {    // one word for every compiler
    std::int32_t front, back;  // items taken from each end
  };
  struct alignas(128) Queue {
    std::atomic<Taken> taken[2] = {};
  };
  static_assert(sizeof(Queue) == kBytes);
  FASTRNN_INLINE Queue& queue(int rank) const { return queues_[rank]; }

  Queue* const queues_;
};

// Whether a call must stop. Only the calling thread asks (set_interrupted), and only from time to
// time; all ranks read the answer.
class Interruption {
 public:
  // Counts multiply-adds of the calling thread; asks after enough of them.
  FASTRNN_INLINE void count_work(std::int64_t work) {
    left_ -= work;
    if (left_ <= 0) check();
  }
  FASTRNN_INLINE bool requested() const { return requested_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::int64_t kWorkPerCheck = 1 << 22;  // 1 ms of the slowest kernels
  FASTRNN_EXPORT void check();

  std::int64_t left_ = kWorkPerCheck;
  std::chrono::steady_clock::time_point last_{};
  // Not in the cache line that the calling thread writes.
  alignas(128) std::atomic<bool> requested_{false};
};

// State that the ranks of a problem share.
struct Team {
  static constexpr std::size_t kBytes = Barrier::kBytes + WorkQueues::kBytes;  // per rank

  Barrier barrier;
  WorkQueues work_queues;
  const int threads;
  Team* below = nullptr;  // the team that computes this team's input at the same time, or null
  // The first step goes through its blocks from the last one to the first. Steps alternate, so that
  // each one begins with the weights that are still in the cache; so do calls of one step.
  bool backwards = false;

  Interruption& interruption;
  bool asks;  // whether rank 0 is the calling thread

  // memory: `size` times kBytes, aligned to Barrier::kBytes. It is part of the workspace because
  // small stacks could not hold it.
  Team(int size, void* memory, Interruption& call, bool asks_)
      : barrier(size, memory),
        work_queues(size, static_cast<char*>(memory) + size * Barrier::kBytes),
        threads(size),
        interruption(call),
        asks(asks_) {}

  // Whether a rank, whose next step takes `work` multiply-adds, must stop. It need not wait for
  // other ranks then, but must arrive as often as without the stop, because others may still wait
  // for it.
  FASTRNN_INLINE bool gives_up(int rank, std::int64_t work) {
    if (asks && rank == 0) interruption.count_work(work);
    return interruption.requested();
  }
};

// Runs body(context, rank, size) for all ranks in parallel: with size = threads if the pool grants
// that many threads, else once with size = 1 on the calling thread (in a nested or smaller region).
// In a forked process, whose pool has no threads, it creates threads for the call.
void run_team(int threads, ParallelFor parallel_for,
              void (*body)(void* context, int rank, int size), void* context);

}  // namespace fastrnn::cpu
