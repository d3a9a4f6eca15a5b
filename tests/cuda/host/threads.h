// GPU threads on the host: runs a kernel for every thread of a grid. Each thread is a fiber; all
// fibers share one OS thread and run in a random order drawn from a seed.
//
//   grid     | block 0         | block 1         | ...    all resident, as in a cooperative launch
//   block    | warp 0 | warp 1 | warp 0 | warp 1 |        shared memory; sync()
//   warp     | 32 lanes        |                          sync_warp(), shuffle_xor(), mma()
//   fiber    | runs until it must wait, then another fiber runs
//
// A missing barrier gives a wrong result under some seed. A barrier that some threads never reach
// gives an exception. A missing memory fence goes unnoticed, because all fibers share one OS thread
// and see every write at once.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/math/fragment.h"
#include "cuda/math/half.h"

// _longjmp under another name: with _FORTIFY_SOURCE the headers replace it by a checked version,
// which rejects a jump to another stack.
extern "C" [[noreturn]] void fastrnn_test_jump(jmp_buf to, int value) __asm__("_longjmp");

namespace fastrnn::test {

using cuda::Quad;

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;
// Not a power of two, so that the ends of the stacks map to different cache lines.
constexpr std::size_t kStackStride = kStackBytes + 5 * 64;
// Guard bytes beyond the shared memory of a block, which reveal writes out of bounds.
constexpr std::size_t kMarginBytes = 1024;
constexpr int kPoison = 0xff;  // NaN in floating point types of any size

// Size of a launch.
struct Launch {
  unsigned blocks, threads_a_block;  // threads_a_block: a multiple of 32
  std::size_t shared_bytes;          // per block
  std::uint64_t seed;                // for the order of the threads
};

// splitmix64 (Steele, Lea, Flood 2014)
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t bits = state_ += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
  }
  unsigned below(unsigned limit) { return unsigned((next() >> 32) * limit >> 32); }

 private:
  std::uint64_t state_;
};

// Stacks of the fibers: one mapping that grows and is reused by the next grid. Only touched pages
// use memory.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(std::size_t count) {
    if (count * kStackStride <= size_) return;
    release();
    void* memory = mmap(nullptr, count * kStackStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
    memory_ = static_cast<char*>(memory);
    size_ = count * kStackStride;
    // With huge pages every stack would be resident as a whole.
    madvise(memory_, size_, MADV_NOHUGEPAGE);
  }
  char* of(std::size_t fiber) const { return memory_ + fiber * kStackStride; }

 private:
  void release() {
    if (memory_ != nullptr) munmap(memory_, size_);
    memory_ = nullptr;
    size_ = 0;
  }

  char* memory_ = nullptr;
  std::size_t size_ = 0;
};

// The runnable ones among 0 ... count-1. One of them is the favourite: it gets all turns until it
// must wait or its period ends. Fair scheduling would keep all blocks within a step of each other,
// and would never reveal a missing wait between blocks. With favourites one block (within a block:
// one warp) runs as far ahead as its barriers and flags allow. A period has 2^0 ... 2^patience
// turns; short and long periods are equally frequent.
class Candidates {
 public:
  Candidates(unsigned count, unsigned patience) : place_(count, kNowhere), patience_(patience) {
    ready_.reserve(count);
  }

  bool empty() const { return ready_.empty(); }
  void add(unsigned who) {
    place_[who] = unsigned(ready_.size());
    ready_.push_back(who);
  }
  void remove(unsigned who) {
    const unsigned last = ready_.back();
    ready_[place_[who]] = last;
    place_[last] = place_[who];
    ready_.pop_back();
    place_[who] = kNowhere;
  }
  unsigned pick(Random& random) {
    if (turns_ == 0 || place_[favourite_] == kNowhere) {
      favourite_ = ready_[random.below(unsigned(ready_.size()))];
      turns_ = 1u << random.below(patience_ + 1);
    }
    --turns_;
    return favourite_;
  }

 private:
  static constexpr unsigned kNowhere = ~0u;

  std::vector<unsigned> ready_;  // unordered
  std::vector<unsigned> place_;  // index of each one in ready_
  unsigned patience_;
  unsigned favourite_ = 0, turns_ = 0;
};

