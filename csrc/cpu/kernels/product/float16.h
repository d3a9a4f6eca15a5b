// Recurrent weights of a batch of one as float16: half the bytes to fetch a step, where fetching
// w_hh is what a step waits for.
//
//   packing    w -> float16, to the nearest, ties to even: |w' - w| <= 2^-11 |w| + 2^-25
//   the walk   c[column[n]] += sum_k a[k] w'[k][n], in float32: a load widens as it goes
//
// A panel lies as Weights' panels do, [K][gates][U]. Only x86-64 with AVX2 and F16C or AVX-512 has
// loads that widen; elsewhere kHalfWeights is false and no plan asks for any of this.
#pragma once

#include "cpu/kernels/product/panels.h"

FASTRNN_KERNELS_BEGIN

// float16 values by their bits.
using Half = std::uint16_t;

// w_hh of a forward walk: in general, just Weights.
template <class T>
class RecurrentWeights : public Weights<T> {
 public:
  RecurrentWeights(const PanelSource<T>& source, T* panels, int vectors, bool packed, bool)
      : Weights<T>(source, panels, vectors, packed) {}
};

#if FASTRNN_VECTOR_BYTES == 16
constexpr bool kHalfWeights = false;
#else
constexpr bool kHalfWeights = true;

// Loads of float16 that become a vector of float32 of so many bytes.
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
    // all lanes of a mask: GCC takes the form without one for a use of undefined values
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vector(_mm512_maskz_cvtph_ps(__mmask16(-1), halves));
  }
};
#endif

// To the nearest, ties to even. A finite value beyond float16's range becomes the largest float16
// and no infinity; infinities and NaN stay what they are.
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

// The microkernel: a tile of one row and N vectors of a panel, W at a time. Twin of
// tile<float, 1, N>: the same sums in the same order, whatever W is.
template <class W, int M, int N>
void half_tile(std::int64_t k_count, const float* a, const Half* b, float* c, const int* column) {
  static_assert(M == 1, "the panels serve a batch of one");
  using Vector = typename W::Vector;
  constexpr int kParts = Pack<float>::kLanes / W::kLanes;  // of a panel's vector
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

// pack_panel, a few k at a time through a buffer of float32.
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

// Weights, or where the plan says so, panels of float16 in their place.
template <>
class RecurrentWeights<float> {
 public:
  RecurrentWeights(const PanelSource<float>& source, float* panels, int vectors, bool packed,
                   bool half)
      : full_(source, panels, vectors, packed),
        source_(source),
        panels_(reinterpret_cast<Half*>(panels)),
        vectors_(vectors),
        half_(half),
        tile_(tile_of(source.gates * vectors)) {}

  void pack(const Share& blocks) const {
    if (!half_) return full_.pack(blocks);
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
      pack_half_panel(source_, block, block_units(), panel(block));
  }

  // As Weights; with float16 there is but one row.
  void multiply(std::int64_t block, int rows, const float* a, std::int64_t a_stride, float* c,
                std::int64_t c_stride, const Columns& columns) const {
    if (!half_) return full_.multiply(block, rows, a, a_stride, c, c_stride, columns);
    const std::int64_t width = source_.gates * block_units();
    for (std::int64_t k = 0; k < source_.k_count; k += kTilePiece)
      tile_(std::min(kTilePiece, source_.k_count - k), a + k, panel(block) + k * width, c,
            columns.at);
  }

  int tile_height() const { return full_.tile_height(); }

 private:
  std::int64_t block_units() const { return std::int64_t(vectors_) * Pack<float>::kLanes; }
  Half* panel(std::int64_t block) const {
    return panels_ + block * source_.gates * block_units() * source_.k_count;
  }

  static HalfTile tile_of(int n) {
#if FASTRNN_VECTOR_BYTES == 64
    if (!widens_by_halves()) return half_tile_function<Widening<64>>(n);
#endif
    return half_tile_function<Widening<32>>(n);
  }

  const Weights<float> full_;
  const PanelSource<float> source_;
  Half* const panels_;
  const int vectors_;
  const bool half_;
  const HalfTile tile_;
};

#endif

FASTRNN_KERNELS_END
