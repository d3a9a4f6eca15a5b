// Maps threads to the elements of a [rows, columns] pointwise part.
//
//   block      a strip of one row:   | 32 ... 128 columns |        rows shorter than 128 columns
//   blocks     row by row, a row's strips one after the other      share a block: 128 threads
//
// The grid is one-dimensional because only its x may exceed 65535.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cells/math.h"

namespace fastrnn::cuda {

constexpr int kBlockThreads = 128;

struct Grid {
  std::int64_t rows, columns;
  std::int64_t blocks;
  unsigned blocks_per_row;
  unsigned width, height;  // threads of a block
};

inline Grid grid_for(std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kWarp = 32, kWarps = kBlockThreads / kWarp;
  const std::int64_t warps =
      std::max<std::int64_t>(std::min((columns + kWarp - 1) / kWarp, kWarps), 1);
  const std::int64_t width = warps * kWarp, height = kWarps / warps;
  const std::int64_t blocks_per_row = (columns + width - 1) / width;
  return {rows,
          columns,
          blocks_per_row * ((rows + height - 1) / height),
          unsigned(blocks_per_row),
          unsigned(width),
          unsigned(height)};
}

struct Element {
  std::int64_t row, column;
  bool is_inside;
};

FASTRNN_HD Element element_of(const Grid& grid, unsigned block, unsigned x, unsigned y) {
  const std::int64_t row = std::int64_t(block / grid.blocks_per_row) * grid.height + y;
  const std::int64_t column = std::int64_t(block % grid.blocks_per_row) * grid.width + x;
  return {row, column, row < grid.rows && column < grid.columns};
}

}  // namespace fastrnn::cuda