enum State {
  kCanRun,
  kInSync,
  kInSyncWarp,
  kInShuffle,
  kInMmaFloat16,
  kInMmaBFloat16,
  kInMmaTf32,
  kAwaitsFlag,
  kReturned,
  kStates
};
// Completes the message "waits ...".
constexpr const char* kWhere[kStates] = {
    "for its turn",       "in sync",        "in sync_warp", "in shuffle_xor",  "in mma of float16",
    "in mma of bfloat16", "in mma of tf32", "for a flag",   "after its return"};

// Layout of the operands of an mma (PTX ISA, "Matrix Fragments for mma"), with V values of k per
// word:
//
//   lane = 4 g + q      a[0]: row g    k = V q + (0 ... V-1)      a[2]: row g    k + 4 V
//                       a[1]: row g+8  k                          a[3]: row g+8  k + 4 V
//                       b[0]: column g k                          b[1]: column g k + 4 V
//                       d[0], d[1]: row g, columns 2 q, 2 q + 1   d[2], d[3]: row g + 8
template <class Kind>
struct Operand {
  static constexpr State kState =
      std::is_same<Kind, cuda::Float16>::value ? kInMmaFloat16 : kInMmaBFloat16;
  static constexpr unsigned kValues = 2;
  static float value(std::uint32_t word, unsigned i) {
    return cuda::widen(Kind{std::uint16_t(word >> 16 * i)});
  }
};
template <>
struct Operand<float> {
  static constexpr State kState = kInMmaTf32;
  static constexpr unsigned kValues = 1;
  static float value(std::uint32_t word, unsigned) {
    return float_of(word & ~std::uint32_t(0x1fff));
  }
};

struct Fiber {
  jmp_buf at;  // where to resume, once started
  unsigned block, index;
  bool is_started = false;
  State state = kCanRun;
  const std::uint64_t* flag = nullptr;  // the flag that the fiber waits for, or null
  std::uint64_t at_least = 0;
  Fiber* next_waiter = nullptr;  // next fiber that waits for the same flag
};

struct Warp {
  // Data exchanged between lanes: values of a shuffle, or the matrices of an mma.
  struct Exchange {
    float lane[kWarp];
    float a[16][16];  // [row, k]
    float b[8][16];   // [column, k]
  };

  std::uint32_t ready = 0;  // one bit per lane
  State meeting = kCanRun;  // the barrier at which the arrived lanes wait
  unsigned arrived = 0;
  unsigned returned = 0;
  // One for even barriers and one for odd ones. When a lane writes one again, all lanes have passed
  // the barrier in between and have read it.
  unsigned meetings = 0;
  Exchange exchange[2];
};

struct Block {
  Block(unsigned warps, unsigned patience) : warp(warps), candidates(warps, patience) {}

  std::vector<Warp> warp;
  Candidates candidates;  // warps with runnable lanes
  unsigned in_sync = 0;
  unsigned returned = 0;
};

class Grid {
 public:
  using Call = void (*)(const void* kernel, Grid& grid, Fiber& fiber);

  Grid(const Launch& launch, Call call, const void* kernel)
      : launch_(launch),
        call_(call),
        kernel_(kernel),
        random_(launch.seed),
        // Drawn once per grid, so that some seeds switch between blocks (warps) at every turn.
        candidates_(launch.blocks, random_.below(17)),
        shared_stride_((launch.shared_bytes + kMarginBytes + sizeof(Line) - 1) / sizeof(Line)) {
    if (launch.threads_a_block == 0 || launch.threads_a_block % kWarp != 0)
      throw std::runtime_error("a block must have a multiple of 32 threads");
    if (running() != nullptr) throw std::runtime_error("a kernel cannot run another one");
    const std::size_t threads = std::size_t(launch.blocks) * launch.threads_a_block;
    stacks().reserve(threads);
    shared_.resize(launch.blocks * shared_stride_);
    if (!shared_.empty()) std::memset(shared_.data(), kPoison, shared_.size() * sizeof(Line));
    const unsigned patience = random_.below(11);
    block_.assign(launch.blocks, Block(launch.threads_a_block / kWarp, patience));
    fiber_.resize(threads);
    for (std::size_t i = 0; i < threads; ++i) {
      fiber_[i].block = unsigned(i / launch.threads_a_block);
      fiber_[i].index = unsigned(i % launch.threads_a_block);
    }
  }

