// Kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/isa/avx2_target.h"

#include "cpu/kernels/bfloat16/table.h"
#include "cpu/kernels/table.h"
#endif
