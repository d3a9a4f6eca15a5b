// Bfloat16 kernels for x86-64 with AVX-512 and AVX512_BF16. All else is in avx512.cpp.
#if defined(__x86_64__)
#define FASTRNN_ISA avx512_bf16
#define FASTRNN_BF16_OWNER avx512
#define FASTRNN_TARGET "avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#define FASTRNN_BF16_DOT
#include "cpu/kernels/bfloat16/table.h"
#endif
