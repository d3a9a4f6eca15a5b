// The tile registers of AMX: 8 registers of up to 16 rows of 64 bytes. There are two classes with
// the same functions: one executes the instructions, the other (FASTRNN_EMULATED_TILES) computes
// the same in AVX-512 code, so that tests run everything else on machines without AMX.
//
//   TileRegisters::configure(rows)  rows of registers 0 to 4, 1 to 16; the others have 16. Keeps
//   the
//                                   values only if the thread has this configuration already.
//   TileRegisters::release()        ends the thread's use of the registers
//   load<r>(from, stride)           loads a register; rows are `stride` bytes apart
//   store<r>(to, stride)
//   zero<r>()
//   dot<c, a, b>()                  c [rows, 16] += a [rows, 16 pairs] b [16 pairs, 16]
//   dot_bytes<c, a, b>()            c [rows, 16] += a [rows, 16 quads] b [16 quads, 16] in int32;
//                                   a: bytes without sign, b: with sign
//
// TDPBF16PS treats denormal numbers as zero. Its 16 products of first values of a pair are added
// one after the other, so are those of second values; both sums are added, and then added to c.
// Every addition rounds to the nearest.
#pragma once

#include "cpu/kernels/vector/pack.h"

FASTRNN_KERNELS_BEGIN

constexpr int kTileRegisters = 8;
constexpr int kRowTile = 16;  // rows of a register
// Registers from here on always have 16 rows.
constexpr int kFirstFullRegister = 5;

// Calls body with each number as a constant, such as the number of a register.
template <class Body, int... I>
FASTRNN_INLINE void unrolled(Body&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// The rows that this thread has configured, 0: none.
static thread_local int configured_rows = 0;

#if !defined(FASTRNN_EMULATED_TILES)

class TileRegisters {
 public:
  static FASTRNN_INLINE void configure(int rows) {
    if (rows != configured_rows) load_configuration(rows);
  }
  static void release() {
    if (configured_rows != 0) asm volatile("tilerelease" : : : "memory");
    configured_rows = 0;
  }

  template <int r>
  FASTRNN_INLINE void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(r) : "memory");
  }
  template <int r>
  FASTRNN_INLINE void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "n"(r) : "memory");
  }
  template <int r>
  FASTRNN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "n"(r));
  }
  template <int c, int a, int b>
  FASTRNN_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(c), "n"(a), "n"(b));
  }
  template <int c, int a, int b>
  FASTRNN_INLINE void dot_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(c), "n"(a), "n"(b));
  }

 private:
  struct alignas(64) Configuration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  static void load_configuration(int rows) {
    Configuration configuration{};
    configuration.palette = 1;
    for (int r = 0; r < kTileRegisters; ++r) {
      configuration.row_bytes[r] = 64;
      configuration.rows[r] = std::uint8_t(r < kFirstFullRegister ? rows : kRowTile);
    }
    asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
    configured_rows = rows;
  }
};

#else

class TileRegisters {
 public:
  static void configure(int rows) { configured_rows = rows; }
  static void release() { configured_rows = 0; }

  template <int r>
  void load(const void* from, std::int64_t stride) {
    for (int row = 0; row < rows(r); ++row)
      __builtin_memcpy(words_[r][row], static_cast<const char*>(from) + row * stride, kRowBytes);
  }
  template <int r>
  void store(void* to, std::int64_t stride) const {
    for (int row = 0; row < rows(r); ++row)
      __builtin_memcpy(static_cast<char*>(to) + row * stride, words_[r][row], kRowBytes);
  }
  template <int r>
  void zero() {
    __builtin_memset(words_[r], 0, sizeof(words_[r]));
  }
  template <int c, int a, int b>
  void dot() {
    for (int row = 0; row < rows(c); ++row) {
      __m512 first = _mm512_setzero_ps(), second = first;
      for (int k = 0; k < kRowTile; ++k) {
        const __m512i pair = _mm512_set1_epi32(words_[a][row][k]);
        const __m512i pairs = _mm512_loadu_si512(words_[b][k]);
        first = add_product(first, lower(pair), lower(pairs));
        second = add_product(second, upper(pair), upper(pairs));
      }
      void* const at = words_[c][row];
      const __m512 before = flushed(_mm512_loadu_ps(at));
      _mm512_storeu_ps(at, flushed(_mm512_add_ps(before, flushed(_mm512_add_ps(first, second)))));
    }
  }
  template <int c, int a, int b>
  void dot_bytes() {
    for (int row = 0; row < rows(c); ++row) {
      __m512i sum = _mm512_loadu_si512(words_[c][row]);
      for (int k = 0; k < kRowTile; ++k) {
        const __m512i bytes = _mm512_set1_epi32(words_[a][row][k]);
        const __m512i weights = _mm512_loadu_si512(words_[b][k]);
        // bytes 0 and 2 of a quad, then 1 and 3, in 16 bits each
        const __m512i even = _mm512_madd_epi16(_mm512_srli_epi16(_mm512_slli_epi16(bytes, 8), 8),
                                               _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8));
        const __m512i odd =
            _mm512_madd_epi16(_mm512_srli_epi16(bytes, 8), _mm512_srai_epi16(weights, 8));
        sum = _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
      }
      _mm512_storeu_si512(words_[c][row], sum);
    }
  }

 private:
  static constexpr int kRowBytes = 64;

  static int rows(int r) { return r < kFirstFullRegister ? configured_rows : kRowTile; }
  static __m512i lower(__m512i pairs) { return __m512i(Pack<float>::BitVector(pairs) << 16); }
  static __m512i upper(__m512i pairs) {
    return _mm512_and_si512(pairs, _mm512_set1_epi32(std::int32_t(0xffff0000u)));
  }
  static __m512 add_product(__m512 sum, __m512i a, __m512i b) {
    return flushed(
        _mm512_fmadd_ps(flushed(_mm512_castsi512_ps(a)), flushed(_mm512_castsi512_ps(b)), sum));
  }
  // Denormal numbers become zero, with their sign.
  static __m512 flushed(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __mmask16 is_small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    const __m512i sign = _mm512_set1_epi32(std::int32_t(0x80000000u));
    return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, is_small, bits, sign));
  }

  alignas(64) std::int32_t words_[kTileRegisters][kRowTile][kRowBytes / 4];
};

#endif

FASTRNN_KERNELS_END
