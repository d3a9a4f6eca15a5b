// Weights in the type that the kernel computes in: panels for tile.h, and for few rows the caller's
// own matrix, unpacked.
#pragma once

#include "cpu/kernels/product/dot.h"
#include "cpu/kernels/product/panels.h"
#include "cpu/kernels/product/tile.h"

FASTRNN_KERNELS_BEGIN

// A format of WeightMatrix (weight_matrix.h).
template <class T>
struct NativeFormat {
  using Source = T;
  using Operand = T;
  using Value = T;
  static constexpr int kDepth = 1;
  static constexpr WeightFormat kFormat = WeightFormat::kNative;
  static constexpr bool kNeedsPanels = false;

  explicit NativeFormat(int /*vectors*/) {}

  static void pack(const PanelSource<T>& source, std::int64_t block, std::int64_t block_units,
                   T* panel) {
    pack_panel(source, block, block_units, panel);
  }

  static int tile_height(const PanelSource<T>& source, int vectors, bool packed) {
    return packed || !source.unit_is_row ? tile_rows(vectors) : kDotRows;
  }

  void multiply(int rows, int vectors, std::int64_t k_count, const T* a, std::int64_t a_stride,
                const T* b, std::int64_t b_stride, T* c, std::int64_t c_stride, const int* column,
                Prefetch prefetch = {}) const {
    const auto tile = tile_function<T>(rows, vectors);
    const auto prefetching =
        prefetch.step > 0 ? prefetching_tile_function<T>(rows, vectors) : nullptr;
    for (std::int64_t k = 0; k < k_count; k += kTilePiece) {
      const std::int64_t depth = std::min(kTilePiece, k_count - k);
      if (prefetching != nullptr && prefetch.next < prefetch.end) {
        prefetching(depth, a + k, a_stride, b + k * b_stride, b_stride, c, c_stride, column,
                    prefetch.next, prefetch.step);
        prefetch.next += depth * prefetch.step;
      } else {
        tile(depth, a + k, a_stride, b + k * b_stride, b_stride, c, c_stride, column);
      }
    }
  }

  // The same product with units first ... first + units - 1 of the caller's matrix.
  void multiply_unpacked(const PanelSource<T>& source, std::int64_t first, std::int64_t units,
                         int vectors, int rows, const T* a, std::int64_t a_stride, T* c,
                         std::int64_t c_stride, const int* column) const {
    if (!source.unit_is_row)  // a block of the matrix is a panel with a larger stride
      return multiply(rows, vectors, source.k_count, a, a_stride, source.weights + first,
                      source.stride, c, c_stride, column);
    for (int gate = 0; gate < source.gates; ++gate)
      dots(rows, units, source.k_count, a, a_stride,
           source.weights + (gate * source.units + first) * source.stride, source.stride,
           c + column[gate * vectors / source.gates], c_stride);
  }
};

FASTRNN_KERNELS_END
