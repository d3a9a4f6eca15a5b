// The square root of a vector, as a function of cells (cells/more_math.h).
#pragma once

#include "cpu/kernels/recurrence/rows.h"

FASTRNN_KERNELS_BEGIN

// (GCC warns about the intrinsics without masks.)
#if FASTRNN_VECTOR_BYTES == 64
FASTRNN_INLINE Pack<float> sqrt(Pack<float> x) {
  return {_mm512_maskz_sqrt_ps(__mmask16(-1), x.v)};
}
FASTRNN_INLINE Pack<double> sqrt(Pack<double> x) {
  return {_mm512_maskz_sqrt_pd(__mmask8(-1), x.v)};
}
#elif FASTRNN_VECTOR_BYTES == 32
FASTRNN_INLINE Pack<float> sqrt(Pack<float> x) { return {_mm256_sqrt_ps(x.v)}; }
FASTRNN_INLINE Pack<double> sqrt(Pack<double> x) { return {_mm256_sqrt_pd(x.v)}; }
#else
template <class T>
FASTRNN_INLINE Pack<T> sqrt(Pack<T> x) {
  for (int i = 0; i < Pack<T>::kLanes; ++i) x.v[i] = square_root(T(x.v[i]));
  return x;
}
#endif

FASTRNN_KERNELS_END
