// The peak rate of multiply-adds: as many independent chains in registers as hide the latency of
// one. No memory and no cell is involved.
#pragma once

#include "cpu/kernels/vector/pack.h"

FASTRNN_KERNELS_BEGIN

constexpr int kPeakChains = FASTRNN_REGISTERS * 3 / 4;

// x = x * factor + term, `rounds` times in every chain: 2 * kPeakChains * V * rounds operations.
// The result depends on all of them, so that the compiler removes none.
float multiply_add_chains(std::int64_t rounds, float factor, float term) {
  using P = Pack<float>;
  typename P::Vector chain[kPeakChains];
#pragma GCC unroll 32
  for (int i = 0; i < kPeakChains; ++i) chain[i] = P(float(i)).v;
  const typename P::Vector f = P(factor).v, t = P(term).v;
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kPeakChains; ++i) chain[i] = chain[i] * f + t;
  }
#pragma GCC unroll 32
  for (int i = 1; i < kPeakChains; ++i) chain[0] += chain[i];
  return P(chain[0]).total();
}

constexpr double kPeakFlops = 2.0 * kPeakChains * Pack<float>::kLanes;

FASTRNN_KERNELS_END
