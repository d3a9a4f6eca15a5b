// Weights as the walks multiply with them, block by block. A block is U = vectors * V neighbouring
// units with all their gates; its packed panel holds, for each k, the weights of those units side
// by side: [K][gates][U], zero beyond the last unit.
#pragma once

#include "cpu/kernels/product/dot.h"
#include "cpu/kernels/product/tile.h"
#include "cpu/kernels/vector/lanes.h"

FASTRNN_KERNELS_BEGIN

template <class T>
struct PanelSource {
  const T* weights;
  std::int64_t stride;  // of a row
  bool unit_is_row;     // true: [gates*units, K], to multiply with w^T (forward)
  int gates;            // false: [K, units], to multiply with w (backward), gates = 1
  std::int64_t units, k_count;
};

// to [count, kLanes] = from^T, from [kLanes, count] of which only `present` rows are there, else 0.
template <class T>
void transpose_rows(const T* from, std::int64_t from_stride, std::int64_t present,
                    std::int64_t count, T* to, std::int64_t to_stride) {
  using P = Pack<T>;
  constexpr int kLanes = P::kLanes;
  std::int64_t k = 0;
  if (present >= kLanes) {
    for (; k + kLanes <= count; k += kLanes) {
      typename P::Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = P::load(from + i * from_stride + k).v;
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) P(rows[i]).store(to + (k + i) * to_stride);
    }
  }
  for (; k < count; ++k)
    for (int u = 0; u < kLanes; ++u)
      to[k * to_stride + u] = u < present ? from[u * from_stride + k] : T(0);
}

template <class T>
void pack_panel(const PanelSource<T>& source, std::int64_t block, std::int64_t block_units,
                T* panel) {
  using P = Pack<T>;
  const std::int64_t first = block * block_units;
  const std::int64_t present = std::min(block_units, source.units - first);
  const std::int64_t width = source.gates * block_units;
  if (!source.unit_is_row) {
    for (std::int64_t k = 0; k < source.k_count; ++k)
      for (std::int64_t u = 0; u < block_units; u += P::kLanes)
        P::load(source.weights + k * source.stride + first + u,
                std::max<std::int64_t>(present - u, 0))
            .store(panel + k * width + u);
    return;
  }
  for (int gate = 0; gate < source.gates; ++gate)
    for (std::int64_t u = 0; u < block_units; u += P::kLanes)
      transpose_rows(source.weights + (gate * source.units + first + u) * source.stride,
                     source.stride, present - u, source.k_count, panel + gate * block_units + u,
                     width);
}

// columns[i]: where vector i of a panel goes in a row of the tile, gate g at pre[g].
struct Columns {
  int at[kTileVectors];
  FASTRNN_INLINE Columns(const int* pre, int gates, int vectors, int lanes) {
    for (int g = 0; g < gates; ++g)
      for (int u = 0; u < vectors; ++u) at[g * vectors + u] = (pre[g] * vectors + u) * lanes;
  }
};

// One weight matrix of a walk. Packed, every block is a panel. As it lies, nothing is copied but a
// last block of too few columns: for calls of so few rows that packing would cost more than it
// gains.
template <class T>
class Weights {
 public:
  Weights(const PanelSource<T>& source, T* panels, int vectors, bool packed)
      : source_(source), panels_(panels), vectors_(vectors), packed_(packed) {}

  void pack(const Share& blocks) const {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
      if (has_panel(block)) pack_panel(source_, block, block_units(), panel(block));
  }

  // C [rows, *] += A [rows, K] (this block), vector i of the block at columns.at[i]. Of a last
  // block with one gate, vectors without a unit are left out.
  void multiply(std::int64_t block, int rows, const T* a, std::int64_t a_stride, T* c,
                std::int64_t c_stride, const Columns& columns) const {
    if (has_panel(block) || !source_.unit_is_row) {
      const bool lies = !has_panel(block);
      const int vectors = source_.gates > 1 ? source_.gates * vectors_
                                            : int(divide_up(units_of(block), Pack<T>::kLanes));
      const T* b = lies ? source_.weights + block * block_units() : panel(block);
      const std::int64_t b_stride = lies ? source_.stride : panel_width();
      const auto tile = tile_function<T>(rows, vectors);
      for (std::int64_t k = 0; k < source_.k_count; k += kTilePiece)
        tile(std::min(kTilePiece, source_.k_count - k), a + k, a_stride, b + k * b_stride, b_stride,
             c, c_stride, columns.at);
      return;
    }
    const std::int64_t first = block * block_units(), present = units_of(block);
    for (int gate = 0; gate < source_.gates; ++gate)
      dots(rows, present, source_.k_count, a, a_stride,
           source_.weights + (gate * source_.units + first) * source_.stride, source_.stride,
           c + columns.at[gate * vectors_], c_stride);
  }

  int tile_height() const {
    return packed_ || !source_.unit_is_row ? tile_rows(source_.gates * vectors_) : kDotRows;
  }

 private:
  std::int64_t block_units() const { return std::int64_t(vectors_) * Pack<T>::kLanes; }
  std::int64_t units_of(std::int64_t block) const {
    return std::min(block_units(), source_.units - block * block_units());
  }
  std::int64_t panel_width() const { return source_.gates * block_units(); }
  T* panel(std::int64_t block) const { return panels_ + block * panel_width() * source_.k_count; }
  bool has_panel(std::int64_t block) const {
    return packed_ || (!source_.unit_is_row && units_of(block) < block_units());
  }

  const PanelSource<T> source_;
  T* const panels_;
  const int vectors_;
  const bool packed_;
};

FASTRNN_KERNELS_END
