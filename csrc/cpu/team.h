// A team of threads that walks a sequence together: started once a call on the caller's pool, kept
// to the end, meeting at flags in memory (a spinning flag costs some 60 ns, a parallel region 800).
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "kernels.h"

namespace fastrnn::cpu {

constexpr int kMaxTeam = 256;

// Each rank counts its arrivals in a cache line of its own; a rank waits for the counts of its
// group.
class Barrier {
 public:
  explicit Barrier(int threads) {  // only the flags in use are touched
    for (int rank = 0; rank < threads; ++rank) new (&flag(rank)) Flag;
  }

  // What rank did before is visible to whoever waits for it.
  void arrive(int rank) {
    auto& count = flag(rank).count;
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  // Until every rank of [first, first + size) has arrived as often as this one.
  void wait(int rank, int first, int size) const {
    if (size == 1) return;
    const std::uint64_t goal = flag(rank).count.load(std::memory_order_relaxed);
    for (int other = first; other < first + size; ++other)
      if (flag(other).count.load(std::memory_order_acquire) < goal) wait_for(other, goal);
  }

 private:
  // Spins a moment, then lets others run between looks: a busy machine slows it, never stops it.
  void wait_for(int other, std::uint64_t goal) const;

  struct alignas(128) Flag {
    std::atomic<std::uint64_t> count{0};
  };
  Flag& flag(int rank) { return reinterpret_cast<Flag*>(storage_)[rank]; }
  const Flag& flag(int rank) const { return reinterpret_cast<const Flag*>(storage_)[rank]; }

  alignas(Flag) unsigned char storage_[kMaxTeam * sizeof(Flag)];
};

// Runs body(context, rank, size) for every rank at once: with size = threads where the pool grants
// that many, else with size = 1 on the calling thread alone (a nested or a smaller region).
void run_team(int threads, ParallelFor parallel_for,
              void (*body)(void* context, int rank, int size), void* context);

}  // namespace fastrnn::cpu
