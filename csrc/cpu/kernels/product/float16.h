// Weights as float16, for one row: half the bytes to fetch per step, where a step waits for
// weights.
//
//   packing    w -> float16, to the nearest, ties to even: |w' - w| <= 2^-11 |w| + 2^-25
//   product    c[column[n]] += sum_k a[k] w'[k][n], in float32: a load widens float16 to float32
//
// Only x86-64 with F16C (and AVX2) or AVX-512 has loads that widen.
#pragma once

#include "cpu/kernels/product/panels.h"

#if FASTRNN_VECTOR_BYTES >= 32
FASTRNN_KERNELS_BEGIN

// float16 values by their bits.
using Half = std::uint16_t;

// Loads float16 values into a vector of float32 of kBytes bytes.
template <int kBytes>
struct Widening;
template <>
struct Widening<32> {
  typedef float Vector __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
  static FASTRNN_INLINE Vector load(const Half* from) {
    return Vector(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
};
#if FASTRNN_VECTOR_BYTES == 64
template <>
struct Widening<64> {
  typedef float Vector __attribute__((vector_size(64)));
  static constexpr int kLanes = 16;
  static FASTRNN_INLINE Vector load(const Half* from) {
    // a mask of all lanes: GCC warns of undefined values for the form without a mask
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vector(_mm512_maskz_cvtph_ps(__mmask16(-1), halves));
  }
};
#endif

// Rounds to the nearest, ties to even. A finite value beyond the range of float16 becomes the
// largest float16, not infinity; infinities and NaN stay as they are.
FASTRNN_INLINE void store_halves(Pack<float> value, Half* to) {
  const Pack<float> largest(65504), finite(std::numeric_limits<float>::max());
  value = select((value > largest) & ~(value > finite), largest, value);
  value = select((-value > largest) & ~(-value > finite), -largest, value);
#if FASTRNN_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(__mmask16(-1), value.v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

using HalfTile = void (*)(std::int64_t k_count, const float* a, const Half* b, float* c,
                          const int* column);

// The microkernel: a tile of one row and N vectors of a panel, loaded as W. Twin of tile<float, 1,
// N>: the same sums in the same order for every W.
template <class W, int M, int N>
void half_tile(std::int64_t k_count, const float* a, const Half* b, float* c, const int* column) {
  static_assert(M == 1, "the panels serve a batch of one");
  using Vector = typename W::Vector;
  constexpr int kParts = Pack<float>::kLanes / W::kLanes;  // vectors W per vector of a panel
  constexpr int kCount = N * kParts, kWidth = kCount * W::kLanes;
  constexpr int kChains = tile_chains(M, N);
  Vector sum[kChains][kCount];
#pragma GCC unroll 16
  for (int n = 0; n < kCount; ++n) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) sum[chain][n] = Vector{};
  }
  std::int64_t k = 0;
  for (; k + kChains <= k_count; k += kChains) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      const Vector value = a[k + chain] - Vector{};
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n)
        sum[chain][n] += value * W::load(b + chain * kWidth + n * W::kLanes);
    }
    b += kChains * kWidth;
  }
  for (; k < k_count; ++k) {
    const Vector value = a[k] - Vector{};
#pragma GCC unroll 16
    for (int n = 0; n < kCount; ++n) sum[0][n] += value * W::load(b + n * W::kLanes);
    b += kWidth;
  }
#pragma GCC unroll 16
  for (int n = 0; n < kCount; ++n) {
    Vector total = sum[0][n];
#pragma GCC unroll 16
    for (int chain = 1; chain < kChains; ++chain) total += sum[chain][n];
    float* at = c + column[n / kParts] + n % kParts * W::kLanes;
    Vector before;
    std::memcpy(&before, at, sizeof(Vector));
    total = before + total;
    std::memcpy(at, &total, sizeof(Vector));
  }
}

template <class W>
FASTRNN_INLINE HalfTile half_tile_function(int n) {
  static constexpr HalfTile kTiles[] = {half_tile<W, 1, 1>, half_tile<W, 1, 2>, half_tile<W, 1, 3>,
                                        half_tile<W, 1, 4>};
  return kTiles[n - 1];
}

// The same as pack_panel, for a few k at once through a buffer of float32.
inline void pack_half_panel(PanelSource<float> source, std::int64_t block, std::int64_t block_units,
                            Half* panel) {
  using P = Pack<float>;
  constexpr std::int64_t kDepth = 64;
  alignas(64) float part[kDepth * kTileVectors * P::kLanes];
  const std::int64_t width = source.gates * block_units;
  const std::int64_t all = source.k_count;
  for (std::int64_t k = 0; k < all; k += kDepth) {
    source.k_count = std::min(kDepth, all - k);
    pack_panel(source, block, block_units, part);
    for (std::int64_t i = 0; i < source.k_count * width; i += P::kLanes)
      store_halves(P::load(part + i), panel + k * width + i);
    source.weights += kDepth;
  }
}

// A format of WeightMatrix (weight_matrix.h).
class Float16Format {
 public:
  using Value = Half;
  static constexpr WeightFormat kFormat = WeightFormat::kFloat16;
  static constexpr bool kNeedsPanels = true;

  explicit Float16Format(int vectors) : tile_(tile_of(vectors)) {}

  static void pack(const PanelSource<float>& source, std::int64_t block, std::int64_t block_units,
                   Half* panel) {
    pack_half_panel(source, block, block_units, panel);
  }

  static int tile_height(const PanelSource<float>&, int /*vectors*/, bool /*packed*/) { return 1; }

  void multiply(int /*rows*/, int /*vectors*/, std::int64_t k_count, const float* a,
                std::int64_t /*a_stride*/, const Half* b, std::int64_t b_stride, float* c,
                std::int64_t /*c_stride*/, const int* column) const {
    for (std::int64_t k = 0; k < k_count; k += kTilePiece)
      tile_(std::min(kTilePiece, k_count - k), a + k, b + k * b_stride, c, column);
  }

 private:
  static HalfTile tile_of(int vectors) {
#if FASTRNN_VECTOR_BYTES == 64
    if (!widens_by_halves()) return half_tile_function<Widening<64>>(vectors);
#endif
    return half_tile_function<Widening<32>>(vectors);
  }

  const HalfTile tile_;
};

FASTRNN_KERNELS_END
#endif
