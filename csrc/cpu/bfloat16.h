// Forward in bfloat16 as it is stored, as the layers above see it. The values of a step (gates, the
// cell state) and those saved for backward are float32; h is rounded to bfloat16 after each step,
// as y is.
#pragma once

#include <string>
#include <vector>

#include "cpu/api.h"
#include "problem/bfloat16.h"

namespace fastrnn::cpu {

using Bfloat16Forward = LayerForward<Bfloat16, float>;

// Whether these kernels compute forward for a layer of this shape. Otherwise the caller converts
// its tensors and computes in float32.
FASTRNN_EXPORT bool computes_bfloat16(const LayerShape& shape);
// One line for users: which kernels compute forward in bfloat16 for this shape, and why.
FASTRNN_EXPORT std::string bfloat16_reason(const LayerShape& shape);
// The plan of forward, if computes_bfloat16(shape).
FASTRNN_EXPORT Plan make_bfloat16_plan(const LayerShape& shape, int threads, int directions);

// Runs the directions of a layer (1 or 2, which differ only in `reverse` and their pointers), if
// computes_bfloat16(shape). whole: as for forward in cpu/api.h.
FASTRNN_EXPORT void bfloat16_forward(const Bfloat16Forward* directions, int count, int threads,
                                     ParallelFor parallel_for, const WholeLayer* whole = nullptr);

// Bfloat16 kernels of the instruction set in use that this machine can run, the slowest first.
FASTRNN_EXPORT std::vector<std::string> available_bfloat16_kernels();
// Forces kernels for all shapes as long as their instruction set is in use; "float32" forces
// float32 copies, "" restores the choice. Returns false if they are not available.
FASTRNN_EXPORT bool set_bfloat16_kernels(const std::string& name);

}  // namespace fastrnn::cpu
