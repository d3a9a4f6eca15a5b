// Int8 kernels for x86-64 with AMX. All else is in avx512.cpp.
#if defined(__x86_64__)
#define FASTRNN_ISA amx_int8
#define FASTRNN_INT8_OWNER avx512
#define FASTRNN_TARGET "amx-tile,amx-int8,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#define FASTRNN_INT8_TILES
#include "cpu/kernels/int8/table.h"
#endif
