// Weights in bfloat16 as they are stored, multiplied in the tile registers of AMX.
//
//   C [16 rows, 16 units] += A [16 rows, 32 of K] B [32 of K, 16 units]
//
// A are rows in the caller's memory and B are 16 rows of a panel of pairs (pairs.h): both lie in
// memory as the instruction reads them. A step along K is a tile deep, so panels end with zeros and
// the last values of a row are copied, followed by zeros.
//
// One product has up to two row tiles. The second one ends with the last row: where there are 17 to
// 31 rows, both compute the rows in the middle, with the same results. Fewer than 16 rows need
// another configuration of the registers.
#pragma once

#include "cpu/kernels/bfloat16/pairs.h"
#include "cpu/kernels/vector/tile_registers.h"

#include "cpu/isa/bfloat16.h"

FASTRNN_KERNELS_BEGIN

constexpr std::int64_t kTileDepth = 32;  // of K
constexpr int kPairRows = int(kTileDepth) / kPairDepth;

// Rows of A: the second row tile begins `second` rows after the first one.
struct TileRows {
  const Bfloat16* at;
  std::int64_t stride;  // in values
  int second;
};

// The microkernel. C [M row tiles, 16 * N], column tile n at column[n], += A [.., K] B, for the
// values of A in whole tiles (`tiles` of them) and those that `rest` holds (null: none).
template <int M, int N>
void amx_tile(std::int64_t tiles, TileRows a, const Bfloat16* rest, const Pair* b,
              std::int64_t b_stride, float* c, std::int64_t c_stride, const int* column) {
  static_assert(M * N <= 4);
  constexpr int kA = 4;  // registers 0 to 3 hold C, then A, then B
  constexpr int kB = kA + M, kBCount = kTileRegisters - kB;
  TileRegisters registers;
  const std::int64_t c_bytes = c_stride * std::int64_t(sizeof(float));
  const std::int64_t b_bytes = b_stride * std::int64_t(sizeof(Pair));
  [[maybe_unused]] float* const c_second = c + a.second * c_stride;

  const auto each_sum = [&](auto&& body) __attribute__((always_inline)) {
    unrolled(body, std::make_integer_sequence<int, M * N>{});
  };
  const auto step = [&](const Bfloat16* first, [[maybe_unused]] const Bfloat16* second,
                        std::int64_t bytes) __attribute__((always_inline)) {
    registers.load<kA>(first, bytes);
    if constexpr (M > 1) registers.load<kA + M - 1>(second, bytes);
    unrolled(
        [&](auto n) __attribute__((always_inline)) {
          constexpr int kColumn = decltype(n)::value, kHolder = kB + kColumn % kBCount;
          registers.load<kHolder>(b + kColumn * Pack<float>::kLanes, b_bytes);
          registers.dot<kColumn, kA, kHolder>();
          if constexpr (M > 1) registers.dot<N + kColumn, kA + M - 1, kHolder>();
        },
        std::make_integer_sequence<int, N>{});
    b += kPairRows * b_stride;
  };

  each_sum([&](auto i) __attribute__((always_inline)) {
    constexpr int kSum = decltype(i)::value;
    registers.load<kSum>((kSum < N ? c : c_second) + column[kSum % N], c_bytes);
  });
  const std::int64_t a_bytes = a.stride * std::int64_t(sizeof(Bfloat16));
  const Bfloat16 *first = a.at, *second = a.at + a.second * a.stride;
  for (; tiles > 0; --tiles) {
    step(first, second, a_bytes);
    first += kTileDepth;
    second += kTileDepth;
  }
  if (rest != nullptr)
    step(rest, rest + a.second * kTileDepth, kTileDepth * std::int64_t(sizeof(Bfloat16)));
  each_sum([&](auto i) __attribute__((always_inline)) {
    constexpr int kSum = decltype(i)::value;
    registers.store<kSum>((kSum < N ? c : c_second) + column[kSum % N], c_bytes);
  });
}

// A format of WeightMatrix (weight_matrix.h).
struct Bfloat16Tiles {
  using Source = Bfloat16;
  using Operand = Bfloat16;
  using Value = Pair;
  static constexpr int kDepth = kPairDepth;
  static constexpr WeightFormat kFormat = WeightFormat::kBfloat16Tiles;
  static constexpr bool kNeedsPanels = true;
  static constexpr Bfloat16Product kProduct = Bfloat16Product::kTiles;

  // The first product of a thread configures its tile registers. Other users of AMX in the process
  // load their own configuration.
  static void finish() { TileRegisters::release(); }

  explicit Bfloat16Tiles(int /*vectors*/) {}

  static void pack(const PanelSource<Bfloat16>& source, std::int64_t block,
                   std::int64_t block_units, Pair* panel) {
    pack_pair_panel(source, block, block_units, panel_rows(kFormat, source.k_count), panel);
  }

  static int tile_height(const PanelSource<Bfloat16>&, int /*vectors*/, bool /*packed*/) {
    return kTileRows;
  }

  void multiply(int rows, int vectors, std::int64_t k_count, const Bfloat16* a,
                std::int64_t a_stride, const Pair* b, std::int64_t b_stride, float* c,
                std::int64_t c_stride, const int* column) const {
    const std::int64_t tiles = k_count / kTileDepth, rest_depth = k_count % kTileDepth;
    alignas(64) Bfloat16 copies[kTileRows * kTileDepth];
    if (rest_depth > 0) copy_rest(a + tiles * kTileDepth, a_stride, rows, rest_depth, copies);
    const Bfloat16* const rest = rest_depth > 0 ? copies : nullptr;
    TileRegisters::configure(std::min(rows, kRowTile));
    const auto run = [&](auto tile, int first) {
      tile(tiles, TileRows{a, a_stride, std::max(rows - kRowTile, 0)}, rest,
           b + first * Pack<float>::kLanes, b_stride, c, c_stride, column + first);
    };
    if (rows > kRowTile) {
      if (vectors >= 2) run(amx_tile<2, 2>, 0);
      if (vectors == 4) run(amx_tile<2, 2>, 2);
      if (vectors % 2 == 1) run(amx_tile<2, 1>, vectors - 1);
    } else {
      if (vectors == 1) run(amx_tile<1, 1>, 0);
      if (vectors == 2) run(amx_tile<1, 2>, 0);
      if (vectors == 3) run(amx_tile<1, 3>, 0);
      if (vectors == 4) run(amx_tile<1, 4>, 0);
    }
  }

 private:
  // to [rows, kTileDepth]: the first `depth` values of each row, then zeros.
  static FASTRNN_INLINE void copy_rest(const Bfloat16* a, std::int64_t a_stride, int rows,
                                       std::int64_t depth, Bfloat16* to) {
    const __mmask32 present = (__mmask32(1) << depth) - 1;
    for (int row = 0; row < rows; ++row)
      _mm512_storeu_si512(to + row * kTileDepth,
                          _mm512_maskz_loadu_epi16(present, a + row * a_stride));
  }
};

FASTRNN_KERNELS_END
