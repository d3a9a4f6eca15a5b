// Measures the peak of the instruction set in use: all threads run multiply-adds at the same time.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa/isa.h"

namespace fastrnn::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Rounds between two readings of the clock: some tens of microseconds.
constexpr std::int64_t kRounds = 10'000;

// Number of operations of the calling thread from now until `end`, at least one round: a busy
// system may wake the thread too late.
double work_until(const PeakLoop& loop, Clock::time_point end) {
  volatile float factor = 0.5f, term = 1.0f, sink = 0.0f;  // unknown to the compiler
  double operations = 0.0;
  do {
    sink = loop.run(kRounds, factor, term);
    operations += loop.flops_per_round * double(kRounds);
  } while (Clock::now() < end);
  (void)sink;
  return operations;
}

// Pins the calling thread to a core of its own, if there are enough: the system may leave two
// threads on one core for a while.
void stay_on_core(int rank) {
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  int skip = rank % std::max(CPU_COUNT(&allowed), 1);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed) || skip-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
}

}  // namespace

double fma_peak(int threads, double seconds) {
  const PeakLoop& loop = isa().peak;
  std::vector<double> operations(std::size_t(threads), 0.0);
  const auto start = Clock::now() + std::chrono::milliseconds(2);  // when all threads have started
  const auto end =
      start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::vector<std::thread> team;
  std::atomic<bool> given_up{false};
  team.reserve(std::size_t(threads));
  try {
    for (int rank = 0; rank < threads; ++rank) {
      team.emplace_back([&, rank] {
        stay_on_core(rank);
        std::this_thread::sleep_until(start);
        if (!given_up) operations[std::size_t(rank)] = work_until(loop, end);
      });
    }
  } catch (const std::exception&) {  // a thread could not be created
    given_up = true;
  }
  for (std::thread& thread : team) thread.join();
  if (given_up)
    throw std::runtime_error("fastrnn: the system grants " + std::to_string(team.size()) + " of " +
                             std::to_string(threads) + " threads.");
  const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  double total = 0.0;
  for (const double one : operations) total += one;
  return total / elapsed * 1e-9;
}

}  // namespace fastrnn::cpu
