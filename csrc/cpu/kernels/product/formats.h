// The formats in which this instruction set can hold w_hh in forward, by the type that it computes
// in. All other matrices are in that type.
#pragma once

#include "cpu/kernels/product/float16.h"
#include "cpu/kernels/product/native.h"

FASTRNN_KERNELS_BEGIN

template <class... Formats>
struct FormatList {
  static constexpr WeightFormats kSet{Formats::kFormat...};
};

template <class T>
struct RecurrentFormats {
  using List = FormatList<NativeFormat<T>>;
};

#if FASTRNN_VECTOR_BYTES >= 32
template <>
struct RecurrentFormats<float> {
  using List = FormatList<NativeFormat<float>, Float16Format>;
};
#endif

FASTRNN_KERNELS_END
