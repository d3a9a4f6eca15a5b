// The segments of a padded batch whose rows have lengths and resets, as one packed batch. A row is
// cut at each reset and at its end; each piece is a sequence of its own.
//
//   row b of the batch    x0 x1 | x2 x3 x4    a reset before step 2
//   segments              x0 x1               from h0
//                         x2 x3 x4            from the state after the reset
//
// A direction that runs backwards in time is cut in its own order: x4 x3 x2 | x1 x0 with a reset
// before step 1. Host only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastrnn {

struct MarkedBatch {
  std::int64_t steps, batch;
  const std::int64_t* lengths;  // [B], from 0 to `steps`
  const std::uint8_t* resets;   // [T, B], 1 before a step with a reset, or null: none
  bool backwards;               // the direction runs backwards in time
};

struct Segments {
  std::vector<std::int64_t> batch_sizes;  // rows of each step of the packed batch
  std::vector<std::int64_t> rows;     // for each packed row, its row t*B + b of the padded batch
  std::vector<std::int64_t> initial;  // for each segment b if it starts from h0, and B + t*B + b
                                      // after the reset at step t of row b
  std::vector<std::int64_t> final;    // [B] for each row its last segment, or their number + b
};

// Longer segments come first, those of equal length in the order of rows and steps.
inline Segments cut(const MarkedBatch& batch) {
  struct Piece {
    std::int64_t row, first, length;  // steps are counted in the direction's order
    bool after_reset;
  };
  const auto step_of = [&](std::int64_t b, std::int64_t k) {
    return batch.backwards ? batch.lengths[b] - 1 - k : k;
  };
  std::vector<Piece> pieces;
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < batch.batch; ++b) {
    for (std::int64_t k = 0; k < batch.lengths[b]; ++k) {
      const bool is_reset =
          batch.resets != nullptr && batch.resets[step_of(b, k) * batch.batch + b] != 0;
      if (k == 0 || is_reset) pieces.push_back({b, k, 0, is_reset});
      longest = std::max(longest, ++pieces.back().length);
    }
  }
  // of_length[n]: pieces with n steps; place[n]: those with more, the first free place for n
  std::vector<std::int64_t> of_length(std::size_t(longest) + 1), place(of_length.size());
  for (const Piece& piece : pieces) ++of_length[std::size_t(piece.length)];
  for (std::size_t n = place.size() - 1; n > 0; --n) place[n - 1] = place[n] + of_length[n];
  Segments to;
  std::vector<std::int64_t> offset;
  std::int64_t rows = 0;
  for (std::size_t k = 0; k < std::size_t(longest); ++k) {
    offset.push_back(rows);
    to.batch_sizes.push_back(place[k]);
    rows += place[k];
  }
  to.rows.resize(std::size_t(rows));
  to.initial.resize(pieces.size());
  for (std::int64_t b = 0; b < batch.batch; ++b)
    to.final.push_back(std::int64_t(pieces.size()) + b);
  for (const Piece& piece : pieces) {
    const std::int64_t own = place[std::size_t(piece.length)]++;
    for (std::int64_t k = 0; k < piece.length; ++k)
      to.rows[std::size_t(offset[std::size_t(k)] + own)] =
          step_of(piece.row, piece.first + k) * batch.batch + piece.row;
    to.initial[std::size_t(own)] =
        piece.row + (piece.after_reset ? (1 + step_of(piece.row, piece.first)) * batch.batch : 0);
    to.final[std::size_t(piece.row)] = own;  // pieces of a row come in order: the last one stays
  }
  return to;
}

}  // namespace fastrnn
