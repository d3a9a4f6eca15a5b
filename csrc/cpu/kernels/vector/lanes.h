// Exchanges of values between the lanes of vectors.
#pragma once

#include "cpu/kernels/vector/pack.h"

FASTRNN_KERNELS_BEGIN

// One of the log2(lanes) rounds of a transposition: swaps the lanes of a whose index has the bit
// kDistance with the lanes of b whose index does not have it.
template <class Vector, int kDistance, int... I>
FASTRNN_INLINE void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  const Vector low =
      __builtin_shufflevector(a, b, ((I & kDistance) != 0 ? kLanes + I - kDistance : I)...);
  b = __builtin_shufflevector(a, b, ((I & kDistance) != 0 ? kLanes + I : I + kDistance)...);
  a = low;
}

template <class T, int kDistance = 1>
FASTRNN_INLINE void transpose(typename Pack<T>::Vector* rows) {
  constexpr int kLanes = Pack<T>::kLanes;
  if constexpr (kDistance < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & kDistance) == 0)
        exchange<typename Pack<T>::Vector, kDistance>(rows[i], rows[i + kDistance],
                                                      std::make_integer_sequence<int, kLanes>{});
    transpose<T, 2 * kDistance>(rows);
  }
}

// Swaps lanes that are kDistance apart.
template <class Vector, int kDistance, int... I>
FASTRNN_INLINE Vector flipped(Vector v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ kDistance)...);
}

// Adds the sums of the lanes of R vectors to to[0 ... R-1] (R and the number of lanes are powers of
// two). Each round adds pairs of vectors after an exchange, which halves the number of vectors; the
// lanes of the last vector are folded.
template <class T, int R, int kDistance = 1, int kCount = R>
FASTRNN_INLINE void add_totals(typename Pack<T>::Vector* v, T* to) {
  using P = Pack<T>;
  constexpr int kLanes = std::min(P::kLanes, kCount);  // results per vector
  constexpr auto kAll = std::make_integer_sequence<int, P::kLanes>{};
  if constexpr (kDistance == P::kLanes) {
    for (int r = 0; r < R; ++r)
      (P::load(to + r * P::kLanes, kLanes) + P(v[r])).store(to + r * P::kLanes, kLanes);
  } else if constexpr (R == 1) {
    v[0] += flipped<typename P::Vector, kDistance>(v[0], kAll);
    add_totals<T, 1, 2 * kDistance, kCount>(v, to);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R / 2; ++r) {
      exchange<typename P::Vector, kDistance>(v[2 * r], v[2 * r + 1], kAll);
      v[r] = v[2 * r] + v[2 * r + 1];
    }
    add_totals<T, R / 2, 2 * kDistance, kCount>(v, to);
  }
}

FASTRNN_KERNELS_END
