// Compiles the kernels of a cell that a program defines at run time, for one instruction set:
//
//     #include "cpu/isa/avx512_target.h"
//     #include "cpu/kernels/defined_cell.h"
//     FASTRNN_TARGET_BEGIN
//     ...the struct of the cell, as cells/contract.h describes it
//     FASTRNN_TARGET_END
//     FASTRNN_DEFINE_CELL(type, "name")
//
// FASTRNN_HEADERS: the hash of these headers, a string.
#pragma once

#include "cpu/kernels/rows/walk.h"
#include "cpu/kernels/vector/square_root.h"
// after them, because the kernels include cells/ in their target region
#include "cpu/defined_cell.h"

// Functions of defined cells, which belong to the instruction set as those of cells/math.h do.
FASTRNN_TARGET_BEGIN
#include "cells/more_math.h"
FASTRNN_TARGET_END

#define FASTRNN_QUOTED_NAME(name) #name
#define FASTRNN_QUOTED(name) FASTRNN_QUOTED_NAME(name)

#define FASTRNN_DEFINE_CELL(type, name)                                                      \
  static_assert(::fastrnn::cells::check_cell<type>());                                       \
  FASTRNN_KERNELS_BEGIN                                                                      \
  constexpr DefinedKernels kDefinedKernels = {                                               \
      FASTRNN_QUOTED(FASTRNN_ISA), walk_of_any<type, float>(), walk_of_any<type, double>()}; \
  FASTRNN_KERNELS_END                                                                        \
  extern "C" FASTRNN_EXPORT const char fastrnn_defined_cell_headers[];                       \
  extern "C" FASTRNN_EXPORT const fastrnn::cpu::DefinedCell fastrnn_defined_cell;            \
  const char fastrnn_defined_cell_headers[] = FASTRNN_HEADERS;                               \
  const fastrnn::cpu::DefinedCell fastrnn_defined_cell = {                                   \
      ::fastrnn::make_cell_info<type>(::fastrnn::CellKind(0), name),                         \
      fastrnn::cpu::FASTRNN_ISA::kDefinedKernels};
