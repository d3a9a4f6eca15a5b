// Sizes of the microkernel's tiles. .ci/check_kernels.py compiles only this header, with the macros
// of each instruction set, and compares the result with the machine code.
#pragma once

#include <cstdint>

#if !defined(FASTRNN_KERNELS_BEGIN)
#include "cpu/kernels/target.h"
#endif

FASTRNN_KERNELS_BEGIN

// Rows of a tile of n vectors: the accumulators, one vector of B and a broadcast value must fit in
// the registers. Vectors of 16 bytes need more registers: SSE2 has no FMA, so a product takes one
// as well; NEON multiplies by a lane, and compilers load the values of all rows in advance.
constexpr int tile_rows(int n) {
#if FASTRNN_REGISTERS >= 32 && FASTRNN_VECTOR_BYTES == 16
  return n == 1 ? 12 : n == 2 ? 10 : n == 3 ? 7 : 5;
#elif FASTRNN_REGISTERS >= 32
  return n == 1 ? 12 : n == 2 ? 12 : n == 3 ? 8 : 6;
#elif FASTRNN_VECTOR_BYTES == 16
  return n == 1 ? 6 : n == 2 ? 6 : n == 3 ? 3 : 2;
#else
  return n == 1 ? 6 : n == 2 ? 6 : n == 3 ? 4 : 3;
#endif
}
constexpr int kTileVectors = 4;
#if defined(FASTRNN_BF16_TILES)
constexpr int kTileRows = 32;
#else
constexpr int kTileRows = 12;
#endif
// Largest number of terms per sum along K, which limits rounding error.
constexpr std::int64_t kTilePiece = 256;

constexpr int kCacheLine = 64;        // bytes
constexpr int kPrivateCacheHint = 2;  // of __builtin_prefetch: into L2, not into L1

// Number of independent accumulators per element along K, so that small tiles do not wait for the
// latency of an addition.
constexpr int tile_chains(int m, int n) { return m * n >= 8 ? 1 : m * n >= 4 ? 2 : 4; }

// The same for pairs of bfloat16 (cpu/kernels/bfloat16/product.h). Without an instruction for pairs
// both halves of all rows and of a vector of B must fit in the registers as well.
constexpr int pair_rows(int n) {
#if defined(FASTRNN_BF16_TILES)
  return n * 0;  // there are none
#elif defined(FASTRNN_BF16_DOT)
  return tile_rows(n);
#elif FASTRNN_REGISTERS >= 32
  return n == 1 ? 8 : n == 2 ? 6 : n == 3 ? 5 : 4;
#else
  return n == 1 ? 4 : n == 2 ? 3 : 2;
#endif
}
constexpr int pair_chains(int m, int n) {
  int chains = tile_chains(m, n);
#if !defined(FASTRNN_BF16_DOT)
  while (chains > 1 && (chains * n + 2) * m + 2 > FASTRNN_REGISTERS) chains /= 2;
#endif
  return chains;
}

// Row tiles of the AMX microkernels (cpu/kernels/bfloat16/tiles.h) for n column tiles. There are 8
// tile registers: two row tiles with two column tiles take all; one row tile takes up to four.
constexpr int amx_row_tiles(int n) {
#if defined(FASTRNN_BF16_TILES) || defined(FASTRNN_INT8_TILES)
  return n <= 2 ? 2 : 1;
#else
  return n * 0;  // there are none
#endif
}
// With int8 (cpu/kernels/int8/tiles.h) a column tile is a gate: no cell has two.
constexpr bool has_int8_amx_tile(int m, int n) { return m == 2 || n != 2; }

FASTRNN_KERNELS_END
