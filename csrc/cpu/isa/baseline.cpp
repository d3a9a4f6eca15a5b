// Kernels for every machine of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "cpu/isa/baseline_target.h"

#include "cpu/kernels/table.h"
