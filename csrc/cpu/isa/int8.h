// The int8 kernels that an instruction set offers, and the memory of a call.
#pragma once

#include "cpu/int8.h"
#include "cpu/isa/isa.h"
#include "cpu/layout.h"

namespace fastrnn::cpu {

// A tile register of AMX holds this many quads of one gate of a block.
constexpr std::int64_t kInt8RestQuads = 16;
constexpr std::int64_t kInt8RestBytes = kInt8RestQuads * kInt8Units * kInt8Depth;

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
  std::int64_t x_rest;        // [blocks, 16, G, 16, 4] of w_ih, for kernels with tiles
  std::int64_t h_rest;        // the same of w_hh
  std::int64_t size;

  Int8Layout(const LayerShape& shape, const Plan& plan, bool tiles) {
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
    const std::int64_t rest =
        tiles ? int8_blocks(shape.hidden_size) * cell.gates * kInt8RestBytes : 0;
    x_rest = add(int8_quads(shape.input_size) % kInt8RestQuads == 0 ? 0 : rest);
    h_rest = add(int8_quads(shape.hidden_size) % kInt8RestQuads == 0 ? 0 : rest);
    size = builder.size();
  }

 private:
  static std::int64_t padded(std::int64_t bytes) { return divide_up(bytes, 64) * 64; }
};

// The weights of one block of a panel as the products read them: all gates of the units of a
// vector.
struct Int8Block {
  const std::int8_t* panel;  // at the first unit: [K/4][G][16 units][4]
  const std::int8_t* rest;   // for tiles: a copy of what follows the last whole tile, or null
  const std::int32_t* sums;  // at the first unit: [G][16]
  std::int64_t quads;        // K/4
};

// One product for tests (int8_sums in cpu/int8.h).
struct Int8BlockProduct {
  const std::uint8_t* bytes;  // [rows], bytes_stride apart: a multiple of 64
  std::int64_t bytes_stride;
  const std::int32_t* zero_points;
  std::int64_t rows;
  const std::int8_t* panel;
  std::int8_t* rest;  // [16, G, 16, 4], written by kernels with tiles
  const std::int32_t* sums;
  std::int64_t quads;
};

struct Int8Kernels {
  const char* name;
  const char* isa;  // the instruction set that these kernels belong to
  bool tiles;       // they multiply in the tile registers of AMX
  void (*forward[kCellCount])(const Int8Forward&, const Plan&, const Int8Layout&, char* workspace,
                              Team&, int rank);
  void (*sums)(const Int8BlockProduct&, int gates, std::int32_t* sums_out);
};

// The kernels of the instruction set in use that this machine runs: the fastest without tiles, or
// those with tiles or null (isa/int8_dispatch.cpp).
const Int8Kernels& int8_kernels();
const Int8Kernels* int8_tile_kernels();
// The kernels that are forced, or null.
const Int8Kernels* forced_int8_kernels();

}  // namespace fastrnn::cpu
