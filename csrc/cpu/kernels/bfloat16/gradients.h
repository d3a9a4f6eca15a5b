// The products after the backward time loop (schedule/gradients.h) with factors in bfloat16:
//
//   d_w_ih = d_pre[x side]^T x    d_w_hh = d_pre[h side]^T h_prev    d_b = column sums of d_pre
//   d_x    = d_pre[x side] w_ih
//
// x, y, h0 and w_ih are bfloat16 in memory. d_pre is float32; it is rounded as it is copied, and
// d_b are sums of unrounded values. Sums and results are float32.
//
// A rank owns rows of the results, as in float32. It copies both factors: A [rows, depth], and B in
// panels of pairs (pairs.h) [depth / 2, kU], whose product is that of the format.
#pragma once

#include "cpu/kernels/bfloat16/pairs.h"
#include "cpu/kernels/product/tile.h"
#include "cpu/kernels/schedule/gradient_rows.h"
#include "cpu/kernels/vector/storage.h"

#include "cpu/isa/bfloat16.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class Format>
class Bfloat16GradientWalk {
 public:
  Bfloat16GradientWalk(const Bfloat16Gradients& problem, const Plan& plan, float* workspace,
                       Team& team, int rank)
      : problem_(problem),
        shape_(problem.shape),
        hidden_(shape_.hidden_size),
        width_(cells::kGradientColumns<Cell> * hidden_),
        rows_(shape_.sequence.total_rows()),
        team_(team),
        rank_(rank),
        ranks_(plan.threads),
        a_(reinterpret_cast<Bfloat16*>(workspace + Layout::a(rank))),
        b_(reinterpret_cast<Pair*>(workspace + Layout::b(rank))) {}

  void run() {
    const GateRuns<Cell> runs_x(Cell::kPreX), runs_h(Cell::kPreH);
    const auto x_row = [this](std::int64_t row) { return problem_.x + row * problem_.x_stride; };
    weight_gradient(runs_x, x_row, shape_.input_size, problem_.d_w_ih, problem_.d_b_ih);
    StatesBefore<Bfloat16> states(shape_, problem_.y, problem_.y_stride, problem_.h0);
    const auto h_row = [&](std::int64_t row) { return states.of(row); };
    weight_gradient(runs_h, h_row, shape_.output_size(), problem_.d_w_hh, problem_.d_b_hh);
    if (problem_.d_x != nullptr) input_gradient(runs_x);
  }

 private:
  using Vec = Pack<float>;
  using Bits = Vec::BitVector;
  using Layout = Bfloat16GradientLayout;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr std::int64_t kU = kTileVectors * kLanes;  // columns of a panel
  static constexpr std::int64_t kRows = Layout::kRows, kColumns = Layout::kColumns;
  static constexpr std::int64_t kDepth = Layout::kDepth, kPitch = Layout::kPitch;

  // d_w [gates*H, columns] = d_pre[side]^T input, d_b its column sums.
  template <class InputRow>
  void weight_gradient(const GateRuns<Cell>& runs, const InputRow& input_row, std::int64_t columns,
                       float* d_w, float* d_b) {
    if (d_w == nullptr && d_b == nullptr) return;
    for (const auto& run : runs) {
      const IndexRange own(run.count * hidden_, rank_, ranks_);
      const std::int64_t blocks = divide_up(own.size(), kRows);
      for (std::int64_t i = 0; i < blocks; ++i) {
        const IndexRange block = own.cut(int(i), int(blocks));
        const std::int64_t to = run.gate * hidden_ + block.begin;
        const std::int64_t from = run.pre * hidden_ + block.begin;
        std::int64_t k = 0;
        do {
          const std::int64_t depth = std::min(kDepth, rows_ - k);
          if (team_.gives_up(rank_, depth * block.size() * columns)) return;
          const float* d_pre = problem_.d_pre + k * width_ + from;
          if (d_b != nullptr) add_rows(d_pre, depth, block.size(), d_b + to, k > 0);
          if (d_w != nullptr) copy_transposed(d_pre, depth, block.size());
          for (std::int64_t j = 0; d_w != nullptr && j < columns; j += kColumns) {
            const std::int64_t wide = std::min(kColumns, columns - j);
            copy_panels([&](std::int64_t row) { return input_row(k + row) + j; }, depth, wide);
            multiply(block.size(), depth, wide, d_w + to * columns + j, columns, k > 0);
          }
          k += depth;
        } while (k < rows_);
      }
    }
  }

  // d_x [N, I] = d_pre[x side] w_ih.
  void input_gradient(const GateRuns<Cell>& runs) {
    const IndexRange own(rows_, rank_, ranks_);
    const std::int64_t columns = shape_.input_size;
    for (std::int64_t j = 0; j < columns; j += kColumns) {
      const std::int64_t wide = std::min(kColumns, columns - j);
      bool add = problem_.add_to_x;
      for (const auto& run : runs) {
        for (std::int64_t k = 0; k < run.count * hidden_; k += kDepth) {
          const std::int64_t depth = std::min(kDepth, run.count * hidden_ - k);
          const Bfloat16* w = problem_.w_ih + (run.gate * hidden_ + k) * problem_.w_ih_stride + j;
          copy_panels([&](std::int64_t row) { return w + row * problem_.w_ih_stride; }, depth,
                      wide);
          for (std::int64_t m = own.begin; m < own.end; m += kRows) {
            if (team_.gives_up(rank_, kRows * depth * wide)) return;
            const std::int64_t count = std::min(kRows, own.end - m);
            copy_rows(problem_.d_pre + m * width_ + run.pre * hidden_ + k, depth, count);
            multiply(count, depth, wide, problem_.d_x + m * columns + j, columns, add);
          }
          add = true;
        }
      }
    }
  }

