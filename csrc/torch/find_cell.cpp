// The cells of the CPU operators: those of the registry, and those that were defined at run time.
#include "cpu/api.h"
#include "torch/arguments.h"

namespace fastrnn {

const CellInfo* find_cell(const std::string& name) {
  const CellInfo* info = cpu::find_cell(name);
  // A defined cell's name ends with a hash (fastrnn/define/cell.py).
  const std::size_t hash = name.rfind('_');
  if (info == nullptr && hash != std::string::npos && name.size() - hash == 13)
    throw_error(
        "cell '", name, "' must be loaded before it runs, got a cell of ",
        "fastrnn.define_cell of which this process has no layer. Make a layer of its class ",
        "first; an exported program does not contain the kernels.");
  if (info == nullptr)
    throw_error("cell must be one of ", cpu::cell_names(), ", got '", name, "'.");
  return info;
}

}  // namespace fastrnn
