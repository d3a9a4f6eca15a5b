// float16 and bfloat16: 16 bits in memory, float in registers. Conversions are the only operations.
// The device uses its own; the host rounds in the same way (to nearest, ties to even).
#pragma once

#include <cstdint>
#include <cstring>

#include "cells/math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastrnn::cuda {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The type in which values of S are computed and added.
template <class S>
struct AccumulateOf {
  using Type = S;
};
template <>
struct AccumulateOf<Float16> {
  using Type = float;
};
template <>
struct AccumulateOf<BFloat16> {
  using Type = float;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::Type;

FASTRNN_HD std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
FASTRNN_HD float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTRNN_HD float widen(float value) { return value; }
FASTRNN_HD double widen(double value) { return value; }

FASTRNN_HD float widen(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

FASTRNN_HD float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal numbers normal.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
#endif
}

// S(value) for a value of the accumulate type.
template <class S>
FASTRNN_HD S narrow(Accumulate<S> value) {
  return value;
}

template <>
FASTRNN_HD BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
FASTRNN_HD Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    return {0x7fff};
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, whose unit is that of 0.5f
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {std::uint16_t(sign | half)};
#endif
}

}  // namespace fastrnn::cuda
