// The product of bytes and int8 panels for a tile of rows and one vector of units, in vectors of
// quads: 4 values along K per unit.
//
// The sums are exact on every instruction set. vpmaddubsw, the obvious instruction of AVX2, adds
// pairs of products in 16 bits and saturates: two products of 255 * 127 do not fit. So without
// VNNI, bytes are widened to 16 bits and vpmaddwd adds pairs of products in 32 bits.
#pragma once

#include "cpu/kernels/vector/pack.h"

#include "cpu/isa/int8.h"

FASTRNN_KERNELS_BEGIN

// One vector of a panel (per unit, 4 weights next to each other), and 4 bytes of a row in every
// lane, as `multiply_add` needs them.
#if defined(FASTRNN_VNNI)
struct QuadWeights {
  __m512i all;
  QuadWeights() = default;
  explicit FASTRNN_INLINE QuadWeights(const std::int8_t* from) : all(_mm512_loadu_si512(from)) {}
};
struct QuadBytes {
  __m512i all;
  explicit FASTRNN_INLINE QuadBytes(std::int32_t bytes) : all(_mm512_set1_epi32(bytes)) {}
};
FASTRNN_INLINE void multiply_add(IntVector& sum, const QuadBytes& bytes, const QuadWeights& w) {
  sum = IntVector(_mm512_dpbusd_epi32(__m512i(sum), bytes.all, w.all));
}
constexpr int kSumLatency = 10;  // sums that keep the multipliers busy
#else
#if defined(__x86_64__)
#if FASTRNN_VECTOR_BYTES == 64
FASTRNN_INLINE IntVector pairs(IntVector a, IntVector b) {
  return IntVector(_mm512_madd_epi16(__m512i(a), __m512i(b)));
}
#elif FASTRNN_VECTOR_BYTES == 32
FASTRNN_INLINE IntVector pairs(IntVector a, IntVector b) {
  return IntVector(_mm256_madd_epi16(__m256i(a), __m256i(b)));
}
#else
FASTRNN_INLINE IntVector pairs(IntVector a, IntVector b) {
  return IntVector(_mm_madd_epi16(__m128i(a), __m128i(b)));
}
#endif
#else
// a0 b0 + a1 b1 of the two halves of each lane.
FASTRNN_INLINE IntVector pairs(IntVector a, IntVector b) {
  return (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
}
#endif
typedef std::int16_t ShortVector __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

struct QuadWeights {
  IntVector even, odd;  // weights 0 and 2, and 1 and 3, in 16 bits each
  QuadWeights() = default;
  explicit FASTRNN_INLINE QuadWeights(const std::int8_t* from) {
    ShortVector both;
    __builtin_memcpy(&both, from, sizeof(both));
    even = IntVector((both << 8) >> 8);
    odd = IntVector(both >> 8);
  }
};
struct QuadBytes {
  IntVector even, odd;
  explicit FASTRNN_INLINE QuadBytes(std::int32_t bytes)
      : even((bytes & 0x00ff00ff) - IntVector{}),
        odd((std::int32_t(std::uint32_t(bytes) >> 8) & 0x00ff00ff) - IntVector{}) {}
};
FASTRNN_INLINE void multiply_add(IntVector& sum, const QuadBytes& bytes, const QuadWeights& w) {
  sum += pairs(bytes.even, w.even) + pairs(bytes.odd, w.odd);
}
constexpr int kSumLatency = 2;
#endif

// Rows of a tile, so that its sums stay in registers.
template <int G>
constexpr int int8_tile_rows() {
#if defined(FASTRNN_VNNI)
  return G == 4 ? 6 : G == 3 ? 8 : 12;
#else
  return FASTRNN_REGISTERS == 32 ? (G == 1 ? 8 : 4) : (G == 1 ? 4 : 2);
#endif
}

// Parts of K with sums of their own: too few chains of sums would wait for each other.
constexpr int int8_parts(int chains) {
  return chains >= kSumLatency ? 1 : 2 * chains >= kSumLatency ? 2 : 2 * chains >= 8 ? 2 : 4;
}

// sums_out[m][g] = sum_k bytes[m][k] q[g][k] - zero_points[m] sums[g] for M rows, G gates and the
// units of one vector. panel, sums: at the first of these units.
template <int G, int M>
void int8_tile(const std::int8_t* panel, const std::int32_t* sums, std::int64_t quads,
               const std::uint8_t* bytes, std::int64_t bytes_stride,
               const std::int32_t* zero_points, IntVector* sums_out) {
  constexpr int kParts = int8_parts(G * M);
  constexpr std::int64_t kQuad = G * kInt8Units * kInt8Depth;  // bytes of a quad in the panel
  IntVector acc[kParts][M][G];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
    IntVector sum;
    __builtin_memcpy(&sum, sums + g * kInt8Units, sizeof(sum));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      acc[0][m][g] = sum * (-zero_points[m] - IntVector{});
#pragma GCC unroll 4
      for (int p = 1; p < kParts; ++p) acc[p][m][g] = IntVector{};
    }
  }
  const auto add = [&](std::int64_t k, int p) __attribute__((always_inline)) {
    const std::int8_t* from = panel + k * kQuad;
    if constexpr (M == 1) {
      std::int32_t four;
      __builtin_memcpy(&four, bytes + k * kInt8Depth, sizeof(four));
      const QuadBytes row(four);
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g)
        multiply_add(acc[p][0][g], row, QuadWeights(from + g * kInt8Units * kInt8Depth));
    } else {
      QuadWeights weights[G];
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) weights[g] = QuadWeights(from + g * kInt8Units * kInt8Depth);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        std::int32_t four;
        __builtin_memcpy(&four, bytes + m * bytes_stride + k * kInt8Depth, sizeof(four));
        const QuadBytes row(four);
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) multiply_add(acc[p][m][g], row, weights[g]);
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kParts <= quads; k += kParts) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) add(k + p, p);
  }
  for (; k < quads; ++k) add(k, 0);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      IntVector sum = acc[0][m][g];
