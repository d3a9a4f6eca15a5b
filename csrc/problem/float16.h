// A value of float16 in memory, and its conversions: to nearest, ties to even, as torch rounds.
#pragma once

#include <cstdint>
#include <cstring>

#include "cells/math.h"

namespace fastrnn {

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

FASTRNN_HD float widen_float16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal numbers normal.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

FASTRNN_HD std::uint16_t round_to_float16(float value) {
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    return 0x7fff;
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, whose unit is that of 0.5f
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return std::uint16_t(sign | half);
}

struct Float16Value {
  std::uint16_t bits;

  explicit FASTRNN_HD operator float() const { return widen_float16(bits); }
};

}  // namespace fastrnn
