// Kernels for x86-64 with AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#include "cpu/isa/avx512_target.h"

#include "cpu/kernels/bfloat16/table.h"
#include "cpu/kernels/table.h"
#endif
