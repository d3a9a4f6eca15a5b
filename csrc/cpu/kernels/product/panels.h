// Panels: weights in the order in which a microkernel reads them. A block is U = vectors * V
// neighbouring units with all their gates. Its panel holds, for each k, the weights of those units
// side by side: [K][gates][U], zero beyond the last unit.
#pragma once

#include "cpu/kernels/product/tile_shape.h"
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

// to [count, kLanes] = from^T, for from [kLanes, count], of which only the first `present` rows
// exist; the others count as 0.
template <class T>
void transpose_rows(const T* from, std::int64_t from_stride, std::int64_t present,
                    std::int64_t count, T* to, std::int64_t to_stride) {
  using Vec = Pack<T>;
  constexpr int kLanes = Vec::kLanes;
  std::int64_t k = 0;
  if (present >= kLanes) {
    for (; k + kLanes <= count; k += kLanes) {
      typename Vec::Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = Vec::load(from + i * from_stride + k).v;
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) Vec(rows[i]).store(to + (k + i) * to_stride);
    }
  }
  for (; k < count; ++k)
    for (int u = 0; u < kLanes; ++u)
      to[k * to_stride + u] = u < present ? from[u * from_stride + k] : T(0);
}

template <class T>
void pack_panel(const PanelSource<T>& source, std::int64_t block, std::int64_t block_units,
                T* panel) {
  using Vec = Pack<T>;
  const std::int64_t first = block * block_units;
  const std::int64_t present = std::min(block_units, source.units - first);
  const std::int64_t width = source.gates * block_units;
  if (!source.unit_is_row) {
    for (std::int64_t k = 0; k < source.k_count; ++k)
      for (std::int64_t u = 0; u < block_units; u += Vec::kLanes)
        Vec::load(source.weights + k * source.stride + first + u,
                  std::max<std::int64_t>(present - u, 0))
            .store(panel + k * width + u);
    return;
  }
  for (int gate = 0; gate < source.gates; ++gate)
    for (std::int64_t u = 0; u < block_units; u += Vec::kLanes)
      transpose_rows(source.weights + (gate * source.units + first + u) * source.stride,
                     source.stride, present - u, source.k_count, panel + gate * block_units + u,
                     width);
}

// at[i]: the column of vector i of a panel in a row of the tile; gate g is at pre[g].
struct Columns {
  int at[kTileVectors];
  FASTRNN_INLINE Columns(const int* pre, int gates, int vectors, int lanes) {
    for (int g = 0; g < gates; ++g)
      for (int u = 0; u < vectors; ++u) at[g * vectors + u] = (pre[g] * vectors + u) * lanes;
  }
};

FASTRNN_KERNELS_END
