// Weights of 16 bits, for one row: half the bytes to fetch per step, where a step waits for
// weights.
//
//   packing    w -> w', rounded
//   product    c[column[n]] += sum_k a[k] w'[k][n], in float32: a load widens w' to float32
//
// A half type is a record of what differs between these formats:
//
//   kFormat             its name for plans and layouts
//   store(value, to)    rounds a vector of float32 and stores it
//   tile(vectors)       half_tile<W, 1, vectors>, where W has
//                         Vector, kLanes    a vector of float32 and its lanes
//                         load(from)        loads and widens kLanes values
#pragma once

#include "cpu/kernels/product/panels.h"

FASTRNN_KERNELS_BEGIN

// A value of 16 bits.
using Half = std::uint16_t;

using HalfTile = void (*)(std::int64_t k_count, const float* a, const Half* b, float* c,
                          const int* column);

// The microkernel: a tile of one row and N vectors of a panel, loaded as W. Twin of tile<float, 1,
// N>: the same sums in the same order for every W.
template <class W, int M, int N>
void half_tile(std::int64_t k_count, const float* a, const Half* b, float* c, const int* column) {
  static_assert(M == 1, "the panels serve a batch of one");
  using Vector = typename W::Vector;
  constexpr int kParts = Pack<float>::kLanes / W::kLanes;  // vectors W per vector of a panel
  constexpr int kCount = N * kParts, kWidth = kCount * W::kLanes;
  constexpr int kChains = tile_chains(M, N);
  Vector sum[kChains][kCount];
#pragma GCC unroll 16
  for (int n = 0; n < kCount; ++n) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) sum[chain][n] = Vector{};
  }
  std::int64_t k = 0;
  for (; k + kChains <= k_count; k += kChains) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      const Vector value = a[k + chain] - Vector{};
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n)
        sum[chain][n] += value * W::load(b + chain * kWidth + n * W::kLanes);
    }
    b += kChains * kWidth;
  }
  for (; k < k_count; ++k) {
    const Vector value = a[k] - Vector{};
#pragma GCC unroll 16
    for (int n = 0; n < kCount; ++n) sum[0][n] += value * W::load(b + n * W::kLanes);
    b += kWidth;
  }
#pragma GCC unroll 16
  for (int n = 0; n < kCount; ++n) {
    Vector total = sum[0][n];
#pragma GCC unroll 16
    for (int chain = 1; chain < kChains; ++chain) total += sum[chain][n];
    float* at = c + column[n / kParts] + n % kParts * W::kLanes;
    Vector before;
    std::memcpy(&before, at, sizeof(Vector));
    total = before + total;
    std::memcpy(at, &total, sizeof(Vector));
  }
}

template <class W>
FASTRNN_INLINE HalfTile half_tile_function(int n) {
  static constexpr HalfTile kTiles[] = {half_tile<W, 1, 1>, half_tile<W, 1, 2>, half_tile<W, 1, 3>,
                                        half_tile<W, 1, 4>};
  return kTiles[n - 1];
}

// The same as pack_panel, for a few k at once through a buffer of float32.
template <class Type>
void pack_half_panel(PanelSource<float> source, std::int64_t block, std::int64_t block_units,
                     Half* panel) {
  using P = Pack<float>;
  constexpr std::int64_t kDepth = 64;
  alignas(64) float part[kDepth * kTileVectors * P::kLanes];
  const std::int64_t width = source.gates * block_units;
  const std::int64_t all = source.k_count;
  for (std::int64_t k = 0; k < all; k += kDepth) {
    source.k_count = std::min(kDepth, all - k);
    pack_panel(source, block, block_units, part);
    for (std::int64_t i = 0; i < source.k_count * width; i += P::kLanes)
      Type::store(P::load(part + i), panel + k * width + i);
    source.weights += kDepth;
  }
}

// A format of WeightMatrix (weight_matrix.h).
template <class Type>
class HalfFormat {
 public:
  using Source = float;
  using Operand = float;
  using Value = Half;
  static constexpr int kDepth = 1;
  static constexpr WeightFormat kFormat = Type::kFormat;
  static constexpr bool kNeedsPanels = true;

  explicit HalfFormat(int vectors) : tile_(Type::tile(vectors)) {}

  static void pack(const PanelSource<float>& source, std::int64_t block, std::int64_t block_units,
                   Half* panel) {
    pack_half_panel<Type>(source, block, block_units, panel);
  }

  static int tile_height(const PanelSource<float>&, int /*vectors*/, bool /*packed*/) { return 1; }

  void multiply(int /*rows*/, int /*vectors*/, std::int64_t k_count, const float* a,
                std::int64_t /*a_stride*/, const Half* b, std::int64_t b_stride, float* c,
                std::int64_t /*c_stride*/, const int* column) const {
    for (std::int64_t k = 0; k < k_count; k += kTilePiece)
      tile_(std::min(kTilePiece, k_count - k), a + k, b + k * b_stride, c, column);
  }

 private:
  const HalfTile tile_;
};

FASTRNN_KERNELS_END
