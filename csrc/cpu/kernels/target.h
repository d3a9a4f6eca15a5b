// The instruction set that a kernel header is compiled for. The source files in cpu/isa/ include
// the kernels once each, after they have defined:
//
//   FASTRNN_ISA            the instruction set's name, which becomes its namespace
//   FASTRNN_TARGET         features that the compiler may use; undefined: the baseline
//   FASTRNN_VECTOR_BYTES   size of a vector
//   FASTRNN_REGISTERS      number of vector registers
//
// Every kernel header puts its code between FASTRNN_KERNELS_BEGIN and FASTRNN_KERNELS_END, which
// open the namespace and the compiler's target region. #include lines stay outside: inline
// functions of the standard library and of plain headers are shared by the whole program and must
// run on every machine. CI checks the object files for functions that break this rule.
//
// An editor that opens one kernel header sees it compiled for the baseline.
#pragma once

#if !defined(FASTRNN_ISA)
#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTRNN_PRAGMA_QUOTED(...) _Pragma(#__VA_ARGS__)
#define FASTRNN_PRAGMA(...) FASTRNN_PRAGMA_QUOTED(__VA_ARGS__)
#if !defined(FASTRNN_TARGET)
#define FASTRNN_TARGET_BEGIN
#define FASTRNN_TARGET_END
#elif defined(__clang__)
#define FASTRNN_TARGET_BEGIN \
  FASTRNN_PRAGMA(clang attribute push(__attribute__((target(FASTRNN_TARGET))), apply_to = function))
#define FASTRNN_TARGET_END FASTRNN_PRAGMA(clang attribute pop)
#else
#define FASTRNN_TARGET_BEGIN \
  FASTRNN_PRAGMA(GCC push_options) FASTRNN_PRAGMA(GCC target(FASTRNN_TARGET))
#define FASTRNN_TARGET_END FASTRNN_PRAGMA(GCC pop_options)
#endif

#define FASTRNN_KERNELS_BEGIN \
  FASTRNN_TARGET_BEGIN        \
  namespace fastrnn::cpu {    \
  namespace FASTRNN_ISA {
#define FASTRNN_KERNELS_END \
  }                         \
  }                         \
  FASTRNN_TARGET_END

// Cells are templates over the vector type, so their instances belong to the instruction set.
FASTRNN_TARGET_BEGIN
#include "cells/loop_cells.h"
#include "cells/registry.h"
#include "cells/scan_registry.h"
FASTRNN_TARGET_END

#include "cpu/isa/isa.h"
