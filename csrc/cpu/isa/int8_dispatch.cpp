// Chooses the int8 kernels: the fastest ones of the instruction set in use that this machine runs.
#include <stdexcept>

#include "cpu/isa/int8.h"

namespace fastrnn::cpu {

namespace baseline {
extern const Int8Kernels kInt8Kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Int8Kernels kInt8Kernels;
}
namespace avx512 {
extern const Int8Kernels kInt8Kernels;
}
namespace avx512_vnni {
extern const Int8Kernels kInt8Kernels;
}
#endif

namespace {

struct Row {
  const Int8Kernels* kernels;
  bool (*runs_here)();  // besides its instruction set
};

// The slowest first.
const Row kRows[] = {
    {&baseline::kInt8Kernels, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kInt8Kernels, [] { return true; }},
    {&avx512::kInt8Kernels, [] { return true; }},
    {&avx512_vnni::kInt8Kernels, [] { return bool(__builtin_cpu_supports("avx512vnni")); }},
#endif
};

bool is_available(const Row& row) {
  for (const std::string& name : available_isas())
    if (name == row.kernels->isa) return row.runs_here();
  return false;
}

std::atomic<const Int8Kernels*> forced{nullptr};

}  // namespace

const Int8Kernels& int8_kernels() {
  const Int8Kernels* chosen = forced.load(std::memory_order_relaxed);
  if (chosen != nullptr) return *chosen;
  const std::string name = isa().name;
  for (const Row& row : kRows)
    if (name == row.kernels->isa && row.runs_here()) chosen = row.kernels;
  if (chosen == nullptr) throw std::runtime_error("fastrnn: " + name + " has no int8 kernels.");
  return *chosen;
}

std::vector<std::string> available_int8_kernels() {
  std::vector<std::string> names;
  for (const Row& row : kRows)
    if (is_available(row)) names.push_back(row.kernels->name);
  return names;
}

bool set_int8_kernels(const std::string& name) {
  if (name.empty()) {
    forced.store(nullptr);
    return true;
  }
  for (const Row& row : kRows) {
    if (name != row.kernels->name || !is_available(row)) continue;
    forced.store(row.kernels);
    return true;
  }
  return false;
}

std::string int8_kernels_in_use() { return int8_kernels().name; }

void int8_sums(const std::uint8_t* bytes, const std::int32_t* zero_points, std::int64_t rows,
               const std::int8_t* panel, const std::int32_t* sums, std::int64_t quads, int gates,
               std::int32_t* sums_out) {
  int8_kernels().sums(bytes, zero_points, rows, panel, sums, quads, gates, sums_out);
}

}  // namespace fastrnn::cpu
