// The products after the backward time loop, which depend on d_pre alone: over the rows of all
// steps, or of a part of them.
//
//   d_w_ih = d_pre[x side]^T x    d_w_hh = d_pre[h side]^T h_prev    d_b = column sums of d_pre
//   d_x    = d_pre[x side] w_ih
//
// A rank owns rows of the results: gate rows of d_w, rows of d_x. It copies its factors into blocks
// that stay in its cache (A [rows, depth], B in panels [depth, U]), so no rank ever waits.
//
// d_w and d_b are sums over blocks of `depth` rows, which begin at multiples of `depth` and are
// added in the order in which the backward time loop reaches them: from the last row, or from the
// first if the sequence is reversed. So backward by parts of the steps gives the same bits.
#pragma once

#include "cpu/kernels/product/panels.h"
#include "cpu/kernels/product/tile.h"
#include "cpu/kernels/schedule/gradient_rows.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
class GradientWalk {
 public:
  GradientWalk(const LayerGradients<T>& problem, const Plan& plan, const GradientLayout& layout,
               T* workspace, Team& team, int rank)
      : problem_(problem),
        shape_(problem.shape),
        hidden_(shape_.hidden_size),
        width_(cells::kGradientColumns<Cell> * hidden_),
        rows_(problem.rows),
        team_(team),
        rank_(rank),
        ranks_(plan.threads),
        depth_(layout.depth),
        pitch_(layout.pitch),
        a_(workspace + layout.a(rank)),
        b_(workspace + layout.b(rank)) {}

  void run() {
    const GateRuns<Cell> runs_x(Cell::kPreX), runs_h(Cell::kPreH);
    auto x_row = [this](std::int64_t row) { return problem_.x + row * problem_.x_stride; };
    weight_gradient(runs_x, x_row, shape_.input_size, problem_.d_w_ih, problem_.d_b_ih);
    StatesBefore<T> states(shape_, problem_.y, problem_.y_stride, problem_.h0, problem_.resets);
    auto h_row = [&](std::int64_t row) { return states.of(row); };
    weight_gradient(runs_h, h_row, shape_.output_size(), problem_.d_w_hh, problem_.d_b_hh);
    if (problem_.d_x != nullptr) input_gradient(runs_x);
  }

 private:
  using Vec = Pack<T>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr std::int64_t kU = kTileVectors * kLanes;  // columns of a panel
  static constexpr std::int64_t kCopyRows = 12;
  static constexpr std::int64_t kRows = GradientLayout::kRows, kColumns = GradientLayout::kColumns;

  // Calls body(first row, number of rows, whether it is the first block) until it returns false.
  template <class Body>
  void for_each_block(Body&& body) const {
    const std::int64_t begin = rows_.first, end = begin + rows_.count;
    bool first = !problem_.add_to_weights;
    if (begin == end && first) {  // sums over no rows are zero
      body(begin, 0, first);
    } else if (shape_.sequence.reverse) {
      for (std::int64_t k = begin, next; k < end; k = next, first = false) {
        next = std::min((k / depth_ + 1) * depth_, end);
        if (!body(k, next - k, first)) return;
      }
    } else {
      for (std::int64_t k = end, next; k > begin; k = next, first = false) {
        next = std::max((k - 1) / depth_ * depth_, begin);
        if (!body(next, k - next, first)) return;
      }
    }
  }

  // d_w [gates*H, columns] = d_pre[side]^T input, d_b its column sums.
  template <class InputRow>
  void weight_gradient(const GateRuns<Cell>& runs, InputRow input_row, std::int64_t columns, T* d_w,
                       T* d_b) {
    if (d_w == nullptr && d_b == nullptr) return;
    for (const auto& run : runs) {
      const IndexRange own(run.count * hidden_, rank_, ranks_);
      for (std::int64_t m = own.begin; m < own.end; m += kRows) {
        const std::int64_t count = std::min(kRows, own.end - m);
        const std::int64_t to = run.gate * hidden_ + m, from = run.pre * hidden_ + m;
        for_each_block([&](std::int64_t k, std::int64_t depth, bool first) {
          if (team_.gives_up(rank_, depth * count * columns)) return false;
          copy_transposed(problem_.d_pre + (k - rows_.first) * width_ + from, depth, count,
                          d_b == nullptr ? nullptr : d_b + to, first);
          for (std::int64_t j = 0; d_w != nullptr && j < columns; j += kColumns) {
            const std::int64_t wide = std::min(kColumns, columns - j);
            copy_panels([&](std::int64_t i) { return input_row(k + i) + j; }, depth, wide);
            multiply(a_, pitch_, count, depth, {b_, depth * kU, kU}, wide, d_w + to * columns + j,
                     columns, !first);
          }
          return true;
        });
      }
    }
  }

