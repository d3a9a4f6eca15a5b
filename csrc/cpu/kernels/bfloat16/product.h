// Weights in bfloat16 as they are stored, multiplied with rows of bfloat16 and added in float32.
//
// A step along K is a pair of values (pairs.h) of a row and of each unit:
//
//   sum += a[k] w[k] + a[k+1] w[k+1]
//
// AVX512_BF16 has an instruction for this, vdpbf16ps. It treats denormal numbers as zero and rounds
// each sum to the nearest. Elsewhere the two halves of a pair are widened to float32 with a shift
// and a mask: one load serves two steps along K, where a step waits for weights.
//
// Both products are exact before a sum is rounded, except for denormal numbers.
#pragma once

#include "cpu/kernels/bfloat16/pairs.h"

#include "cpu/isa/bfloat16.h"

FASTRNN_KERNELS_BEGIN

using PairVector = VectorOf<float>::Bits;
using SumVector = VectorOf<float>::Type;

FASTRNN_INLINE PairVector load_pairs(const Pair* from) {
  PairVector pairs;
  __builtin_memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}

#if defined(FASTRNN_BF16_DOT)
constexpr Bfloat16Product kPairProduct = Bfloat16Product::kDot;

// A vector of pairs, as multiply_add needs it.
struct PairOperand {
  __m512bh both;
  PairOperand() = default;
  explicit FASTRNN_INLINE PairOperand(PairVector pairs) : both(__m512bh(pairs)) {}
  // The same pair in each lane.
  explicit FASTRNN_INLINE PairOperand(Pair pair)
      : both(__m512bh(std::int32_t(pair) - PairVector{})) {}
};
FASTRNN_INLINE void multiply_add(SumVector& sum, const PairOperand& a, const PairOperand& w) {
  sum = SumVector(_mm512_dpbf16_ps(__m512(sum), a.both, w.both));
}
#else
constexpr Bfloat16Product kPairProduct = Bfloat16Product::kWidened;

struct PairOperand {
  SumVector first, second;
  PairOperand() = default;
  explicit FASTRNN_INLINE PairOperand(PairVector pairs)
      : first(SumVector(pairs << 16)), second(SumVector(pairs & std::int32_t(0xffff0000u))) {}
  explicit FASTRNN_INLINE PairOperand(Pair pair) {
    // opaque: GCC would shift the scalar and broadcast it twice, from integer registers
    PairVector pairs = std::int32_t(pair) - PairVector{};
    asm("" : "+x"(pairs));
    *this = PairOperand(pairs);
  }
};
FASTRNN_INLINE void multiply_add(SumVector& sum, const PairOperand& a, const PairOperand& w) {
  sum += a.first * w.first;
  sum += a.second * w.second;
}
#endif

// The microkernel. C [M rows], vector i at column[i], += A [M, K] B, B [K/2][N] vectors, rows
// b_stride apart.
template <int M, int N>
void pair_tile(std::int64_t k_count, const Bfloat16* a, std::int64_t a_stride, const Pair* b,
               std::int64_t b_stride, float* c, std::int64_t c_stride, const int* column) {
  constexpr int V = Pack<float>::kLanes;
  constexpr int kChains = pair_chains(M, N);
  SumVector sum[kChains][M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
      for (int chain = 0; chain < kChains; ++chain) sum[chain][m][n] = SumVector{};
    }
  }
  const Bfloat16* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) row[m] = a + m * a_stride;

  // `pair(m)`: the pair of row m. Holds whichever side of the product has fewer registers.
  const auto add = [&](SumVector(&to)[M][N], const auto& pair) __attribute__((always_inline)) {
#if defined(FASTRNN_BF16_DOT)
    constexpr bool kHoldRows = M < N;
#else
    constexpr bool kHoldRows = true;
#endif
    if constexpr (kHoldRows) {
      PairOperand value[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) value[m] = PairOperand(pair(m));
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const PairOperand weight(load_pairs(b + n * V));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) multiply_add(to[m][n], value[m], weight);
      }
      b += b_stride;
    } else {
      PairOperand weight[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) weight[n] = PairOperand(load_pairs(b + n * V));
      b += b_stride;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const PairOperand value(pair(m));
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) multiply_add(to[m][n], value, weight[n]);
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kChains * kPairDepth <= k_count; k += kChains * kPairDepth) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain)
      add(sum[chain], [&](int m) __attribute__((always_inline)) {
        return load_pair(row[m] + k + chain * kPairDepth);
      });
  }
  if constexpr (kChains > 1) {
    for (; k + kPairDepth <= k_count; k += kPairDepth)
      add(sum[0], [&](int m) __attribute__((always_inline)) { return load_pair(row[m] + k); });
  }
  if (k < k_count)  // the last value of an odd K; the panel holds 0 beyond it
    add(sum[0], [&](int m) __attribute__((always_inline)) { return Pair(row[m][k].bits); });

