// The microkernel: a tile of C += A B in registers.
//
//       k ->       columns of one panel: n vectors of V lanes
//   A [m rows]  *  B [K][n*V], rows b_stride apart   +->   C [m rows], vector i at column[i]
//
// Per k it loads n vectors of B (usually of a packed panel) and broadcasts m values of A for m*n
// multiply-adds. C is memory (a scratch tile in L1, or a buffer), so the following step, the cell's
// pointwise code or another product, finds all gates of its units side by side. column[] lets the
// two products of a GRU add into different columns (r,z,xn and r,z,hn). The sum starts from zero
// and is added to C at the end, so splitting K limits rounding error.
#pragma once

#include "cpu/kernels/product/tile_shape.h"
#include "cpu/kernels/vector/pack.h"

FASTRNN_KERNELS_BEGIN

template <class T>
using TileFunction = void (*)(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* b,
                              std::int64_t b_stride, T* c, std::int64_t c_stride,
                              const int* column);

// kPrefetches: each step along K also loads the cache line at `next` into the private cache, and
// moves `next` on by next_step bytes.
// kChains: number of independent sums per element, see tile_chains.
template <class T, int M, int N, int kChains, bool kPrefetches>
FASTRNN_INLINE void tile_body(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* b,
                              std::int64_t b_stride, T* c, std::int64_t c_stride, const int* column,
                              [[maybe_unused]] const char* next,
                              [[maybe_unused]] std::int64_t next_step) {
  using P = Pack<T>;
  using Vector = typename P::Vector;
  constexpr int V = P::kLanes;
  // A step holds its vectors of B in registers or, where these do not fit, its values of A.
  constexpr int kOthers = FASTRNN_VECTOR_BYTES == 16 ? 2 : 1;  // a broadcast, SSE2's product
  constexpr bool kHoldRows = M < N && kChains * M * N + N + kOthers > FASTRNN_REGISTERS;
  Vector sum[kChains][M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
      for (int chain = 0; chain < kChains; ++chain) sum[chain][m][n] = Vector{};
    }
  }
  const T* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) row[m] = a + m * a_stride;

  std::int64_t k = 0;
  for (; k + kChains <= k_count; k += kChains) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      if constexpr (kPrefetches) {
        __builtin_prefetch(next, 0, kPrivateCacheHint);
        next += next_step;
      }
      if constexpr (kHoldRows) {
        Vector value[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) value[m] = P(row[m][k + chain]).v;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const Vector weight = P::load(b + n * V).v;
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) sum[chain][m][n] += value[m] * weight;
        }
        b += b_stride;
      } else {
        Vector weight[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) weight[n] = P::load(b + n * V).v;
        b += b_stride;  // after the products, GCC would load a vector again for each row
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vector value = P(row[m][k + chain]).v;
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) sum[chain][m][n] += value * weight[n];
        }
      }
    }
  }
  if constexpr (kChains > 1) {
    for (; k < k_count; ++k) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vector value = P(row[m][k]).v;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[0][m][n] += value * P::load(b + n * V).v;
      }
      b += b_stride;
    }
  }

#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Vector total = sum[0][m][n];
#pragma GCC unroll 16
      for (int chain = 1; chain < kChains; ++chain) total += sum[chain][m][n];
      T* at = c + m * c_stride + column[n];
      (P::load(at) + P(total)).store(at);
    }
  }
}

template <class T, int M, int N>
void tile(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* b,
          std::int64_t b_stride, T* c, std::int64_t c_stride, const int* column) {
  tile_body<T, M, N, tile_chains(M, N), false>(k_count, a, a_stride, b, b_stride, c, c_stride,
                                               column, nullptr, 0);
}

// tile<T, m, n> for m = 1 ... tile_rows(n).
template <class T, int N, std::size_t... M>
constexpr std::array<TileFunction<T>, sizeof...(M)> tile_table(std::index_sequence<M...>) {
  return {{tile<T, int(M) + 1, N>...}};
}

template <class T>
FASTRNN_INLINE TileFunction<T> tile_function(int m, int n) {
  static constexpr auto kOne = tile_table<T, 1>(std::make_index_sequence<tile_rows(1)>{});
  static constexpr auto kTwo = tile_table<T, 2>(std::make_index_sequence<tile_rows(2)>{});
  static constexpr auto kThree = tile_table<T, 3>(std::make_index_sequence<tile_rows(3)>{});
  static constexpr auto kFour = tile_table<T, 4>(std::make_index_sequence<tile_rows(4)>{});
  static constexpr const TileFunction<T>* kTables[] = {kOne.data(), kTwo.data(), kThree.data(),
                                                       kFour.data()};
  return kTables[n - 1][m - 1];
}

