// Cells that a program defines at run time: what a library that contains one exports.
// cpu/kernels/defined_cell.h compiles such a library from the header of a cell.
#pragma once

#include "cpu/isa/isa.h"

namespace fastrnn::cpu {

// The kernels of a cell for one instruction set.
struct DefinedKernels {
  const char* isa;  // name of the instruction set
  Walk<float> of_float;
  Walk<double> of_double;
};

// The library exports an object of this type as kDefinedCellSymbol. `info.kind` is meaningless in
// the library: the program that loads it numbers the cell.
struct DefinedCell {
  CellInfo info;
  DefinedKernels kernels;
};
constexpr const char* kDefinedCellSymbol = "fastrnn_defined_cell";
// The hash of the headers that the library was compiled against, a char array. It is compared
// before anything else is read, because other headers may lay out DefinedCell in another way.
constexpr const char* kDefinedCellHeadersSymbol = "fastrnn_defined_cell_headers";

}  // namespace fastrnn::cpu
