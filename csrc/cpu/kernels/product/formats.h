// The formats in which this instruction set can hold w_hh in forward, by the type that it computes
// in. All other matrices are in that type.
#pragma once

#include "cpu/kernels/product/float16.h"
#include "cpu/kernels/product/native.h"

FASTRNN_KERNELS_BEGIN

template <class Format>
struct FormatTag {
  using Type = Format;
};

template <class... Formats>
struct FormatList {
  static constexpr WeightFormats kSet{Formats::kFormat...};

  // Calls function(FormatTag) for the format of the list that has this name.
  template <class Function>
  static FASTRNN_INLINE void select(WeightFormat name, Function&& function) {
    ((Formats::kFormat == name ? function(FormatTag<Formats>()) : void()), ...);
  }
};

template <class T>
struct RecurrentFormats {
  using List = FormatList<NativeFormat<T>>;
};

#if FASTRNN_VECTOR_BYTES >= 32
template <>
struct RecurrentFormats<float> {
  using List = FormatList<NativeFormat<float>, HalfFormat<Float16>>;
};
#endif

FASTRNN_KERNELS_END
