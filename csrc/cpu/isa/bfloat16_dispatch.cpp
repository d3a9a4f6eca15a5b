// The bfloat16 kernels that were compiled in, and those that this machine runs. The rule that
// chooses between them is pick_bfloat16_kernels in plan.cpp.
#include "cpu/isa/bfloat16.h"

#include "cpu/isa/amx.h"
#include "cpu/runtime/settings.h"

namespace fastrnn::cpu {

#if defined(__x86_64__)
namespace avx2 {
extern const Bfloat16Kernels kBfloat16Kernels;
}
namespace avx512 {
extern const Bfloat16Kernels kBfloat16Kernels;
}
namespace avx512_bf16 {
extern const Bfloat16Kernels kBfloat16Kernels;
}
namespace amx_bf16 {
extern const Bfloat16Kernels kBfloat16Kernels;
}
namespace amx_bf16_emulated {
extern const Bfloat16Kernels kBfloat16Kernels;
}
#endif

namespace {

struct Row {
  const Bfloat16Kernels* kernels;
  bool (*runs_here)();    // besides its instruction set
  bool emulates = false;  // for tests: runs everywhere, slowly
};

// The slowest first. (A vector, because it is empty on other architectures.)
const std::vector<Row>& rows() {
  static const std::vector<Row> all = {
#if defined(__x86_64__)
      {&avx2::kBfloat16Kernels, [] { return true; }},
      {&avx512::kBfloat16Kernels, [] { return true; }},
      {&avx512_bf16::kBfloat16Kernels, [] { return bool(__builtin_cpu_supports("avx512bf16")); }},
      {&amx_bf16_emulated::kBfloat16Kernels, [] { return true; }, true},
      {&amx_bf16::kBfloat16Kernels, has_amx_bf16},
#endif
  };
  return all;
}

// Stands for float32 copies where these are forced.
const Bfloat16Kernels kFloat32Copies{};

std::atomic<const Bfloat16Kernels*> forced{nullptr};

// Whether the kernels belong to the instruction set in use and run here.
bool is_available(const Row& row) {
  return row.kernels->isa == std::string(isa().name) && row.runs_here();
}

}  // namespace

const Bfloat16Kernels* bfloat16_kernels(Bfloat16Product product) {
  static const bool emulates = emulate_amx_setting();
  for (const Row& row : rows())
    if (row.kernels->product == product && (!row.emulates || emulates) && is_available(row))
      return row.kernels;
  return nullptr;
}

bool forced_bfloat16_kernels(const Bfloat16Kernels** kernels) {
  const Bfloat16Kernels* found = forced.load(std::memory_order_relaxed);
  *kernels = found == &kFloat32Copies ? nullptr : found;
  return found == &kFloat32Copies || (found != nullptr && found->isa == std::string(isa().name));
}

std::vector<std::string> available_bfloat16_kernels() {
  std::vector<std::string> names;
  for (const Row& row : rows())
    if (is_available(row)) names.emplace_back(row.kernels->name);
  return names;
}

bool set_bfloat16_kernels(const std::string& name) {
  const Bfloat16Kernels* chosen = name == "float32" ? &kFloat32Copies : nullptr;
  for (const Row& row : rows())
    if (name == row.kernels->name && is_available(row)) chosen = row.kernels;
  if (chosen == nullptr && !name.empty()) return false;
  forced.store(chosen);
  return true;
}

}  // namespace fastrnn::cpu
