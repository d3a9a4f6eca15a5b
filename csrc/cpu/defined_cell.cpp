// The cells of a process: those of the registry, and those that were defined at run time.
#include "cpu/defined_cell.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace fastrnn::cpu {
namespace {

constexpr int kMostIsas = 4;
constexpr int kMostDefinedCells = 1024;

struct Entry {
  CellInfo info;
  std::atomic<const DefinedKernels*> kernels[kMostIsas];  // from the first on; null: no more
};

// Entries are added and never removed, so readers need no lock.
std::atomic<Entry*> entries[kMostDefinedCells];
std::atomic<int> entry_count{0};
std::mutex adding;

Entry* find_entry(const std::string& name) {
  const int count = entry_count.load(std::memory_order_acquire);
  for (int i = 0; i < count; ++i) {
    Entry* entry = entries[i].load(std::memory_order_relaxed);
    if (name == entry->info.name) return entry;
  }
  return nullptr;
}

const DefinedKernels* find_kernels(const Entry& entry, const Isa& isa) {
  for (const auto& slot : entry.kernels) {
    const DefinedKernels* kernels = slot.load(std::memory_order_acquire);
    if (kernels != nullptr && std::strcmp(kernels->isa, isa.name) == 0) return kernels;
  }
  return nullptr;
}

const DefinedKernels* find_kernels(const Isa& isa, CellKind cell) {
  return find_kernels(*entries[static_cast<int>(cell) - kCellCount].load(), isa);
}

bool equal(const CellInfo& a, const CellInfo& b) {
  return a.gates == b.gates && a.pre == b.pre && a.saved == b.saved && a.states == b.states &&
         a.saved_state == b.saved_state && a.parameters == b.parameters && a.dense == b.dense &&
         a.computes_rows == b.computes_rows && a.saved_rows == b.saved_rows &&
         a.forward_buffers == b.forward_buffers && a.backward_buffers == b.backward_buffers &&
         std::equal(a.pre_x, a.pre_x + a.gates, b.pre_x);
}

[[noreturn]] void reject(const std::string& path, const std::string& reason) {
  throw std::invalid_argument("the library " + path + " has no usable cell: " + reason + ".");
}

}  // namespace

const CellInfo* find_cell(const std::string& name) {
  for (const CellInfo& info : kCells)
    if (name == info.name) return &info;
  const Entry* entry = find_entry(name);
  return entry == nullptr ? nullptr : &entry->info;
}

std::string cell_names() {
  std::string names;
  for (const CellInfo& info : kCells) names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

bool has_defined_cell(const std::string& name) {
  const Entry* entry = find_entry(name);
  return entry != nullptr && find_kernels(*entry, isa()) != nullptr;
}

void check_kernels(const Isa& isa, CellRef cell) {
  if (!is_defined_at_run_time(cell.info()) || find_kernels(isa, cell) != nullptr) return;
  throw std::invalid_argument("fastrnn: the cell " + std::string(cell.info().name) +
                              " was not compiled for the instruction set " + isa.name + ".");
}

template <class T>
const Walk<T>& defined_walk(const Isa& isa, CellKind cell) {
  const DefinedKernels* kernels = find_kernels(isa, cell);
  if constexpr (sizeof(T) == 4) {
    return kernels->of_float;
  } else {
    return kernels->of_double;
  }
}
template const Walk<float>& defined_walk<float>(const Isa&, CellKind);
template const Walk<double>& defined_walk<double>(const Isa&, CellKind);

void add_defined_cell(const std::string& path, const std::string& headers) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) reject(path, dlerror());
  const auto* own_headers = static_cast<const char*>(dlsym(library, kDefinedCellHeadersSymbol));
  const auto* cell = static_cast<const DefinedCell*>(dlsym(library, kDefinedCellSymbol));
  if (own_headers == nullptr || cell == nullptr) {
    dlclose(library);
    reject(path, "it was not compiled by fastrnn.define_cell");
  }
  if (headers != own_headers) {
    const std::string found = own_headers;
    dlclose(library);
    reject(path, "it was compiled against the headers " + found + ", and fastrnn was compiled " +
                     "with the headers " + headers);
  }
  const std::lock_guard<std::mutex> lock(adding);
  Entry* entry = find_entry(cell->info.name);
  if (entry == nullptr) {
    for (const CellInfo& info : kCells)
      if (std::strcmp(info.name, cell->info.name) == 0)
        reject(path, "its name, " + std::string(info.name) + ", is that of a cell of fastrnn");
    const int index = entry_count.load();
    if (index == kMostDefinedCells)
      reject(path, std::to_string(kMostDefinedCells) + " cells were defined before");
    entry = new Entry{cell->info, {}};
    entry->info.kind = static_cast<CellKind>(kCellCount + index);
    entries[index].store(entry);
    entry->kernels[0].store(&cell->kernels);
    entry_count.store(index + 1, std::memory_order_release);
    return;
  }
  if (!equal(entry->info, cell->info))
    reject(path, "another cell has the name " + std::string(cell->info.name));
  for (auto& slot : entry->kernels) {
    const DefinedKernels* kernels = slot.load();
    if (kernels != nullptr && std::strcmp(kernels->isa, cell->kernels.isa) == 0) return;
    if (kernels != nullptr) continue;
    slot.store(&cell->kernels, std::memory_order_release);
    return;
  }
}

}  // namespace fastrnn::cpu