  // Runs until every thread has returned or one has failed.
  void run() {
    for (unsigned block = 0; block < launch_.blocks; ++block)
      for (unsigned warp = 0; warp < block_[block].warp.size(); ++warp)
        make_ready(block, warp, ~std::uint32_t(0));
    if (Fiber* first = pick()) {
      running() = this;
      change_to(*first, home_);
      running() = nullptr;
    }
    if (thrown_) std::rethrow_exception(thrown_);
    if (!failure_.empty()) throw std::runtime_error(failure_);
    check_that_all_returned();
    check_margins();
  }

  char* shared(const Fiber& fiber) {
    return reinterpret_cast<char*>(shared_.data() + fiber.block * shared_stride_);
  }
  Warp& warp_of(const Fiber& fiber) { return block_[fiber.block].warp[fiber.index / kWarp]; }

  // The exchange of the next barrier of the warp. Its content stays valid until the barrier after
  // the next one.
  Warp::Exchange& exchange_of(const Fiber& fiber) {
    Warp& warp = warp_of(fiber);
    return warp.exchange[warp.meetings % 2];
  }

  // Waits until all threads of the warp (for sync: of the block) have arrived.
  void meet(Fiber& fiber, State where) {
    Block& block = block_[fiber.block];
    Warp& warp = warp_of(fiber);
    if (warp.arrived != 0 && warp.meeting != where)
      fail(name(fiber) + " waits " + kWhere[where] + ", others of its warp " +
           kWhere[warp.meeting]);
    if (warp.returned != 0 || (where == kInSync && block.returned != 0))
      fail(name(fiber) + " waits " + kWhere[where] + " for threads that have returned");
    fiber.state = warp.meeting = where;
    ++warp.arrived;
    if (where != kInSync) {
      if (warp.arrived == kWarp) end_meeting(fiber.block, fiber.index / kWarp);
    } else if (++block.in_sync == launch_.threads_a_block) {
      block.in_sync = 0;
      for (unsigned i = 0; i < block.warp.size(); ++i) end_meeting(fiber.block, i);
    }
    suspend(fiber);
  }

  void wait(Fiber& fiber, const std::uint64_t* flag, std::uint64_t at_least) {
    rest(fiber);
    if (*flag >= at_least) return;
    Fiber*& waiters = waiters_[flag];
    fiber.state = kAwaitsFlag;
    fiber.flag = flag;
    fiber.at_least = at_least;
    fiber.next_waiter = waiters;
    waiters = &fiber;
    suspend(fiber);
  }

  void publish(Fiber& fiber, std::uint64_t* flag, std::uint64_t value) {
    rest(fiber);
    *flag = value;
    const auto found = waiters_.find(flag);
    if (found != waiters_.end()) {
      Fiber** link = &found->second;
      while (Fiber* waiter = *link) {
        if (value < waiter->at_least) {
          link = &waiter->next_waiter;
          continue;
        }
        *link = waiter->next_waiter;
        make_ready(*waiter);
      }
    }
    rest(fiber);
  }

  // Occasionally lets other fibers run where no synchronisation requires it.
  void rest(Fiber& fiber) {
    if (random_.next() % 8 != 0) return;
    make_ready(fiber);
    suspend(fiber);
  }

  // Ends the run of the grid and abandons its fibers.
  [[noreturn]] void fail(std::string sentence) {
    failure_ = std::move(sentence);
    fastrnn_test_jump(home_, 1);
  }

  static std::string name(const Fiber& fiber) {
    return "thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block);
  }

 private:
  struct alignas(16) Line {
    char byte[16];
  };

  static Stacks& stacks() {
    static thread_local Stacks stacks;
    return stacks;
  }
  // The grid that runs on this OS thread, or null.
  static Grid*& running() {
    static thread_local Grid* running = nullptr;
    return running;
  }

  void make_ready(unsigned block, unsigned warp, std::uint32_t lanes) {
    Block& of = block_[block];
    if (of.candidates.empty()) candidates_.add(block);
    if (of.warp[warp].ready == 0) of.candidates.add(warp);
    of.warp[warp].ready |= lanes;
  }
  void make_ready(Fiber& fiber) {
    fiber.state = kCanRun;
    make_ready(fiber.block, fiber.index / kWarp, std::uint32_t(1) << fiber.index % kWarp);
  }
  void end_meeting(unsigned block, unsigned warp) {
    Warp& of = block_[block].warp[warp];
    of.arrived = 0;
    ++of.meetings;
    Fiber* lanes = &fiber_[std::size_t(block) * launch_.threads_a_block + warp * kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) lanes[lane].state = kCanRun;
    make_ready(block, warp, ~std::uint32_t(0));
  }

