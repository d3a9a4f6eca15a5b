// Loads and stores of a caller's tensors as vectors of the type that a kernel computes in.
#pragma once

#include "cpu/kernels/vector/pack.h"
#include "problem/bfloat16.h"
#include "problem/float16.h"

FASTRNN_KERNELS_BEGIN

// The first `lanes` values at `from` (all, if there are more); the other lanes are 0.
template <class T>
FASTRNN_INLINE Pack<T> load_values(const T* from, std::int64_t lanes) {
  return Pack<T>::load(from, lanes);
}
template <class T>
FASTRNN_INLINE void store_values(Pack<T> values, T* to, std::int64_t lanes) {
  values.store(to, lanes);
}

// Stores a whole vector past the caches, for results that do not fit them. `to` is aligned to a
// vector. (aarch64: an ordinary store.)
template <class T>
FASTRNN_INLINE void stream_values(Pack<T> values, T* to) {
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    _mm512_stream_ps(to, values.v);
  else
    _mm512_stream_pd(to, values.v);
#elif FASTRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(to, values.v);
  else
    _mm256_stream_pd(to, values.v);
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    _mm_stream_ps(to, values.v);
  else
    _mm_stream_pd(to, values.v);
#else
  values.store(to);
#endif
}
// Orders the streamed stores of a thread before what it does next.
FASTRNN_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#if FASTRNN_VECTOR_BYTES >= 32
#if FASTRNN_VECTOR_BYTES == 64
FASTRNN_INLINE __mmask16 first_halves(std::int64_t lanes) { return __mmask16((1u << lanes) - 1); }
#endif

FASTRNN_INLINE Pack<float> load_values(const Bfloat16* from, std::int64_t lanes) {
  using Bits = Pack<float>::BitVector;
  const bool all = lanes >= Pack<float>::kLanes;
#if FASTRNN_VECTOR_BYTES == 64
  const __m256i halves = all         ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                         : lanes > 0 ? _mm256_maskz_loadu_epi16(first_halves(lanes), from)
                                     : _mm256_setzero_si256();
  const Bits bits = Bits(_mm512_maskz_cvtepu16_epi32(__mmask16(-1), halves)) << 16;
#else
  __m128i halves = _mm_setzero_si128();
  if (all)
    halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  else if (lanes > 0)
    __builtin_memcpy(&halves, from, std::size_t(lanes) * sizeof(Bfloat16));
  const Bits bits = Bits(_mm256_cvtepu16_epi32(halves)) << 16;
#endif
  Pack<float> values;
  __builtin_memcpy(&values.v, &bits, sizeof(bits));
  return values;
}

// Rounds to the nearest, ties to even, as torch does. NaN stays NaN. (vcvtneps2bf16 would make
// denormal numbers zero.)
FASTRNN_INLINE void store_values(Pack<float> values, Bfloat16* to, std::int64_t lanes) {
  using Bits = Pack<float>::BitVector;
  Bits bits;
  __builtin_memcpy(&bits, &values.v, sizeof(bits));
  const Bits upper = (bits >> 16) & 0xffff;
  const Bits rounded = ((bits + 0x7fff + (upper & 1)) >> 16) & 0xffff;
  const Bits halves = values.v == values.v ? rounded : upper | 0x40;
  const bool all = lanes >= Pack<float>::kLanes;
#if FASTRNN_VECTOR_BYTES == 64
  // (A conversion with a store, vpmovdw to memory, is slow on AMD CPUs.)
  const __m256i packed = _mm512_maskz_cvtepi32_epi16(__mmask16(-1), __m512i(halves));
  if (all)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  else if (lanes > 0)
    _mm256_mask_storeu_epi16(to, first_halves(lanes), packed);
#else
  const __m256i pairs = _mm256_packus_epi32(__m256i(halves), __m256i(halves));
  const __m128i packed = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
  if (all)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  else if (lanes > 0)
    __builtin_memcpy(to, &packed, std::size_t(lanes) * sizeof(Bfloat16));
#endif
}

// Without a mask the compiler would warn of undefined values.
FASTRNN_INLINE Pack<float> load_values(const Float16Value* from, std::int64_t lanes) {
  const bool all = lanes >= Pack<float>::kLanes;
#if FASTRNN_VECTOR_BYTES == 64
  const __m256i halves = all         ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                         : lanes > 0 ? _mm256_maskz_loadu_epi16(first_halves(lanes), from)
                                     : _mm256_setzero_si256();
  return Pack<float>(Pack<float>::Vector(_mm512_maskz_cvtph_ps(__mmask16(-1), halves)));
#else
  __m128i halves = _mm_setzero_si128();
  if (all)
    halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  else if (lanes > 0)
    __builtin_memcpy(&halves, from, std::size_t(lanes) * sizeof(Float16Value));
  return Pack<float>(Pack<float>::Vector(_mm256_cvtph_ps(halves)));
#endif
}

FASTRNN_INLINE void store_values(Pack<float> values, Float16Value* to, std::int64_t lanes) {
  const bool all = lanes >= Pack<float>::kLanes;
#if FASTRNN_VECTOR_BYTES == 64
  const __m256i packed = _mm512_maskz_cvtps_ph(__mmask16(-1), values.v, _MM_FROUND_TO_NEAREST_INT);
  if (all)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  else if (lanes > 0)
    _mm256_mask_storeu_epi16(to, first_halves(lanes), packed);
#else
  const __m128i packed = _mm256_cvtps_ph(values.v, _MM_FROUND_TO_NEAREST_INT);
  if (all)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  else if (lanes > 0)
    __builtin_memcpy(to, &packed, std::size_t(lanes) * sizeof(Float16Value));
#endif
}
#else
// The baseline converts one value after the other.
template <class S>
FASTRNN_INLINE Pack<float> load_halves(const S* from, std::int64_t lanes) {
  float lane[Pack<float>::kLanes] = {};
  for (std::int64_t i = 0; i < std::min<std::int64_t>(lanes, Pack<float>::kLanes); ++i)
    lane[i] = float(from[i]);
  return Pack<float>::load(lane);
}
FASTRNN_INLINE Pack<float> load_values(const Bfloat16* from, std::int64_t lanes) {
  return load_halves(from, lanes);
}
FASTRNN_INLINE Pack<float> load_values(const Float16Value* from, std::int64_t lanes) {
  return load_halves(from, lanes);
}
FASTRNN_INLINE void store_values(Pack<float> values, Bfloat16* to, std::int64_t lanes) {
  float lane[Pack<float>::kLanes];
  values.store(lane);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(lanes, Pack<float>::kLanes); ++i)
    to[i].bits = round_to_bfloat16(lane[i]);
}
FASTRNN_INLINE void store_values(Pack<float> values, Float16Value* to, std::int64_t lanes) {
  float lane[Pack<float>::kLanes];
  values.store(lane);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(lanes, Pack<float>::kLanes); ++i)
    to[i].bits = round_to_float16(lane[i]);
}
#endif

FASTRNN_KERNELS_END