// The same product with one sum per element for any number of rows: the bits of a row do not depend
// on the tile that computes it.
template <class T, int M, int N>
void steady_tile(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* b,
                 std::int64_t b_stride, T* c, std::int64_t c_stride, const int* column) {
  tile_body<T, M, N, 1, false>(k_count, a, a_stride, b, b_stride, c, c_stride, column, nullptr, 0);
}

template <class T, int M, int N>
constexpr TileFunction<T> steady_tile_of() {
  if constexpr (tile_chains(M, N) == 1) {
    return tile<T, M, N>;
  } else {
    return steady_tile<T, M, N>;
  }
}

template <class T, int N, std::size_t... M>
constexpr std::array<TileFunction<T>, sizeof...(M)> steady_table(std::index_sequence<M...>) {
  return {{steady_tile_of<T, int(M) + 1, N>()...}};
}

template <class T>
FASTRNN_INLINE TileFunction<T> steady_tile_function(int m, int n) {
  static constexpr auto kOne = steady_table<T, 1>(std::make_index_sequence<tile_rows(1)>{});
  static constexpr auto kTwo = steady_table<T, 2>(std::make_index_sequence<tile_rows(2)>{});
  static constexpr auto kThree = steady_table<T, 3>(std::make_index_sequence<tile_rows(3)>{});
  static constexpr auto kFour = steady_table<T, 4>(std::make_index_sequence<tile_rows(4)>{});
  static constexpr const TileFunction<T>* kTables[] = {kOne.data(), kTwo.data(), kThree.data(),
                                                       kFour.data()};
  return kTables[n - 1][m - 1];
}

// The same product, which loads memory that is needed later.
template <class T>
using PrefetchingTile = void (*)(std::int64_t k_count, const T* a, std::int64_t a_stride,
                                 const T* b, std::int64_t b_stride, T* c, std::int64_t c_stride,
                                 const int* column, const char* next, std::int64_t next_step);

template <class T, int M, int N>
void prefetching_tile(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* b,
                      std::int64_t b_stride, T* c, std::int64_t c_stride, const int* column,
                      const char* next, std::int64_t next_step) {
  tile_body<T, M, N, tile_chains(M, N), true>(k_count, a, a_stride, b, b_stride, c, c_stride,
                                              column, next, next_step);
}

template <class T, int N, std::size_t... M>
constexpr std::array<PrefetchingTile<T>, sizeof...(M)> prefetching_table(
    std::index_sequence<M...>) {
  return {{prefetching_tile<T, int(M) + 1, N>...}};
}

// The prefetching tile of m rows and n vectors, or null where there is none. Weights that exceed a
// private cache are in wide panels of float32, with vectors of at least 32 bytes.
template <class T>
FASTRNN_INLINE PrefetchingTile<T> prefetching_tile_function(int m, int n) {
  if constexpr (sizeof(T) == 4 && FASTRNN_VECTOR_BYTES >= 32) {
    static constexpr auto kThree =
        prefetching_table<T, 3>(std::make_index_sequence<tile_rows(3)>{});
    static constexpr auto kFour = prefetching_table<T, 4>(std::make_index_sequence<tile_rows(4)>{});
    if (n == 3) return kThree[m - 1];
    if (n == 4) return kFour[m - 1];
  }
  return nullptr;
}

// Memory that a product loads into the private cache on the side.
struct Prefetch {
  const char* next = nullptr;
  const char* end = nullptr;
  std::int64_t step = 0;  // bytes per step along K; 0: nothing
};

// Number of tiles of for_each_tile.
FASTRNN_INLINE std::int64_t tile_count(std::int64_t begin, std::int64_t end, int most) {
  return end > begin ? (end - begin + most - 1) / most : 0;
}
// Calls each(first, count) for the tiles of rows [begin, end): as few tiles of at most `most` rows
// as possible, of nearly equal heights.
template <class Each>
FASTRNN_INLINE void for_each_tile(std::int64_t begin, std::int64_t end, int most, Each&& each) {
  const std::int64_t rows = end - begin;
  if (rows <= 0) return;
  const std::int64_t tiles = tile_count(begin, end, most);
  for (std::int64_t i = 0, first = begin; i < tiles; ++i) {
    const std::int64_t count = rows / tiles + (i < rows % tiles ? 1 : 0);
    each(first, int(count));
    first += count;
  }
}

FASTRNN_KERNELS_END
