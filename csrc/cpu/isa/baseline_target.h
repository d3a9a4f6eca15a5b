// What the kernels are compiled for, as cpu/kernels/target.h expects it.
#pragma once

#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
#endif
