// What forward and backward of a cell that computes rows see of one (cells/row_contract.h).
#pragma once

#include "cpu/kernels/recurrence/rows.h"

FASTRNN_TARGET_BEGIN
#include "cells/more_math.h"
#include "cells/row_contract.h"
FASTRNN_TARGET_END

FASTRNN_KERNELS_BEGIN

// The part that does not depend on the pass. T: float or double.
template <class T>
struct AnyRow {
  using Value = Pack<T>;
  static constexpr int kLanes = Value::kLanes;

  std::int64_t hidden;
  T* buffers;                  // [K, buffer_stride]
  std::int64_t buffer_stride;  // a multiple of the lanes

  FASTRNN_INLINE Value units() const { return Value(T(hidden)); }
  FASTRNN_INLINE Value total(Value sum) const { return Value(sum.total()); }
  FASTRNN_INLINE Value lowest() const { return Value(-std::numeric_limits<T>::infinity()); }
  FASTRNN_INLINE Value largest(Value value) const {
    alignas(64) T lane[kLanes];
    value.store(lane);
    T result = lane[0];
    for (int i = 1; i < kLanes; ++i) result = cells::maximum(result, lane[i]);
    return Value(result);
  }
};

// A vector of units. kWhole: all lanes are units of the row.
template <class T, bool kWhole>
struct AnyPlace {
  using Value = Pack<T>;

  std::int64_t unit, left;  // the first unit, and the units from there on

  FASTRNN_INLINE Value load(const T* from) const {
    return kWhole ? Value::load(from + unit) : Value::load(from + unit, left);
  }
  FASTRNN_INLINE void store(Value value, T* to) const {
    if constexpr (kWhole)
      value.store(to + unit);
    else
      value.store(to + unit, left);
  }
  FASTRNN_INLINE void add(Value& sum, Value value) const {
    sum = sum + (kWhole ? value : first_lanes_of(value, left));
  }
  FASTRNN_INLINE void raise(Value& largest, Value value) const {
    if constexpr (kWhole) {
      largest = cells::maximum(largest, value);
    } else {
      alignas(64) T lane[Value::kLanes], before[Value::kLanes];
      value.store(lane);
      largest.store(before);
      for (int i = 0; i < Value::kLanes; ++i)
        if (i < left) before[i] = cells::maximum(before[i], lane[i]);
      largest = Value::load(before);
    }
  }
};

FASTRNN_KERNELS_END