#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      SumVector total = sum[0][m][n];
#pragma GCC unroll 16
      for (int chain = 1; chain < kChains; ++chain) total += sum[chain][m][n];
      float* at = c + m * c_stride + column[n];
      (Pack<float>::load(at) + Pack<float>(total)).store(at);
    }
  }
}

using PairTile = void (*)(std::int64_t k_count, const Bfloat16* a, std::int64_t a_stride,
                          const Pair* b, std::int64_t b_stride, float* c, std::int64_t c_stride,
                          const int* column);

// pair_tile<m, n> for m = 1 ... pair_rows(n).
template <int N, std::size_t... M>
constexpr std::array<PairTile, sizeof...(M)> pair_table(std::index_sequence<M...>) {
  return {{pair_tile<int(M) + 1, N>...}};
}

FASTRNN_INLINE PairTile pair_tile_function(int m, int n) {
  static constexpr auto kOne = pair_table<1>(std::make_index_sequence<pair_rows(1)>{});
  static constexpr auto kTwo = pair_table<2>(std::make_index_sequence<pair_rows(2)>{});
  static constexpr auto kThree = pair_table<3>(std::make_index_sequence<pair_rows(3)>{});
  static constexpr auto kFour = pair_table<4>(std::make_index_sequence<pair_rows(4)>{});
  static constexpr const PairTile* kTables[] = {kOne.data(), kTwo.data(), kThree.data(),
                                                kFour.data()};
  return kTables[n - 1][m - 1];
}

// A format of WeightMatrix (weight_matrix.h).
struct Bfloat16Pairs {
  using Source = Bfloat16;
  using Operand = Bfloat16;
  using Value = Pair;
  static constexpr int kDepth = kPairDepth;
  static constexpr WeightFormat kFormat = WeightFormat::kBfloat16Pairs;
  static constexpr bool kNeedsPanels = true;
  static constexpr Bfloat16Product kProduct = kPairProduct;

  static void finish() {}

  explicit Bfloat16Pairs(int /*vectors*/) {}

  static void pack(const PanelSource<Bfloat16>& source, std::int64_t block,
                   std::int64_t block_units, Pair* panel) {
    pack_pair_panel(source, block, block_units, panel_rows(kFormat, source.k_count), panel);
  }

  static int tile_height(const PanelSource<Bfloat16>&, int vectors, bool /*packed*/) {
    return pair_rows(vectors);
  }

  void multiply(int rows, int vectors, std::int64_t k_count, const Bfloat16* a,
                std::int64_t a_stride, const Pair* b, std::int64_t b_stride, float* c,
                std::int64_t c_stride, const int* column) const {
    const PairTile tile = pair_tile_function(rows, vectors);
    for (std::int64_t k = 0; k < k_count; k += kTilePiece)
      tile(std::min(kTilePiece, k_count - k), a + k, a_stride, b + k / kPairDepth * b_stride,
           b_stride, c, c_stride, column);
  }
};

FASTRNN_KERNELS_END
