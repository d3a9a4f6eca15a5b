// Whether this process may use AMX.
#include "cpu/isa/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Bits of cpuid 7.0, edx.
constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;

// The CPU multiplies tiles of a type, and its tile registers are as tile_registers.h expects: 8
// registers of 16 rows of 64 bytes (palette 1).
bool cpu_has_amx(unsigned type) {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & type) == 0 || (d & kTile) == 0)
    return false;
  if (__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) == 0) return false;
  const unsigned row_bytes = b & 0xffff, registers = b >> 16, rows = c & 0xffff;
  return row_bytes >= 64 && registers >= 8 && rows >= 16;
}

// The operating system saves the tile registers of a thread.
bool system_saves_tiles() {
  constexpr unsigned kOsxsave = 1u << 27;               // cpuid 1, ecx
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;  // XCR0: configuration and data
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState;
}

// Linux gives the tile registers only to processes that ask for them, because they make the saved
// state of a thread larger. It refuses where a thread has a small stack for signals, or under a
// filter of system calls. The permission is for all threads and for forked processes.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Asks once per process, and remembers a refusal.
bool may_use_tiles() {
  static const bool yes = system_saves_tiles() && request_tiles();
  return yes;
}
#endif

}  // namespace

#if defined(__x86_64__) && defined(__linux__)
bool has_amx_bf16() {
  static const bool yes = cpu_has_amx(kBf16) && may_use_tiles();
  return yes;
}
bool has_amx_int8() {
  static const bool yes = cpu_has_amx(kInt8) && may_use_tiles();
  return yes;
}
#else
bool has_amx_bf16() { return false; }
bool has_amx_int8() { return false; }
#endif

}  // namespace fastrnn::cpu
