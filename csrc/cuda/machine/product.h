// The matrix product that a machine offers to schedules.
#pragma once

#include <cstdint>

namespace fastrnn::cuda {

// c [m, n] = a [m, k] w^T for w [n, k] (transposed) or a w for w [k, n]; `add` keeps what c holds.
// Everything is row-major with the given distances between rows. k = 0 makes zeros.
template <class S, class C>
struct Product {
  std::int64_t m, n, k;
  const S* a;
  std::int64_t a_stride;
  const S* w;
  std::int64_t w_stride;
  bool transposed;
  C* c;
  std::int64_t c_stride;
  bool add;
};

}  // namespace fastrnn::cuda