#pragma GCC unroll 4
      for (int p = 1; p < kParts; ++p) sum += acc[p][m][g];
      sums_out[m * G + g] = sum;
    }
  }
}

using Int8Tile = void (*)(const std::int8_t*, const std::int32_t*, std::int64_t,
                          const std::uint8_t*, std::int64_t, const std::int32_t*, IntVector*);

template <int G, int... M>
constexpr std::array<Int8Tile, sizeof...(M)> int8_tiles(std::integer_sequence<int, M...>) {
  return {int8_tile<G, M + 1>...};
}

// Tiles by their number of rows - 1.
template <int G>
constexpr auto kInt8Tiles = int8_tiles<G>(std::make_integer_sequence<int, int8_tile_rows<G>()>{});

template <int G>
FASTRNN_INLINE void multiply_bytes(int rows, const Int8Block& block, const std::uint8_t* bytes,
                                   std::int64_t bytes_stride, const std::int32_t* zero_points,
                                   IntVector* sums_out) {
  kInt8Tiles<G>[rows - 1](block.panel, block.sums, block.quads, bytes, bytes_stride, zero_points,
                          sums_out);
}

// Calls body(row, count) for the tiles of rows [begin, end), of nearly the same height.
template <int G, class Body>
FASTRNN_INLINE void for_each_int8_tile(std::int64_t begin, std::int64_t end, Body&& body) {
  if (begin >= end) return;
  const std::int64_t tiles = divide_up(end - begin, int8_tile_rows<G>());
  const std::int64_t height = divide_up(end - begin, tiles);
  for (std::int64_t row = begin; row < end; row += height)
    body(row, int(std::min(height, end - row)));
}

FASTRNN_INLINE void finish_int8() {}

FASTRNN_KERNELS_END
