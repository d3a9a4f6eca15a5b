// What the kernels are compiled for, as cpu/kernels/target.h expects it.
#pragma once

#define FASTRNN_ISA avx2
#define FASTRNN_TARGET "avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
