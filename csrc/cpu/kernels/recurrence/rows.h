// What both passes over a row share.
#pragma once

#include "cpu/kernels/product/weight_matrix.h"
#include "cpu/recurrence_layout.h"

FASTRNN_KERNELS_BEGIN

// The vector with zeros from lane `lanes` on.
template <class T>
FASTRNN_INLINE Pack<T> first_lanes_of(Pack<T> v, std::int64_t lanes) {
  if (lanes >= Pack<T>::kLanes) return v;
  alignas(64) T lane[Pack<T>::kLanes];
  v.store(lane);
  return Pack<T>::load(lane, lanes);
}

template <class T>
FASTRNN_INLINE T square_root(T value) {
  if constexpr (sizeof(T) == 4)
    return __builtin_sqrtf(value);
  else
    return __builtin_sqrt(value);
}

// to += v, for the first `lanes` values.
template <class T>
FASTRNN_INLINE void add_to(T* to, Pack<T> v, std::int64_t lanes) {
  (Pack<T>::load(to, lanes) + v).store(to, lanes);
}

// The rows of a row group that a rank computes after the products: every unit_groups-th one.
struct RowShare {
  std::int64_t first, step;
  RowShare(const Plan& plan, int rank) : first(rank % plan.unit_groups), step(plan.unit_groups) {}
  // The first own row from `row` on.
  std::int64_t from(std::int64_t row) const {
    return row <= first ? first : first + divide_up(row - first, step) * step;
  }
};

FASTRNN_KERNELS_END