  // sums [count] = the sums of from over depth, or +=.
  void add_rows(const float* from, std::int64_t depth, std::int64_t count, float* sums,
                bool add) const {
    for (std::int64_t m = 0; m < count; m += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, count - m);
      Vec total = add ? Vec::load(sums + m, lanes) : Vec(0.0f);
      for (std::int64_t i = 0; i < depth;) {
        const std::int64_t end = std::min(i + kTilePiece, depth);
        Vec sum = Vec(0.0f);  // partial sums, to limit rounding error
        for (; i < end; ++i) sum = sum + Vec::load(from + i * width_ + m, lanes);
        total = total + sum;
      }
      total.store(sums + m, lanes);
    }
  }

  // Rounds to the nearest bfloat16, ties to even, in the upper half of each lane. NaN stays NaN.
  static FASTRNN_INLINE Bits rounded(Vec values) {
    Bits bits;
    __builtin_memcpy(&bits, &values.v, sizeof(bits));
    const Bits nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return (values.v == values.v ? nearest : bits | 0x400000) & std::int32_t(0xffff0000u);
  }
  // Pairs of the values in the upper halves.
  static FASTRNN_INLINE Bits paired(Bits first, Bits second) {
    return ((first >> 16) & 0xffff) | second;
  }

  // A [count, depth] = from^T, rounded. (After an odd depth there is a zero.)
  void copy_transposed(const float* from, std::int64_t depth, std::int64_t count) {
    constexpr std::int64_t kPairs = kLanes;
    for (std::int64_t k = 0; k < depth; k += kPairDepth * kPairs) {
      for (std::int64_t m = 0; m < count; m += kLanes) {
        const std::int64_t lanes = std::min<std::int64_t>(kLanes, count - m);
        Vec::Vector words[kPairs];
#pragma GCC unroll 16
        for (std::int64_t i = 0; i < kPairs; ++i) {
          const std::int64_t row = k + i * kPairDepth;
          const float* at = from + row * width_ + m;
          const Vec first = Vec::load(at, row < depth ? lanes : 0);
          const Vec second = Vec::load(at + width_, row + 1 < depth ? lanes : 0);
          const Bits pairs = paired(rounded(first), rounded(second));
          __builtin_memcpy(&words[i], &pairs, sizeof(pairs));
        }
        transpose<float>(words);
        // A row has room for whole vectors (Layout::kPitch).
        for (std::int64_t i = 0; i < lanes; ++i)
          __builtin_memcpy(a_ + (m + i) * kPitch + k, &words[i], sizeof(words[i]));
      }
    }
  }

  // A [count, depth] = from, rounded.
  void copy_rows(const float* from, std::int64_t depth, std::int64_t count) {
    for (std::int64_t m = 0; m < count; ++m)
      for (std::int64_t k = 0; k < depth; k += kLanes)
        store_values(Vec::load(from + m * width_ + k, depth - k), a_ + m * kPitch + k, depth - k);
  }

  // B [columns / U][depth / 2, U], zero beyond the last column and the last row.
  template <class Row>
  void copy_panels(const Row& row, std::int64_t depth, std::int64_t columns) {
    const std::int64_t panel = panel_rows(Format::kFormat, depth);
    for (std::int64_t i = 0; i < panel; ++i) {
      const std::int64_t k = i * kPairDepth;
      const Bfloat16* first = k < depth ? row(k) : nullptr;
      const Bfloat16* second = k + 1 < depth ? row(k + 1) : nullptr;
      for (std::int64_t j = 0; j < divide_up(columns, kU) * kU; j += kLanes) {
        const Bits pairs = interleaved(first == nullptr ? nullptr : first + j,
                                       second == nullptr ? nullptr : second + j, columns - j);
        __builtin_memcpy(b_ + (j / kU * panel + i) * kU + j % kU, &pairs, sizeof(pairs));
      }
    }
  }
  // C [rows, columns] = A B, or += if `add`.
  void multiply(std::int64_t rows, std::int64_t depth, std::int64_t columns, float* c,
                std::int64_t c_stride, bool add) const {
    static constexpr int kColumn[kTileVectors] = {0, kLanes, 2 * kLanes, 3 * kLanes};
    alignas(64) float scratch[kTileRows * kU];
    const std::int64_t panel = panel_rows(Format::kFormat, depth);
    for (std::int64_t j = 0; j < columns; j += kU) {
      const std::int64_t wide = std::min(kU, columns - j);
      const int vectors = int(divide_up(wide, kLanes));
      const Pair* b = b_ + j / kU * panel * kU;
      for_each_tile(0, rows, Format::tile_height({}, vectors, true),
                    [&](std::int64_t row, int count) {
                      for (int i = 0; i < count * kU; i += kLanes) Vec(0.0f).store(scratch + i);
                      format_.multiply(count, vectors, depth, a_ + row * kPitch, kPitch, b, kU,
                                       scratch, kU, kColumn);
                      for (int m = 0; m < count; ++m) {
                        for (int n = 0; n < vectors; ++n) {
                          Vec sum = Vec::load(scratch + m * kU + n * kLanes);
                          float* at = c + (row + m) * c_stride + j + n * kLanes;
                          const std::int64_t lanes = wide - n * kLanes;
                          if (add) sum = sum + Vec::load(at, lanes);
                          sum.store(at, lanes);
                        }
                      }
                    });
    }
  }

  const Bfloat16Gradients& problem_;
  const LayerShape& shape_;
  const std::int64_t hidden_, width_, rows_;
  Team& team_;
  const int rank_, ranks_;
  const Format format_{kTileVectors};
  Bfloat16* const a_;
  Pair* const b_;
};

FASTRNN_KERNELS_END
