// Kernels for every machine of the architecture: SSE2 on x86-64, NEON on aarch64.
#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
#endif
#include "cpu/kernels/table.h"
