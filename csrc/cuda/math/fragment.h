// The recurrent product of a block of the persistent schedule: 16 rows of states times the block's
// columns of weights. Both are divided along k into groups of 64 bytes, shared among the warps.
//
//   a row of the operand   | group 0: q=0 | q=1 | q=2 | q=3 | group 1: ...    16 bytes per lane,
//                                                                             q = lane % 4
//   weights in shared memory: [group][column tile][lane], the 16 bytes that a lane multiplies, from
//   column lane / 4 of the tile: one load without bank conflicts
//
// Tensor cores expect other values of k in a lane. The order of a sum over k does not matter as
// long as both operands have the same one. The four words of a lane serve two products.
//
// Two ways to multiply: TensorCores<S>, for float in TF32, and CudaCores<S>, dot products in
// float32, exact for float and for few rows. S is also the type of the operands in memory.
#pragma once

#include "cuda/math/half.h"
#include "cuda/schedules/persistent/plan.h"

// Marks code that runs in a thread of a kernel: on the GPU, or one that a test emulates.
#if defined(__CUDACC__)
#define FASTRNN_DEVICE __device__ __forceinline__
#define FASTRNN_UNROLL _Pragma("unroll")
#define FASTRNN_UNROLL_BY_4 _Pragma("unroll 4")
#else
#define FASTRNN_DEVICE inline
#define FASTRNN_UNROLL
#define FASTRNN_UNROLL_BY_4
#endif

namespace fastrnn::cuda {

// 16 bytes, as a lane loads them.
struct alignas(16) Quad {
  std::uint32_t word[4];
};

// The nearest TF32 number, ties away from zero. Tensor cores truncate a float that is not rounded.
FASTRNN_HD float round_to_tf32(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;  // infinite or NaN
  return float_of((bits + 0x1000u) & ~0x1fffu);
}

// Values of S in a word.
template <class S>
struct Words {
  static constexpr int kValues = 4 / sizeof(S);

  static FASTRNN_HD std::uint32_t join(const S* values) {
    if constexpr (kValues == 1)
      return bits_of(values[0]);
    else
      return std::uint32_t(values[0].bits) | std::uint32_t(values[1].bits) << 16;
  }
  // sum + the products of two words' values
  static FASTRNN_HD float add_product(float sum, std::uint32_t a, std::uint32_t b) {
    if constexpr (kValues == 1) {
      return sum + float_of(a) * float_of(b);
    } else {
      sum += widen(S{std::uint16_t(a)}) * widen(S{std::uint16_t(b)});
      return sum + widen(S{std::uint16_t(a >> 16)}) * widen(S{std::uint16_t(b >> 16)});
    }
  }
};

template <class S>
inline constexpr int kGroupValues = kGroupBytes / int(sizeof(S));

// The rows of a tile's operand: rows of the batch below `running_rows` are in a slot of the
// exchange, the others in the initial states.
struct TileRows {
  const char* running;
  const char* initial;
  int first, running_rows;
  std::int64_t bytes;

  FASTRNN_HD const char* operator()(int row) const {
    const int b = first + row;
    return (b < running_rows ? running : initial) + b * bytes;
  }
};

// The groups of k of a warp. With fewer groups than warps, the last warps have none.
struct WarpShare {
  int begin, end;
};
FASTRNN_HD WarpShare share_of(int warp, int groups) {
  const int warps = groups < kWalkWarps ? groups : kWalkWarps;
  if (warp >= warps) return {0, 0};
  return {groups * warp / warps, groups * (warp + 1) / warps};
}

// Packs the weights for both ways to multiply. `source(column, k)` returns a weight, or zero
// padding.
template <class Math, class S, int kTiles, class Thread, class Source>
FASTRNN_DEVICE void pack_weights(const Thread& thread, int groups, Quad* packed,
                                 const Source& source) {
  constexpr int kValues = Words<S>::kValues;
  FASTRNN_UNROLL_BY_4  // for many loads at a time
      for (int i = int(thread.index()); i < groups * kTiles * kWarp; i += kWalkThreads) {
    const int lane = i % kWarp, tile = i / kWarp % kTiles;
    const std::int64_t k =
        std::int64_t(i / (kWarp * kTiles)) * kGroupValues<S> + lane % 4 * 4 * kValues;
    Quad quad;
    FASTRNN_UNROLL
    for (int w = 0; w < 4; ++w) {
      S values[kValues];
      FASTRNN_UNROLL
      for (int v = 0; v < kValues; ++v)
        values[v] = Math::operand(source(tile * kColumnTile + lane / 4, k + w * kValues + v));
      quad.word[w] = Words<S>::join(values);
    }
    packed[i] = quad;
  }
}

template <class S>
struct TensorCores {
  // A value rounded to the form in which it is multiplied.
  static FASTRNN_HD S operand(float value) {
    if constexpr (sizeof(S) == 4)
      return round_to_tf32(value);
    else
      return narrow<S>(value);
  }

