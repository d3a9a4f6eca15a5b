// One weight matrix of a time loop, in one format. A format is a record that packs a panel and
// multiplies with it:
//
//   Source                   type of the caller's weights
//   Operand                  type of A
//   Value                    type of a value of a panel
//   kDepth                   number of weights along K that one value holds
//   kFormat                  its name for plans and layouts
//   kNeedsPanels             false: multiply_unpacked multiplies with the caller's own matrix
//   Format(vectors)          of blocks of so many vectors, all gates together
//   pack(source, block, block_units, panel)
//   tile_height(source, vectors, packed)      largest number of rows that multiply takes
//   finish()                 only in bfloat16: what a thread does after its time loop
//   multiply(rows, vectors, k_count, a, a_stride, b, b_stride, c, c_stride, column)
//                            C [rows, *] += A [rows, K] B, B [K][b_stride] a panel, whose vector i
//                            is added at column[i] of a row of C
//
// native.h, half.h, bfloat16/product.h and bfloat16/tiles.h have formats; formats.h lists those
// that an instruction set has for w_hh beside its own type.
#pragma once

#include "cpu/kernels/product/native.h"

FASTRNN_KERNELS_BEGIN

// Packed, every block is a panel. Unpacked, only a last block of too few columns is: for calls of
// so few rows that packing costs more than it gains.
template <class T, class Format = NativeFormat<T>>
class WeightMatrix {
  using Source = typename Format::Source;
  using Operand = typename Format::Operand;
  using Value = typename Format::Value;
  static_assert(sizeof(Value) == Format::kDepth * weight_bytes(Format::kFormat, sizeof(T)));

 public:
  WeightMatrix(const PanelSource<Source>& source, T* panels, int vectors, bool packed)
      : format_(source.gates * vectors),
        source_(source),
        panels_(reinterpret_cast<Value*>(panels)),
        vectors_(vectors),
        packed_(packed) {}

  void pack(const IndexRange& blocks) const {
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
      if (has_panel(block)) Format::pack(source_, block, block_units(), panel(block));
  }

  // C [rows, *] += A [rows, K] (this block), vector i of the block at columns.at[i]. Vectors of a
  // last block with one gate that hold no unit may be skipped.
  void multiply(std::int64_t block, int rows, const Operand* a, std::int64_t a_stride, T* c,
                std::int64_t c_stride, const Columns& columns,
                [[maybe_unused]] const Prefetch& prefetch = {}) const {
    const int vectors = vectors_of(block);
    if (has_panel(block)) {
      if constexpr (kPrefetches)
        format_.multiply(rows, vectors, source_.k_count, a, a_stride, panel(block), panel_width(),
                         c, c_stride, columns.at, prefetch);
      else
        format_.multiply(rows, vectors, source_.k_count, a, a_stride, panel(block), panel_width(),
                         c, c_stride, columns.at);
    } else if constexpr (!Format::kNeedsPanels) {
      format_.multiply_unpacked(source_, block * block_units(), units_of(block), vectors, rows, a,
                                a_stride, c, c_stride, columns.at);
    }
  }

  // The part of that product with terms k_begin ... k_end - 1. All parts in ascending order, cut at
  // multiples of kTilePiece, give the sums of multiply, bit for bit.
  void multiply_part(std::int64_t block, std::int64_t k_begin, std::int64_t k_end, int rows,
                     const T* a, std::int64_t a_stride, T* c, std::int64_t c_stride,
                     const Columns& columns, const Prefetch& prefetch) const {
    static_assert(kPrefetches, "only panels of the type itself are multiplied in parts");
    format_.multiply(rows, vectors_of(block), k_end - k_begin, a + k_begin, a_stride,
                     panel(block) + k_begin * panel_width(), panel_width(), c, c_stride, columns.at,
                     prefetch);
  }

  // What each of `products` products in a row has to load of a panel that is needed after them:
  // the index-th part of its terms k_begin ... k_end - 1.
  Prefetch panel_part(std::int64_t block, std::int64_t index, std::int64_t products,
                      std::int64_t k_begin, std::int64_t k_end) const {
    if (!kPrefetches || !packed_ || products < 1) return {};
    const std::int64_t row_bytes = panel_width() * std::int64_t(sizeof(Value));
    const std::int64_t bytes = (k_end - k_begin) * row_bytes;
    const char* first = reinterpret_cast<const char*>(panel(block)) + k_begin * row_bytes;
    return {first + bytes * index / products, first + bytes * (index + 1) / products,
            std::min<std::int64_t>(divide_up(row_bytes, products), kCacheLine)};
  }
  Prefetch panel_part(std::int64_t block, std::int64_t index, std::int64_t products) const {
    return panel_part(block, index, products, 0, source_.k_count);
  }

  std::int64_t k_count() const { return source_.k_count; }

  // Largest number of rows for multiply.
  int tile_height() const {
    return Format::tile_height(source_, source_.gates * vectors_, packed_);
  }

 private:
  static constexpr bool kPrefetches = Format::kFormat == WeightFormat::kNative;

  std::int64_t block_units() const { return std::int64_t(vectors_) * Pack<T>::kLanes; }
  std::int64_t units_of(std::int64_t block) const {
    return std::min(block_units(), source_.units - block * block_units());
  }
  int vectors_of(std::int64_t block) const {
    return source_.gates > 1 ? source_.gates * vectors_
                             : int(divide_up(units_of(block), Pack<T>::kLanes));
  }
  std::int64_t panel_width() const { return source_.gates * block_units(); }
  Value* panel(std::int64_t block) const {
    return panels_ + block * panel_width() * panel_rows(Format::kFormat, source_.k_count);
  }
  bool has_panel(std::int64_t block) const {
    return Format::kNeedsPanels || packed_ ||
           (!source_.unit_is_row && units_of(block) < block_units());
  }

  const Format format_;
  const PanelSource<Source> source_;
  Value* const panels_;
  const int vectors_;
  const bool packed_;
};

FASTRNN_KERNELS_END
