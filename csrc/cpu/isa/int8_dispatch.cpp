// The int8 kernels that were compiled in, and those that this machine runs. The rule that chooses
// between them is pick_int8_kernels in plan.cpp.
#include <stdexcept>

#include "cpu/isa/amx.h"
#include "cpu/isa/int8.h"
#include "cpu/runtime/settings.h"

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
namespace amx_int8 {
extern const Int8Kernels kInt8Kernels;
}
namespace amx_int8_emulated {
extern const Int8Kernels kInt8Kernels;
}
#endif

namespace {

struct Row {
  const Int8Kernels* kernels;
  bool (*runs_here)();    // besides its instruction set
  bool emulates = false;  // for tests: runs everywhere, slowly
};

// The slowest first, except for the emulation.
const Row kRows[] = {
    {&baseline::kInt8Kernels, [] { return true; }},
#if defined(__x86_64__)
    {&avx2::kInt8Kernels, [] { return true; }},
    {&avx512::kInt8Kernels, [] { return true; }},
    {&avx512_vnni::kInt8Kernels, [] { return bool(__builtin_cpu_supports("avx512vnni")); }},
    {&amx_int8_emulated::kInt8Kernels, [] { return true; }, true},
    {&amx_int8::kInt8Kernels, has_amx_int8},
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
  const std::string name = isa().name;
  const Int8Kernels* chosen = nullptr;
  for (const Row& row : kRows)
    if (name == row.kernels->isa && !row.kernels->tiles && row.runs_here()) chosen = row.kernels;
  if (chosen == nullptr) throw std::runtime_error("fastrnn: " + name + " has no int8 kernels.");
  return *chosen;
}

const Int8Kernels* int8_tile_kernels() {
  static const bool emulates = emulate_amx_setting();
  const std::string name = isa().name;
  for (const Row& row : kRows)
    if (row.kernels->tiles && (!row.emulates || emulates) && name == row.kernels->isa &&
        row.runs_here())
      return row.kernels;
  return nullptr;
}

const Int8Kernels* forced_int8_kernels() { return forced.load(std::memory_order_relaxed); }

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

void int8_sums(const std::uint8_t* bytes, const std::int32_t* zero_points, std::int64_t rows,
               const std::int8_t* panel, const std::int32_t* sums, std::int64_t quads, int gates,
               std::int32_t* sums_out) {
  const std::int64_t row = quads * kInt8Depth, stride = divide_up(row, 64) * 64;
  std::vector<std::uint8_t> padded(std::size_t(rows * stride), 255);
  for (std::int64_t m = 0; m < rows; ++m)
    std::copy(bytes + m * row, bytes + (m + 1) * row, padded.begin() + m * stride);
  std::vector<std::int8_t> rest(std::size_t(gates * kInt8RestBytes));
  const Int8Kernels* chosen = forced_int8_kernels();
  const Int8Kernels& kernels = chosen != nullptr ? *chosen : int8_kernels();
  kernels.sums({padded.data(), stride, zero_points, rows, panel, rest.data(), sums, quads}, gates,
               sums_out);
}

}  // namespace fastrnn::cpu
