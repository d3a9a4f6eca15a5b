// Kernels for x86-64 with AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#define FASTRNN_ISA avx512
#define FASTRNN_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "cpu/kernels/bfloat16/table.h"
#include "cpu/kernels/table.h"
#endif
