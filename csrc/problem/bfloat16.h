// A value of bfloat16 in memory: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "cells/math.h"

namespace fastrnn {

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
