// The product of bytes and int8 panels for a tile of rows and one vector of units: in the tile
// registers of AMX (tiles.h), or in vectors (quads.h). All sums are exact, so they are equal.
//
//   int8_tile_rows<G>()                 most rows of a product
//   multiply_bytes<G>(rows, block, bytes, bytes_stride, zero_points, sums_out)
//                                       sums_out[m][g] = sum_k bytes[m][k] q[g][k]
//                                                        - zero_points[m] sum_k q[g][k]
//   for_each_int8_tile<G>(begin, end, body)  calls body(row, count) for rows in tiles
//   finish_int8()                       ends the products of a thread
#pragma once

#if defined(FASTRNN_INT8_TILES)
#include "cpu/kernels/int8/tiles.h"
#else
#include "cpu/kernels/int8/quads.h"
#endif

#include "cpu/isa/int8.h"

FASTRNN_KERNELS_BEGIN

// See Int8Kernels.
template <int G>
void int8_block_sums(const Int8BlockProduct& product, std::int32_t* sums_out) {
  constexpr std::int64_t kWidth = G * kInt8Units;
#if defined(FASTRNN_INT8_TILES)
  copy_rest<G>(product.panel, product.quads, product.rest);
#endif
  for (std::int64_t unit = 0; unit < kInt8Units; unit += kIntLanes) {
    const Int8Block block{product.panel + unit * kInt8Depth, product.rest, product.sums + unit,
                          product.quads};
    for_each_int8_tile<G>(0, product.rows, [&](std::int64_t row, int count) {
      IntVector out[int8_tile_rows<G>() * G];
      multiply_bytes<G>(count, block, product.bytes + row * product.bytes_stride,
                        product.bytes_stride, product.zero_points + row, out);
      for (int m = 0; m < count; ++m)
        for (int g = 0; g < G; ++g)
          __builtin_memcpy(sums_out + (row + m) * kWidth + g * kInt8Units + unit, &out[m * G + g],
                           sizeof(IntVector));
    });
  }
  finish_int8();
}

inline void int8_sums_of(const Int8BlockProduct& product, int gates, std::int32_t* sums_out) {
  const auto run = gates == 1   ? int8_block_sums<1>
                   : gates == 3 ? int8_block_sums<3>
                                : int8_block_sums<4>;
  run(product, sums_out);
}

FASTRNN_KERNELS_END
