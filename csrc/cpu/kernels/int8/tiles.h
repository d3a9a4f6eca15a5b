// The product of bytes and int8 panels in the tile registers of AMX.
//
//   C [16 rows, 16 units] += A [16 rows, 64 of K] B [64 of K, 16 units]
//
// A are rows of bytes and B are 16 quads of one gate of a block: both lie in memory as the
// instruction reads them. A step along K is a tile deep. Rows of bytes have room for whole tiles,
// with any values beyond K. Panels end with the last quad, because they are stored in models: the
// last quads of each block are copied once per call, followed by zeros.
//
// One product has up to two row tiles. The second one ends with the last row: where there are 17 to
// 31 rows, both compute the rows in the middle, with the same results. Fewer than 16 rows need
// another configuration of the registers.
#pragma once

#include "cpu/kernels/vector/tile_registers.h"

#include "cpu/isa/int8.h"

FASTRNN_KERNELS_BEGIN

static_assert(kIntLanes == kInt8Units);
constexpr std::int64_t kQuadBytes = kInt8Units * kInt8Depth;  // of a gate: a row of a register
static_assert(kInt8RestBytes == kRowTile * kQuadBytes);

template <int G>
constexpr int int8_tile_rows() {
  return 2 * kRowTile;
}

// Rows of A: the second row tile begins `second` rows after the first one.
struct ByteRows {
  const std::uint8_t* at;
  std::int64_t stride;
  int second;
};

// The microkernel. C [M row tiles, 16 * N] = A [.., K] B [K, 16 * N] for whole tiles of K (`tiles`
// of them) and those that `rest` holds (null: none). Rows of B and of C are `stride` bytes apart. A
// function of its own, so that CI finds its loop.
template <int M, int N>
__attribute__((noinline)) void int8_amx_tile(std::int64_t tiles, ByteRows a, const std::int8_t* b,
                                             const std::int8_t* rest, std::int64_t stride,
                                             char* c) {
  static_assert(M * N <= 4);
  constexpr int kA = 4;  // registers 0 to 3 hold C, then A, then B
  constexpr int kB = kA + M, kBCount = kTileRegisters - kB;
  TileRegisters registers;

  const auto each_sum = [&](auto&& body) __attribute__((always_inline)) {
    unrolled(body, std::make_integer_sequence<int, M * N>{});
  };
  const std::uint8_t* first = a.at;
  [[maybe_unused]] const std::uint8_t* second = a.at + a.second * a.stride;
  const auto step = [&](const std::int8_t* from) __attribute__((always_inline)) {
    registers.load<kA>(first, a.stride);
    if constexpr (M > 1) registers.load<kA + M - 1>(second, a.stride);
    unrolled(
        [&](auto n) __attribute__((always_inline)) {
          constexpr int kColumn = decltype(n)::value, kHolder = kB + kColumn % kBCount;
          registers.load<kHolder>(from + kColumn * kQuadBytes, stride);
          registers.dot_bytes<kColumn, kA, kHolder>();
          if constexpr (M > 1) registers.dot_bytes<N + kColumn, kA + M - 1, kHolder>();
        },
        std::make_integer_sequence<int, N>{});
  };

  each_sum([&](auto i) __attribute__((always_inline)) { registers.zero<decltype(i)::value>(); });
  for (; tiles > 0; --tiles) {
    step(b);
    first += kQuadBytes;
    second += kQuadBytes;
    b += kRowTile * stride;
  }
  if (rest != nullptr) step(rest);
  [[maybe_unused]] char* const c_second = c + a.second * stride;
  each_sum([&](auto i) __attribute__((always_inline)) {
    constexpr int kSum = decltype(i)::value;
    registers.store<kSum>((kSum < N ? c : c_second) + kSum % N * kQuadBytes, stride);
  });
}

// sums_out[m][g] = sum_k bytes[m][k] q[g][k] - zero_points[m] sums[g] for up to 32 rows. The first
// product of a thread configures its tile registers. Other users of AMX in the process load their
// own configuration.
template <int G>
void multiply_bytes(int rows, const Int8Block& block, const std::uint8_t* bytes,
                    std::int64_t bytes_stride, const std::int32_t* zero_points,
                    IntVector* sums_out) {
  TileRegisters::configure(std::min(rows, kRowTile));
  const ByteRows a{bytes, bytes_stride, std::max(rows - kRowTile, 0)};
  const auto run = [&](auto tile, int gate) {
    tile(block.quads / kRowTile, a, block.panel + gate * kQuadBytes,
         block.rest == nullptr ? nullptr : block.rest + gate * kQuadBytes, G * kQuadBytes,
         reinterpret_cast<char*>(sums_out + gate));
  };
  if (rows <= kRowTile) {
    run(int8_amx_tile<1, G>, 0);
  } else {
    if constexpr (G >= 2) run(int8_amx_tile<2, 2>, 0);
    if constexpr (G == 4) run(int8_amx_tile<2, 2>, 2);
    if constexpr (G % 2 == 1) run(int8_amx_tile<2, 1>, G - 1);
  }
  IntVector sums[G];
  __builtin_memcpy(sums, block.sums, sizeof(sums));
  for (int m = 0; m < rows; ++m)
    for (int g = 0; g < G; ++g) sums_out[m * G + g] -= sums[g] * (zero_points[m] - IntVector{});
}

// Calls body(row, count) for the tiles of rows [begin, end). There are as few row tiles as
// possible, and all have 16 rows unless there are fewer: then the registers keep one configuration.
template <int G, class Body>
FASTRNN_INLINE void for_each_int8_tile(std::int64_t begin, std::int64_t end, Body&& body) {
  const std::int64_t row_tiles = divide_up(end - begin, kRowTile), pairs = row_tiles / 2;
  const std::int64_t single = row_tiles % 2 * std::min<std::int64_t>(end - begin, kRowTile);
  const std::int64_t paired = end - begin - single;
  for (std::int64_t i = 0; i < pairs; ++i) {
    const std::int64_t row = paired * i / pairs;
    body(begin + row, int(paired * (i + 1) / pairs - row));
  }
  if (single > 0) body(end - single, int(single));
}

// Copies the quads of a block that follow the last whole tile, and zeros, to `to` [16][G][16][4].
template <int G>
void copy_rest(const std::int8_t* panel, std::int64_t quads, std::int8_t* to) {
  constexpr std::int64_t kRow = G * kQuadBytes;
  const std::int64_t whole = quads / kRowTile * kRowTile, count = (quads - whole) * kRow;
  __builtin_memcpy(to, panel + whole * kRow, std::size_t(count));
  __builtin_memset(to + count, 0, std::size_t(kRowTile * kRow - count));
}

// Ends the thread's use of the tile registers.
FASTRNN_INLINE void finish_int8() { TileRegisters::release(); }

FASTRNN_KERNELS_END
