// Pack<T>: one vector of the instruction set as a value type for the cells (csrc/cells/math.h lists
// what a value type offers). It uses the compiler's vector extension, so the same lines compile to
// SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include "cpu/kernels/target.h"

FASTRNN_KERNELS_BEGIN

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef std::int32_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef std::int64_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};

// Load and store the first `lanes` lanes of a vector (fewer than all); the others are 0 and are not
// written. Compilers generate scalar loops here, so AVX2 and AVX-512 use intrinsics with masks.
#if FASTRNN_VECTOR_BYTES == 64
FASTRNN_INLINE __m512 load_some(const float* from, std::int64_t lanes) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), from);
}
FASTRNN_INLINE __m512d load_some(const double* from, std::int64_t lanes) {
  return _mm512_maskz_loadu_pd(__mmask8((1u << lanes) - 1), from);
}
FASTRNN_INLINE void store_some(float* to, __m512 v, std::int64_t lanes) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << lanes) - 1), v);
}
FASTRNN_INLINE void store_some(double* to, __m512d v, std::int64_t lanes) {
  _mm512_mask_storeu_pd(to, __mmask8((1u << lanes) - 1), v);
}
#elif FASTRNN_VECTOR_BYTES == 32
template <class T>
FASTRNN_INLINE __m256i first_lanes(std::int64_t lanes) {
  if constexpr (sizeof(T) == 4)
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(lanes)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTRNN_INLINE __m256 load_some(const float* from, std::int64_t lanes) {
  return _mm256_maskload_ps(from, first_lanes<float>(lanes));
}
FASTRNN_INLINE __m256d load_some(const double* from, std::int64_t lanes) {
  return _mm256_maskload_pd(from, first_lanes<double>(lanes));
}
FASTRNN_INLINE void store_some(float* to, __m256 v, std::int64_t lanes) {
  _mm256_maskstore_ps(to, first_lanes<float>(lanes), v);
}
FASTRNN_INLINE void store_some(double* to, __m256d v, std::int64_t lanes) {
  _mm256_maskstore_pd(to, first_lanes<double>(lanes), v);
}
#else
template <class T>
FASTRNN_INLINE typename VectorOf<T>::Type load_some(const T* from, std::int64_t lanes) {
  typename VectorOf<T>::Type v{};
  for (std::int64_t i = 0; i < lanes; ++i) v[i] = from[i];
  return v;
}
template <class T, class Vector>
FASTRNN_INLINE void store_some(T* to, Vector v, std::int64_t lanes) {
  for (std::int64_t i = 0; i < lanes; ++i) to[i] = v[i];
}
#endif

template <class T>
struct Pack {
  using Real = T;
  using Vector = typename VectorOf<T>::Type;
  using BitVector = typename VectorOf<T>::Bits;
  static constexpr int kLanes = FASTRNN_VECTOR_BYTES / int(sizeof(T));

  Vector v;

  Pack() = default;
  FASTRNN_INLINE Pack(Vector vector) : v(vector) {}
  explicit FASTRNN_INLINE Pack(T scalar) : v(scalar - Vector{}) {}

  static FASTRNN_INLINE Pack load(const T* from) {
    Pack p;
    __builtin_memcpy(&p.v, from, sizeof(p.v));
    return p;
  }
  FASTRNN_INLINE void store(T* to) const { __builtin_memcpy(to, &v, sizeof(v)); }

  // The first `lanes` lanes only; the others are 0 and are not written.
  static FASTRNN_INLINE Pack load(const T* from, std::int64_t lanes) {
    if (lanes >= kLanes) return load(from);
    return lanes > 0 ? Pack(Vector(load_some(from, lanes))) : Pack(T(0));
  }
  FASTRNN_INLINE void store(T* to, std::int64_t lanes) const {
    if (lanes >= kLanes) return store(to);
    if (lanes > 0) store_some(to, v, lanes);
  }

  FASTRNN_INLINE T total() const {
    T lane[kLanes];
    store(lane);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

  friend FASTRNN_INLINE Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  friend FASTRNN_INLINE Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  friend FASTRNN_INLINE Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  friend FASTRNN_INLINE Pack operator/(Pack a, Pack b) { return a.v / b.v; }
  friend FASTRNN_INLINE Pack operator-(Pack a) { return -a.v; }
  friend FASTRNN_INLINE BitVector operator>(Pack a, Pack b) { return a.v > b.v; }
  friend FASTRNN_INLINE BitVector operator>=(Pack a, Pack b) { return a.v >= b.v; }
  friend FASTRNN_INLINE Pack select(BitVector mask, Pack a, Pack b) { return mask ? a.v : b.v; }
  friend FASTRNN_INLINE Pack power_of_two(Pack shifted) {
    BitVector bits;
    __builtin_memcpy(&bits, &shifted.v, sizeof(bits));
    bits = (bits + cells::FloatFormat<T>::kExponentBias) << cells::FloatFormat<T>::kMantissaBits;
    Pack p;
    __builtin_memcpy(&p.v, &bits, sizeof(bits));
    return p;
  }
};

// A vector of int32, as many as of float.
using IntVector = VectorOf<float>::Bits;
constexpr int kIntLanes = FASTRNN_VECTOR_BYTES / 4;

FASTRNN_KERNELS_END
