// Pairs of bfloat16: two values that follow each other along K are one word of 32 bits, the first
// one in the lower half. So they lie in the caller's rows, and so a panel holds the weights of a
// unit: [K/2][gates][U], zero beyond the last value and the last unit.
#pragma once

#include "cpu/kernels/product/panels.h"
#include "cpu/kernels/vector/storage.h"
#include "problem/bfloat16.h"

FASTRNN_KERNELS_BEGIN

using Pair = std::uint32_t;
constexpr int kPairDepth = 2;

FASTRNN_INLINE Pair load_pair(const Bfloat16* from) {
  Pair pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return pair;
}

// A vector of pairs: `lanes` values of two rows, zeros beyond them; null: zeros.
FASTRNN_INLINE VectorOf<float>::Bits interleaved(const Bfloat16* first, const Bfloat16* second,
                                                 std::int64_t lanes) {
  using Bits = VectorOf<float>::Bits;
  Bits low{}, high{};
  if (first != nullptr) {
    const Pack<float> values = load_values(first, lanes);
    __builtin_memcpy(&low, &values.v, sizeof(low));
  }
  if (second != nullptr) {
    const Pack<float> values = load_values(second, lanes);
    __builtin_memcpy(&high, &values.v, sizeof(high));
  }
  return ((low >> 16) & 0xffff) | high;
}

// Packs a block of [K, units]: interleaves rows.
inline void pack_pair_rows(const PanelSource<Bfloat16>& source, std::int64_t block,
                           std::int64_t block_units, std::int64_t panel_rows, Pair* panel) {
  constexpr int kLanes = Pack<float>::kLanes;
  const std::int64_t first = block * block_units;
  for (std::int64_t row = 0; row < panel_rows; ++row) {
    const std::int64_t k = row * kPairDepth;
    const Bfloat16* at = source.weights + k * source.stride + first;
    for (std::int64_t u = 0; u < block_units; u += kLanes) {
      const auto pairs = interleaved(k < source.k_count ? at + u : nullptr,
                                     k + 1 < source.k_count ? at + source.stride + u : nullptr,
                                     source.units - first - u);
      __builtin_memcpy(panel + row * block_units + u, &pairs, sizeof(pairs));
    }
  }
}

// Packs a block: transposes words of two values. Rows beyond K, up to `panel_rows`, are 0.
inline void pack_pair_panel(const PanelSource<Bfloat16>& source, std::int64_t block,
                            std::int64_t block_units, std::int64_t panel_rows, Pair* panel) {
  if (!source.unit_is_row) return pack_pair_rows(source, block, block_units, panel_rows, panel);
  using Vec = Pack<float>;  // of words that are only moved
  constexpr int kLanes = Vec::kLanes;
  const std::int64_t first = block * block_units;
  const std::int64_t present = std::min(block_units, source.units - first);
  const std::int64_t width = source.gates * block_units, k_count = source.k_count;
  for (int gate = 0; gate < source.gates; ++gate) {
    for (std::int64_t u = 0; u < block_units; u += kLanes) {
      const Bfloat16* from = source.weights + (gate * source.units + first + u) * source.stride;
      const std::int64_t rows = std::clamp<std::int64_t>(present - u, 0, kLanes);
      Pair* to = panel + gate * block_units + u;
      std::int64_t k = 0;
      for (; k + kLanes * kPairDepth <= k_count; k += kLanes * kPairDepth) {
        Vec::Vector words[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          words[i] = Vec::Vector{};
          if (i < rows) __builtin_memcpy(&words[i], from + i * source.stride + k, sizeof(words[i]));
        }
        transpose<float>(words);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          __builtin_memcpy(to + (k / kPairDepth + i) * width, &words[i], sizeof(words[i]));
      }
      for (; k < k_count; k += kPairDepth) {
        for (std::int64_t i = 0; i < kLanes; ++i) {
          const Bfloat16* at = from + i * source.stride + k;
          to[k / kPairDepth * width + i] = i >= rows         ? 0
                                           : k + 1 < k_count ? load_pair(at)
                                                             : Pair(at->bits);
        }
      }
      for (std::int64_t row = divide_up(k_count, kPairDepth); row < panel_rows; ++row)
        for (std::int64_t i = 0; i < kLanes; ++i) to[row * width + i] = 0;
    }
  }
}

FASTRNN_KERNELS_END
