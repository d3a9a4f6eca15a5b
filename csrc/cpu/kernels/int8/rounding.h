// Rounds float32 values to bytes: value = scale (byte - zero_point).
#pragma once

#include "cpu/kernels/int8/product.h"

FASTRNN_KERNELS_BEGIN

typedef std::uint8_t ByteVector __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 4)));

// round(values * inverse) + zero_point in the low bits of each lane, rounded to even. Adding
// 1.5 * 2^23 leaves the integer in the mantissa, so NaN and infinities give some integer instead of
// undefined behaviour.
FASTRNN_INLINE IntVector rounded(Pack<float> values, Pack<float> inverse, IntVector zero_point) {
  const Pack<float> shifted =
      values * inverse + Pack<float>(cells::FloatFormat<float>::kRoundingShift);
  IntVector bits;
  __builtin_memcpy(&bits, &shifted.v, sizeof(bits));
  return bits - 0x4b400000 + zero_point;
}

FASTRNN_INLINE void store_bytes(std::uint8_t* to, IntVector values) {
#if FASTRNN_VECTOR_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_maskz_cvtepi32_epi8(__mmask16(0xffff), __m512i(values)));
#else
  const ByteVector bytes = __builtin_convertvector(values, ByteVector);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
#endif
}

// Rounds a row to bytes with its own scale and zero point: the range of its values and zero is cut
// into 255 steps, and zero is exact. A row that holds NaN or an infinity, or whose range is
// infinite, gets the scale NaN: all its products become NaN. `to` must have room for whole vectors.
inline void round_row(const float* row, std::int64_t count, std::uint8_t* to, float& scale,
                      std::int32_t& zero_point) {
  using P = Pack<float>;
  P low(0.0f), high(0.0f), wrong(0.0f);
  for (std::int64_t i = 0; i < count; i += P::kLanes) {
    const P v = P::load(row + i, count - i);
    low = select(low > v, v, low);
    high = select(v > high, v, high);
    wrong = wrong + v * P(0.0f);  // NaN for NaN and infinities
  }
  float lows[P::kLanes], highs[P::kLanes];
  low.store(lows);
  high.store(highs);
  for (int i = 1; i < P::kLanes; ++i) {
    lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
    highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
  }
  const float range = highs[0] - lows[0];
  const bool is_finite = range <= std::numeric_limits<float>::max() && wrong.total() == 0.0f;
  constexpr float kLeastRange = 1e-30f;  // below, 255 / range would not be finite: counts as zero
  const float inverse = is_finite && range > kLeastRange ? 255.0f / range : 0.0f;
  scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : range * (1.0f / 255.0f);
  const P inverses(inverse);
  const float zero = -lows[0] * inverse;
  zero_point = is_finite ? std::int32_t(zero + 0.5f) : 0;
  const IntVector zeros = zero_point - IntVector{};
  for (std::int64_t i = 0; i < count; i += P::kLanes) {
    IntVector v = rounded(P::load(row + i, count - i), inverses, zeros);
    v = v < 0 ? IntVector{} : v;
    v = v > 255 ? 255 - IntVector{} : v;
    store_bytes(to + i, v);
  }
}

FASTRNN_KERNELS_END
