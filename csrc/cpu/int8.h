// Inference with int8 weights as the layers above see it.
#pragma once

#include <string>
#include <vector>

#include "cpu/api.h"
#include "problem/int8_layer.h"

namespace fastrnn::cpu {

// Runs the directions of a layer (1 or 2, which differ only in `reverse` and their pointers).
FASTRNN_EXPORT void int8_forward(const Int8Forward* directions, int count, int threads,
                                 ParallelFor parallel_for);

// The plan of forward, and one line for users: which kernels compute it, and why.
FASTRNN_EXPORT Plan make_int8_plan(const LayerShape& shape, int threads, int directions);
FASTRNN_EXPORT std::string int8_reason(const LayerShape& shape);

// Int8 kernels that this machine can run, the slowest first, except for emulated ones. All of them
// compute the same sums.
FASTRNN_EXPORT std::vector<std::string> available_int8_kernels();
// Forces kernels for all shapes; "" restores the choice. Returns false if they are not available.
FASTRNN_EXPORT bool set_int8_kernels(const std::string& name);

// sum_k bytes[row][k] q[gate, unit][k] - zero_points[row] sums[gate, unit] for the units of one
// block (of `gates` gates: 1, 3 or 4), as sums_out [rows][gates][16]. bytes: [rows], each of
// `quads` times 4 bytes. panel: a block of a panel.
FASTRNN_EXPORT void int8_sums(const std::uint8_t* bytes, const std::int32_t* zero_points,
                              std::int64_t rows, const std::int8_t* panel, const std::int32_t* sums,
                              std::int64_t quads, int gates, std::int32_t* sums_out);

}  // namespace fastrnn::cpu