  // Returns the fiber to run next, or null if none can run.
  Fiber* pick() {
    if (candidates_.empty()) return nullptr;
    const unsigned block = candidates_.pick(random_);
    Block& of = block_[block];
    const unsigned warp = of.candidates.pick(random_);
    std::uint32_t& ready = of.warp[warp].ready;
    // The first runnable lane from a random one on.
    const unsigned from = random_.below(kWarp);
    const std::uint32_t turned = ready >> from | ready << (kWarp - from) % kWarp;
    const unsigned lane = (from + unsigned(__builtin_ctz(turned))) % kWarp;
    ready &= ~(std::uint32_t(1) << lane);
    if (ready == 0) {
      of.candidates.remove(warp);
      if (of.candidates.empty()) candidates_.remove(block);
    }
    return &fiber_[std::size_t(block) * launch_.threads_a_block + warp * kWarp + lane];
  }

  // Lets other fibers run. Returns when this fiber is resumed.
  void suspend(Fiber& fiber) {
    Fiber* const next = pick();
    if (next == &fiber) return;
    if (next == nullptr) fastrnn_test_jump(home_, 1);
    change_to(*next, fiber.at);
  }

  // ucontext only starts a fiber, because each switch by ucontext makes a system call for the
  // signal mask. Not inlined, so that the caller keeps no values in registers that a jump may lose.
  __attribute__((noinline)) void change_to(Fiber& fiber, jmp_buf from) {
    if (_setjmp(from) != 0) return;
    if (fiber.is_started) fastrnn_test_jump(fiber.at, 1);
    start(fiber);
  }
  __attribute__((noinline)) void start(Fiber& fiber) {
    fiber.is_started = true;
    starting_ = &fiber;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks().of(std::size_t(&fiber - fiber_.data()));
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Grid::enter, 0);
    setcontext(&context);
  }
  static void enter() {
    Grid& grid = *running();
    grid.live(*grid.starting_);
  }
  [[noreturn]] void live(Fiber& fiber) {
    try {
      call_(kernel_, *this, fiber);
    } catch (...) {
      thrown_ = std::current_exception();
    }
    if (thrown_) fastrnn_test_jump(home_, 1);
    Block& block = block_[fiber.block];
    Warp& warp = warp_of(fiber);
    if (warp.arrived != 0 || block.in_sync != 0)
      fail(name(fiber) + " has returned, others wait for it " +
           kWhere[warp.arrived != 0 ? warp.meeting : kInSync]);
    fiber.state = kReturned;
    ++warp.returned;
    ++block.returned;
    suspend(fiber);
    __builtin_unreachable();
  }

  void check_that_all_returned() const {
    std::size_t count[kStates] = {};
    const Fiber* waiter = nullptr;
    for (const Fiber& fiber : fiber_) {
      ++count[fiber.state];
      if (fiber.state == kAwaitsFlag) waiter = &fiber;
    }
    if (count[kReturned] == fiber_.size()) return;
    std::string sentence = "no thread can run:";
    for (int state = 0; state < kReturned; ++state)
      if (count[state] != 0)
        sentence += " " + std::to_string(count[state]) + " wait " + kWhere[state] + ",";
    sentence += " " + std::to_string(count[kReturned]) + " have returned";
    if (waiter != nullptr)
      sentence += "; " + name(*waiter) + " waits for " + std::to_string(waiter->at_least) +
                  " where there is " + std::to_string(*waiter->flag);
    throw std::runtime_error(sentence);
  }
  void check_margins() const {
    for (unsigned block = 0; block < launch_.blocks; ++block) {
      const char* shared = reinterpret_cast<const char*>(&shared_[block * shared_stride_]);
      for (std::size_t i = launch_.shared_bytes; i < launch_.shared_bytes + kMarginBytes; ++i)
        if (shared[i] != char(kPoison))
          throw std::runtime_error("block " + std::to_string(block) + " wrote beyond its " +
                                   std::to_string(launch_.shared_bytes) +
                                   " bytes of shared memory");
    }
  }

  const Launch launch_;
  const Call call_;
  const void* const kernel_;
  Random random_;
  Candidates candidates_;            // blocks with runnable threads
  const std::size_t shared_stride_;  // in lines
  std::vector<Line> shared_;         // [blocks, shared_stride_]
  std::vector<Block> block_;
  std::vector<Fiber> fiber_;  // [blocks, threads_a_block]
  std::unordered_map<const std::uint64_t*, Fiber*> waiters_;
  jmp_buf home_;  // where run() continues on the OS thread
  Fiber* starting_ = nullptr;
  std::string failure_;
  std::exception_ptr thrown_;
};

