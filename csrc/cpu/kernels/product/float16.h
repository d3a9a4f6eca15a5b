// Weights as float16: |w' - w| <= 2^-11 |w| + 2^-25.
//
// Only x86-64 with F16C (and AVX2) or AVX-512 has loads that widen.
#pragma once

#include "cpu/kernels/product/half.h"

#if FASTRNN_VECTOR_BYTES >= 32
FASTRNN_KERNELS_BEGIN

// Loads float16 values into a vector of float32 of kBytes bytes.
template <int kBytes>
struct Float16Vector;
template <>
struct Float16Vector<32> {
  typedef float Vector __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
  static FASTRNN_INLINE Vector load(const Half* from) {
    return Vector(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
};
#if FASTRNN_VECTOR_BYTES == 64
template <>
struct Float16Vector<64> {
  typedef float Vector __attribute__((vector_size(64)));
  static constexpr int kLanes = 16;
  static FASTRNN_INLINE Vector load(const Half* from) {
    // a mask of all lanes: GCC warns of undefined values for the form without a mask
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vector(_mm512_maskz_cvtph_ps(__mmask16(-1), halves));
  }
};
#endif

// A half type (half.h).
struct Float16 {
  static constexpr WeightFormat kFormat = WeightFormat::kFloat16;

  // Rounds to the nearest, ties to even. A finite value beyond the range of float16 becomes the
  // largest float16, not infinity; infinities and NaN stay as they are.
  static FASTRNN_INLINE void store(Pack<float> value, Half* to) {
    const Pack<float> largest(65504), finite(std::numeric_limits<float>::max());
    value = select((value > largest) & ~(value > finite), largest, value);
    value = select((-value > largest) & ~(-value > finite), -largest, value);
#if FASTRNN_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(__mmask16(-1), value.v, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT));
#endif
  }

  static HalfTile tile(int vectors) {
#if FASTRNN_VECTOR_BYTES == 64
    if (!widens_by_halves()) return half_tile_function<Float16Vector<64>>(vectors);
#endif
    return half_tile_function<Float16Vector<32>>(vectors);
  }
};

FASTRNN_KERNELS_END
#endif
