// A team of threads that walks a sequence together: started once a call on the caller's pool, kept
// to the end, meeting at flags in memory (a spinning flag costs some 60 ns, a parallel region 800).
// Who waits long goes to sleep, so that a busy machine's CPUs go to those who have something to do.
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

// Each rank counts its arrivals in a cache line of its own; a rank waits for the counts of its
// group.
class Barrier {
 public:
  static constexpr std::size_t kBytes = 128;  // per rank, aligned to as many

  Barrier(int threads, void* memory) : flags_(static_cast<Flag*>(memory)) {
    for (int rank = 0; rank < threads; ++rank) new (&flag(rank)) Flag;
  }

  // What rank did before is visible to whoever waits for it.
  FASTRNN_INLINE void arrive(int rank) {
    Flag& own = flag(rank);
    const std::uint32_t count = own.count.load(std::memory_order_relaxed) + 1;
    own.count.store(count);  // in one order with `sleepers` for all: either side sees the other
    if (own.sleepers.load() != 0) wake(rank);
  }
  // Until every rank of [first, first + size) has arrived as often as this one.
  FASTRNN_INLINE void wait(int rank, int first, int size) {
    if (size == 1) return;
    const std::uint32_t goal = flag(rank).count.load(std::memory_order_relaxed);
    for (int other = first; other < first + size; ++other) add_sleep(rank, await(other, goal));
  }
  // The longest time that a rank has slept in here, all in all.
  std::chrono::nanoseconds longest_sleep(int threads) const {
    std::chrono::nanoseconds longest{0};
    for (int rank = 0; rank < threads; ++rank) longest = std::max(longest, flag(rank).slept);
    return longest;
  }
  // Until rank has arrived `goal` times; returns for how long the caller slept.
  FASTRNN_INLINE std::chrono::nanoseconds await(int rank, std::uint32_t goal) {
    return has_arrived(rank, goal) ? std::chrono::nanoseconds(0) : wait_for(rank, goal);
  }
  FASTRNN_INLINE void add_sleep(int rank, std::chrono::nanoseconds time) {
    flag(rank).slept += time;
  }

 private:
  // Counts may wrap around; ranks are never half the range apart.
  FASTRNN_INLINE bool has_arrived(int rank, std::uint32_t goal) const {
    return std::int32_t(flag(rank).count.load(std::memory_order_acquire) - goal) >= 0;
  }
  // Spins a moment, then sleeps; returns for how long.
  std::chrono::nanoseconds wait_for(int other, std::uint32_t goal);
  void wake(int rank);

  struct alignas(128) Flag {
    std::atomic<std::uint32_t> count{0};
    std::atomic<std::uint32_t> sleepers{0};  // who sleeps until this count changes
    std::chrono::nanoseconds slept{0};       // this rank, waiting for others
  };
  static_assert(sizeof(Flag) == kBytes);
  FASTRNN_INLINE Flag& flag(int rank) const { return flags_[rank]; }

  Flag* const flags_;
};

// Work of a step that whoever has time may do: items 0 ... size-1 of each rank, which takes its own
// from the front, while others that have finished theirs take from the back. There is one count for
// even steps and one for odd ones, so that one can be refilled while the other is in use.
class WorkQueues {
 public:
  static constexpr std::size_t kBytes = 128;  // per rank, aligned to as many

  WorkQueues(int threads, void* memory) : queues_(static_cast<Queue*>(memory)) {
    for (int rank = 0; rank < threads; ++rank) new (&queue(rank)) Queue;
  }

  // Everything is there again. By the rank itself, when nobody is in a step of this parity any
  // more.
  FASTRNN_INLINE void refill(int rank, int parity) {
    queue(rank).taken[parity].store({0, 0}, std::memory_order_relaxed);
  }
  // Takes an item of rank's; false if there is none left.
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
  struct alignas(8) Taken {    // one word, for all compilers
    std::int32_t front, back;  // items that are gone, from either end
  };
  struct alignas(128) Queue {
    std::atomic<Taken> taken[2] = {};
  };
  static_assert(sizeof(Queue) == kBytes);
  FASTRNN_INLINE Queue& queue(int rank) const { return queues_[rank]; }

  Queue* const queues_;
};

// Whether a call is to be given up. Only the calling thread asks (set_interrupted), and only now
// and then; every rank reads the answer.
class Interruption {
 public:
  // Counts multiply-adds of the calling thread, and asks after enough of them.
  FASTRNN_INLINE void count_work(std::int64_t work) {
    left_ -= work;
    if (left_ <= 0) check();
  }
  FASTRNN_INLINE bool requested() const { return requested_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::int64_t kWorkPerCheck = 1 << 22;  // a millisecond of the slowest kernels
  void check();

  std::int64_t left_ = kWorkPerCheck;
  std::chrono::steady_clock::time_point last_{};
  alignas(128) std::atomic<bool> requested_{false};  // away from what the calling thread writes
};

// What the ranks that walk together share.
struct Team {
  static constexpr std::size_t kBytes = Barrier::kBytes + WorkQueues::kBytes;  // per rank

  Barrier barrier;
  WorkQueues work_queues;
  const int threads;
  Team* below = nullptr;  // who makes this team's input, while it walks

  Interruption& interruption;
  bool asks;  // whether rank 0 is the calling thread, which asks whether to give up

  // memory: `size` times kBytes, aligned to Barrier::kBytes. A small stack could not hold it.
  Team(int size, void* memory, Interruption& call, bool asks_)
      : barrier(size, memory),
        work_queues(size, static_cast<char*>(memory) + size * Barrier::kBytes),
        threads(size),
        interruption(call),
        asks(asks_) {}

  // Whether a rank gives the call up, which next does so many multiply-adds. It need not wait for
  // other ranks then, but must arrive as often as if it went on: they may still wait for it.
  FASTRNN_INLINE bool gives_up(int rank, std::int64_t work) {
    if (asks && rank == 0) interruption.count_work(work);
    return interruption.requested();
  }
};

// Runs body(context, rank, size) for every rank at once: with size = threads where the pool grants
// that many, else with size = 1 on the calling thread alone (a nested or a smaller
// region). A forked process, where the pool is dead, makes threads for the call.
void run_team(int threads, ParallelFor parallel_for,
              void (*body)(void* context, int rank, int size), void* context);

}  // namespace fastrnn::cpu