// The thread interface that a kernel sees.
class HostThread {
 public:
  HostThread(Grid& grid, Fiber& fiber) : grid_(grid), fiber_(fiber) {}

  unsigned index() const { return fiber_.index; }  // within the block
  unsigned block() const { return fiber_.block; }  // within the grid
  char* shared() const { return grid_.shared(fiber_); }

  int uniform(int value) const { return value; }  // value must be equal in all lanes

  void sync() { grid_.meet(fiber_, kInSync); }
  void sync_warp() { grid_.meet(fiber_, kInSyncWarp); }

  float shuffle_xor(float value, unsigned mask) {
    if (mask >= kWarp)
      grid_.fail(Grid::name(fiber_) +
                 " shuffles with a mask beyond the warp: " + std::to_string(mask));
    Warp::Exchange& exchange = grid_.exchange_of(fiber_);
    const unsigned lane = fiber_.index % kWarp;
    exchange.lane[lane] = value;
    grid_.meet(fiber_, kInShuffle);
    return exchange.lane[lane ^ mask];
  }

  Quad load(const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % sizeof(Quad) != 0)
      grid_.fail(Grid::name(fiber_) + " loads 16 bytes from an address that is no multiple of 16");
    grid_.rest(fiber_);
    Quad quad;
    std::memcpy(&quad, from, sizeof(quad));
    return quad;
  }

  // Returns once *flag >= at_least.
  void wait(const std::uint64_t* flag, std::uint64_t at_least) {
    grid_.wait(fiber_, flag, at_least);
  }
  // Sets *flag = value and wakes the fibers that wait for it. Any other write wakes no fiber.
  void publish(std::uint64_t* flag, std::uint64_t value) { grid_.publish(fiber_, flag, value); }

  // d += a b of a warp. Kind: Float16, BFloat16 (m16n8k16) or float (m16n8k8, as TF32). Products
  // are exact and summed over ascending k.
  template <class Kind>
  void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    constexpr unsigned kValues = Operand<Kind>::kValues, kDepth = 8 * kValues;
    const unsigned g = fiber_.index % kWarp / 4, q = fiber_.index % 4;
    Warp::Exchange& exchange = grid_.exchange_of(fiber_);
    for (unsigned i = 0; i < kValues; ++i) {
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned k = kValues * q + 4 * kValues * half + i;
        exchange.a[g][k] = Operand<Kind>::value(a[2 * half], i);
        exchange.a[g + 8][k] = Operand<Kind>::value(a[2 * half + 1], i);
        exchange.b[g][k] = Operand<Kind>::value(b[half], i);
      }
    }
    grid_.meet(fiber_, Operand<Kind>::kState);
    for (unsigned i = 0; i < 4; ++i) {
      const float* row = exchange.a[g + i / 2 * 8];
      const float* column = exchange.b[2 * q + i % 2];
      for (unsigned k = 0; k < kDepth; ++k) d[i] += row[k] * column[k];
    }
  }

 private:
  Grid& grid_;
  Fiber& fiber_;
};

// Runs kernel(thread) for every thread of the grid. Throws std::runtime_error on a deadlock (see
// Grid::meet) and on misuse of a HostThread, and passes on exceptions of the kernel. Local
// variables of threads that have not returned are not destroyed then.
template <class Kernel>
void run(const Launch& launch, const Kernel& kernel) {
  const auto call = [](const void* kernel, Grid& grid, Fiber& fiber) {
    HostThread thread(grid, fiber);
    (*static_cast<const Kernel*>(kernel))(thread);
  };
  Grid(launch, call, &kernel).run();
}

}  // namespace fastrnn::test