  // d_x [N, I] = d_pre[x side] w_ih.
  void input_gradient(const GateRuns<Cell>& runs) {
    const IndexRange own(rows_.count, rank_, ranks_);
    const std::int64_t columns = shape_.input_size;
    // A part of the rows gives the same bits. Layers of one block of rows have no parts, and small
    // tiles are faster otherwise.
    const bool steady = shape_.sequence.total_rows() > depth_;
    for (std::int64_t j = 0; j < columns; j += kColumns) {
      const std::int64_t wide = std::min(kColumns, columns - j);
      bool add = problem_.add_to_x;
      for (const auto& run : runs) {
        for (std::int64_t k = 0; k < run.count * hidden_; k += depth_) {
          const std::int64_t depth = std::min(depth_, run.count * hidden_ - k);
          const T* w = problem_.w_ih + (run.gate * hidden_ + k) * problem_.w_ih_stride + j;
          // For few rows a copy costs more than it gains: whole panels are read unpacked.
          const std::int64_t lie = own.end - own.begin < kCopyRows ? wide / kU * kU : 0;
          copy_panels([&](std::int64_t i) { return w + lie + i * problem_.w_ih_stride; }, depth,
                      wide - lie);
          for (std::int64_t m = own.begin; m < own.end; m += kRows) {
            if (team_.gives_up(rank_, kRows * depth * wide)) return;
            const T* a = problem_.d_pre + m * width_ + run.pre * hidden_ + k;
            T* c = problem_.d_x + (rows_.first + m) * columns + j;
            const std::int64_t count = std::min(kRows, own.end - m);
            multiply(a, width_, count, depth, {w, kU, problem_.w_ih_stride}, lie, c, columns, add,
                     steady);
            multiply(a, width_, count, depth, {b_, depth * kU, kU}, wide - lie, c + lie, columns,
                     add, steady);
          }
          add = true;
        }
      }
    }
  }

  // A [count, depth] = from^T. sums: the sums of from over depth.
  void copy_transposed(const T* from, std::int64_t depth, std::int64_t count, T* sums, bool first) {
    std::int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes)
      transpose_rows(from + k * width_, width_, kLanes, count, a_ + k, pitch_);
    for (; k < depth; ++k)
      for (std::int64_t m = 0; m < count; ++m) a_[m * pitch_ + k] = from[k * width_ + m];
    if (sums == nullptr) return;
    for (std::int64_t m = 0; m < count; m += kLanes) {
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, count - m);
      Vec total = first ? Vec(T(0)) : Vec::load(sums + m, lanes);
      for (std::int64_t i = 0; i < depth;) {
        const std::int64_t end = std::min(i + kTilePiece, depth);
        Vec sum = Vec(T(0));  // partial sums, to limit rounding error
        for (; i < end; ++i) sum = sum + Vec::load(from + i * width_ + m, lanes);
        total = total + sum;
      }
      total.store(sums + m, lanes);
    }
  }

  // B [columns / U][depth, U], zero beyond the last column.
  template <class Row>
  void copy_panels(Row row, std::int64_t depth, std::int64_t columns) {
    for (std::int64_t i = 0; i < depth; ++i) {
      const T* from = row(i);
      T* to = b_ + i * kU;
      std::int64_t j = 0;
      for (; j + kU <= columns; j += kU, to += depth * kU)
#pragma GCC unroll 4
        for (int n = 0; n < kTileVectors; ++n)
          Vec::load(from + j + n * kLanes).store(to + n * kLanes);
      if (j < columns)
        for (int n = 0; n < kTileVectors; ++n)
          Vec::load(from + j + n * kLanes, std::max<std::int64_t>(columns - j - n * kLanes, 0))
              .store(to + n * kLanes);
    }
  }

  // B as columns / U panels, panel_step elements apart, their rows `stride` apart.
  struct Panels {
    const T* first;
    std::int64_t panel_step, stride;
  };

  // C [rows, columns] = A B, or += if `add`. Each sum has at most kTilePiece terms, which
  // limits rounding error. Several sums, or a part of a vector, are put together in a scratch tile;
  // one sum of whole vectors goes straight to C, with the same bits.
  void multiply(const T* a, std::int64_t a_stride, std::int64_t rows, std::int64_t depth,
                const Panels& b, std::int64_t columns, T* c, std::int64_t c_stride, bool add,
                bool steady = false) const {
    static constexpr int kColumn[kTileVectors] = {0, kLanes, 2 * kLanes, 3 * kLanes};
    alignas(64) T scratch[kTileRows * kU];
    for (std::int64_t j = 0; j < columns; j += kU) {
      const std::int64_t wide = std::min(kU, columns - j);
      const int vectors = int(divide_up(wide, kLanes));
      for_each_tile(0, rows, tile_rows(vectors), [&](std::int64_t row, int count) {
        const auto function =
            steady ? steady_tile_function<T>(count, vectors) : tile_function<T>(count, vectors);
        T* to = c + row * c_stride + j;
        if (depth <= kTilePiece && vectors * kLanes == wide) {
          if (!add)
            for (int m = 0; m < count; ++m)
              for (int n = 0; n < vectors; ++n) Vec(T(0)).store(to + m * c_stride + n * kLanes);
          function(depth, a + row * a_stride, a_stride, b.first + j / kU * b.panel_step, b.stride,
                   to, c_stride, kColumn);
          return;
        }
        for (int i = 0; i < count * kU; i += kLanes) Vec(T(0)).store(scratch + i);
        for (std::int64_t k = 0; k < depth; k += kTilePiece)
          function(std::min(kTilePiece, depth - k), a + row * a_stride + k, a_stride,
                   b.first + j / kU * b.panel_step + k * b.stride, b.stride, scratch, kU, kColumn);
        for (int m = 0; m < count; ++m) {
          for (int n = 0; n < vectors; ++n) {
            Vec sum = Vec::load(scratch + m * kU + n * kLanes);
            T* at = to + m * c_stride + n * kLanes;
            const std::int64_t lanes = wide - n * kLanes;
            if (add) sum = sum + Vec::load(at, lanes);
            sum.store(at, lanes);
          }
        }
      });
    }
  }

  const LayerGradients<T>& problem_;
  const LayerShape& shape_;
  const std::int64_t hidden_, width_;
  const RowRange rows_;
  Team& team_;
  const int rank_, ranks_;
  const std::int64_t depth_, pitch_;
  T* const a_;
  T* const b_;
};

FASTRNN_KERNELS_END
