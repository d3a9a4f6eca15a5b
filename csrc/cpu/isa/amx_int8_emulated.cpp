// The kernels of amx_int8.cpp with emulated tile registers, for tests on every machine with
// AVX-512.
#if defined(__x86_64__)
#define FASTRNN_ISA amx_int8_emulated
#define FASTRNN_INT8_OWNER avx512
#define FASTRNN_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#define FASTRNN_INT8_TILES
#define FASTRNN_EMULATED_TILES
#include "cpu/kernels/int8/table.h"
#endif
