// What the kernels are compiled for, as cpu/kernels/target.h expects it.
#pragma once

#define FASTRNN_ISA avx512
#define FASTRNN_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
