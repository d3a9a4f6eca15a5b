// The microkernel for unpacked weights, a unit per row: K runs along the lanes of vectors, and the
// lanes are summed at the end.
//
//   c[m][r] += sum_k a[m][k] w[r][k]        M rows, R units
//
// Each loaded vector of w serves M rows, each vector of a serves R units.
#pragma once

#include "cpu/kernels/vector/lanes.h"

FASTRNN_KERNELS_BEGIN

// Rows and units of a dot, such that the sums and the loaded vectors fit in the registers. A single
// row takes twice the units, so that enough sums are in progress to hide the latency of an
// addition.
#if FASTRNN_REGISTERS >= 32
constexpr int kDotRows = FASTRNN_VECTOR_BYTES == 16 ? 4 : 6;
#else
constexpr int kDotRows = FASTRNN_VECTOR_BYTES == 16 ? 2 : 3;
#endif
constexpr int dot_units(int m) { return m == 1 ? 8 : 4; }

// The products of `lanes` steps along K.
template <class T, int M, int R>
FASTRNN_INLINE void add_products(typename Pack<T>::Vector (&sum)[M][R], const T* a,
                                 std::int64_t a_stride, const T* w, std::int64_t w_stride,
                                 std::int64_t lanes) {
  using P = Pack<T>;
  typename P::Vector value[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) value[m] = P::load(a + m * a_stride, lanes).v;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename P::Vector weight = P::load(w + r * w_stride, lanes).v;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[m][r] += value[m] * weight;
  }
}

template <class T, int M, int R>
void dot(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* w, std::int64_t w_stride,
         T* c, std::int64_t c_stride) {
  using P = Pack<T>;
  typename P::Vector sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[m][r] = typename P::Vector{};
  }
  std::int64_t k = 0;
  for (; k + P::kLanes <= k_count; k += P::kLanes)
    add_products<T, M, R>(sum, a + k, a_stride, w + k, w_stride, P::kLanes);
  if (k < k_count) add_products<T, M, R>(sum, a + k, a_stride, w + k, w_stride, k_count - k);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) add_totals<T, R>(sum[m], c + m * c_stride);
}

template <class T>
using DotFunction = void (*)(std::int64_t k_count, const T* a, std::int64_t a_stride, const T* w,
                             std::int64_t w_stride, T* c, std::int64_t c_stride);

template <class T, int... M>
FASTRNN_INLINE void dots_of(int rows, std::int64_t units, std::int64_t k_count, const T* a,
                            std::int64_t a_stride, const T* w, std::int64_t w_stride, T* c,
                            std::int64_t c_stride, std::integer_sequence<int, M...>) {
  static constexpr DotFunction<T> kMany[] = {dot<T, M + 1, dot_units(M + 1)>...};
  static constexpr DotFunction<T> kOne[] = {dot<T, M + 1, 1>...};
  const int each = dot_units(rows);
  std::int64_t r = 0;
  for (; r + each <= units; r += each)
    kMany[rows - 1](k_count, a, a_stride, w + r * w_stride, w_stride, c + r, c_stride);
  for (; r < units; ++r)
    kOne[rows - 1](k_count, a, a_stride, w + r * w_stride, w_stride, c + r, c_stride);
}

// c [rows, units] += a [rows, K] w [units, K]^T, for at most kDotRows rows.
template <class T>
void dots(int rows, std::int64_t units, std::int64_t k_count, const T* a, std::int64_t a_stride,
          const T* w, std::int64_t w_stride, T* c, std::int64_t c_stride) {
  dots_of(rows, units, k_count, a, a_stride, w, w_stride, c, c_stride,
          std::make_integer_sequence<int, kDotRows>{});
}

FASTRNN_KERNELS_END
