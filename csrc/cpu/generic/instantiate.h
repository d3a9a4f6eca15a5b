// The generic text, once for the instruction set that the including file names with
//   FASTRNN_ISA            its namespace and name
//   FASTRNN_TARGET         what the compiler may use (undefined: what it may use anyway)
//   FASTRNN_VECTOR_BYTES, FASTRNN_REGISTERS
//
// Only code in regions of that target uses the instruction set: the cells' templates, whose
// instances carry this namespace's Pack in their names, and the generic text itself. Everything
// else (the standard library, the plain headers) is seen outside of them, since its inline
// functions belong to the whole program and must run on every machine. A test looks at the object
// files.

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

#define FASTRNN_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define FASTRNN_PRAGMA(...) FASTRNN_PRAGMA_TEXT(__VA_ARGS__)
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

FASTRNN_TARGET_BEGIN
#include "../../cells/cells.h"
FASTRNN_TARGET_END

#include "../isa.h"

FASTRNN_TARGET_BEGIN
namespace fastrnn::cpu::FASTRNN_ISA {

#include "pack.h"

#include "lanes.h"

#include "tile.h"

#include "dot.h"

#include "panels.h"

#include "half.h"

#include "forward.h"

#include "backward.h"

#include "gradients.h"

#include "peak.h"

#include "table.h"

}  // namespace fastrnn::cpu::FASTRNN_ISA
FASTRNN_TARGET_END
