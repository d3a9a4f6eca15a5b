// Kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define FASTRNN_ISA avx2
#define FASTRNN_TARGET "avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#include "cpu/kernels/bfloat16/table.h"
#include "cpu/kernels/table.h"
#endif
