// The kernels of amx_bf16.cpp with emulated tile registers, for tests on every machine with
// AVX-512.
#if defined(__x86_64__)
#define FASTRNN_ISA amx_bf16_emulated
#define FASTRNN_BF16_OWNER avx512
#define FASTRNN_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#define FASTRNN_BF16_TILES
#define FASTRNN_EMULATED_TILES
#include "cpu/kernels/bfloat16/table.h"
#endif