  // partial [16, kTiles*8] = the tile's rows times the weights, over the groups of the share
  template <int kTiles, class Thread>
  static FASTRNN_DEVICE void multiply(Thread& thread, const TileRows& rows, int /*active*/,
                                      const Quad* packed, WarpShare share, float* partial) {
    // A product waits for the previous one that adds into the same sums, so few tiles have several
    // sets of sums. kAhead groups of operands are loaded in advance, as many as registers allow.
    constexpr int kChains = kTiles >= 4 ? 1 : kTiles >= 2 ? 2 : 4;
    constexpr int kAhead = kTiles <= 2 ? 6 : 4;
    const int lane = int(thread.index()) % kWarp, g = lane / 4, q = lane % 4;
    const char* low = rows(g) + q * sizeof(Quad);
    const char* high = rows(g + 8) + q * sizeof(Quad);
    float sums[kChains][kTiles][4] = {};
    for (int first = share.begin; first < share.end; first += kAhead) {
      Quad a[kAhead][2];
      FASTRNN_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= share.end) continue;
        a[i][0] = thread.load(low + (first + i) * kGroupBytes);
        a[i][1] = thread.load(high + (first + i) * kGroupBytes);
      }
      FASTRNN_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= share.end) continue;
        FASTRNN_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          const Quad b = packed[((first + i) * kTiles + tile) * kWarp + lane];
          FASTRNN_UNROLL
          for (int w = 0; w < 4; w += 2) {
            const std::uint32_t rows_of_a[4] = {a[i][0].word[w], a[i][1].word[w],
                                                a[i][0].word[w + 1], a[i][1].word[w + 1]};
            const std::uint32_t columns_of_b[2] = {b.word[w], b.word[w + 1]};
            thread.template mma<S>(sums[(2 * i + w / 2) % kChains][tile], rows_of_a, columns_of_b);
          }
        }
      }
    }
    FASTRNN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTRNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        float sum = sums[0][tile][i];
        FASTRNN_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum += sums[chain][tile][i];
        partial[partial_at(kTiles, g + i / 2 * 8, tile * kColumnTile + 2 * q + i % 2)] = sum;
      }
    }
  }
};

template <class S>
struct CudaCores {
  static constexpr int kRows = 4;   // at a time
  static constexpr int kAhead = 2;  // groups of operands loaded before the first is used

  static FASTRNN_HD S operand(float value) { return narrow<S>(value); }

  // The same for the first `active` rows of the tile. A lane sums its 16 bytes of every group; at
  // the end the four lanes of a column add their sums.
  template <int kTiles, class Thread>
  static FASTRNN_DEVICE void multiply(Thread& thread, const TileRows& rows, int active,
                                      const Quad* packed, WarpShare share, float* partial) {
    const int lane = int(thread.index()) % kWarp, g = lane / 4, q = lane % 4;
    for (int row = 0; row < active; row += kRows) {
      const char* from[kRows];
      FASTRNN_UNROLL
      for (int r = 0; r < kRows; ++r) from[r] = rows(row + r) + q * sizeof(Quad);
      float sums[kRows][kTiles] = {};
      for (int first = share.begin; first < share.end; first += kAhead) {
        Quad a[kAhead][kRows];
        FASTRNN_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (first + i >= share.end) continue;
          FASTRNN_UNROLL
          for (int r = 0; r < kRows; ++r)
            a[i][r] = thread.load(from[r] + (first + i) * kGroupBytes);
        }
        FASTRNN_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (first + i >= share.end) continue;
          FASTRNN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            const Quad b = packed[((first + i) * kTiles + tile) * kWarp + lane];
            FASTRNN_UNROLL
            for (int r = 0; r < kRows; ++r) {
              FASTRNN_UNROLL
              for (int w = 0; w < 4; ++w)
                sums[r][tile] = Words<S>::add_product(sums[r][tile], a[i][r].word[w], b.word[w]);
            }
          }
        }
      }
      FASTRNN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FASTRNN_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          float sum = sums[r][tile];
          sum += thread.shuffle_xor(sum, 1);
          sum += thread.shuffle_xor(sum, 2);
          if (q == r) partial[partial_at(kTiles, row + r, tile * kColumnTile + g)] = sum;
        }
      }
    }
  }
};

}  // namespace fastrnn::cuda
