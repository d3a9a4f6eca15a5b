// A value of bfloat16 in memory: the upper half of a float32. Rounded to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "cells/math.h"

namespace fastrnn {

FASTRNN_HD std::uint16_t round_to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Bfloat16 {
  std::uint16_t bits;

  explicit FASTRNN_HD operator float() const {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

}  // namespace fastrnn
