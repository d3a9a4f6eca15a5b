// The int8 kernels that an instruction set offers, and the memory of a call.
#pragma once

#include "cpu/int8.h"
#include "cpu/isa/isa.h"
#include "cpu/layout.h"

namespace fastrnn::cpu {

// Offsets in the workspace of a direction, in bytes.
struct Int8Layout {
  std::int64_t x_row, h_row;  // bytes of a row of x and of h, padded to whole cache lines
  std::int64_t x;             // [N, x_row] bytes of x
  std::int64_t x_scales;      // [N] float
  std::int64_t x_zeros;       // [N] int32: zero points
  std::int64_t h;             // [2, B, h_row] bytes of h of the last step and of this one
  std::int64_t h_scales;      // [2, B] float
  std::int64_t own_h;         // [ranks, B, h_row] bytes of h, if each rank rounds h itself
  std::int64_t own_scales;    // [ranks, B] float
  std::int64_t own_zeros;     // [ranks, B] int32
  std::int64_t gates_x;       // [blocks, chunk_rows, Q, 16] float
  std::int64_t size;

  Int8Layout(const LayerShape& shape, const Plan& plan) {
    const CellInfo& cell = cell_info(shape.cell);
    const std::int64_t rows = shape.sequence.total_rows(), batch = shape.sequence.batch;
    const std::int64_t own = cell.bounded ? 0 : plan.threads * batch;
    x_row = padded(shape.input_size);
    h_row = padded(shape.hidden_size);
    WorkspaceBuilder builder;  // its unit is a byte here; a part starts at a multiple of 32
    const auto add = [&](std::int64_t bytes) { return builder.add(divide_up(bytes, 64) * 64); };
    x = add(rows * x_row);
    x_scales = add(rows * 4);
    x_zeros = add(rows * 4);
    h = add(2 * batch * h_row);
    h_scales = add(2 * batch * 4);
    own_h = add(own * h_row);
    own_scales = add(own * 4);
    own_zeros = add(own * 4);
    gates_x = add(int8_blocks(shape.hidden_size) * plan.chunk_rows * cell.pre * kInt8Units * 4);
    size = builder.size();
  }

 private:
  static std::int64_t padded(std::int64_t bytes) { return divide_up(bytes, 64) * 64; }
};

struct Int8Kernels {
  const char* name;
  const char* isa;  // the instruction set that these kernels belong to
  void (*forward[kCellCount])(const Int8Forward&, const Plan&, const Int8Layout&, char* workspace,
                              Team&, int rank);
  void (*sums)(const std::uint8_t* bytes, const std::int32_t* zero_points, std::int64_t rows,
               const std::int8_t* panel, const std::int32_t* sums, std::int64_t quads, int gates,
               std::int32_t* sums_out);
};

// The kernels in use (isa/int8_dispatch.cpp).
const Int8Kernels& int8_kernels();

}  // namespace fastrnn::cpu
