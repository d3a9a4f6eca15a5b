// The cells of the CPU operators: those of the registry, and those that were defined at run time.
#include "cpu/api.h"
#include "torch/arguments.h"

namespace fastrnn {

const CellInfo* find_cell(const std::string& name) {
  const CellInfo* info = cpu::find_cell(name);
  if (info == nullptr)
    throw_error("cell must be one of ", cpu::cell_names(), ", got '", name, "'.");
  return info;
}

}  // namespace fastrnn
