// float16 and bfloat16: 16 bits in memory, float in registers. Conversions are the only operations.
// The device uses its own; the host rounds in the same way (to nearest, ties to even).
#pragma once

#include <cstdint>
#include <cstring>

#include "problem/bfloat16.h"
#include "problem/float16.h"

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

FASTRNN_HD float widen(float value) { return value; }
FASTRNN_HD double widen(double value) { return value; }

FASTRNN_HD float widen(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

FASTRNN_HD float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return widen_float16(value.bits);
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
  return {round_to_bfloat16(value)};
#endif
}

template <>
FASTRNN_HD Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return {round_to_float16(value)};
#endif
}

}  // namespace fastrnn::cuda
