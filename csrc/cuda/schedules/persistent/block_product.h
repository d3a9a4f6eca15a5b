// A block's part of a product whose weights stay in its shared memory.
#pragma once

#include <cstdint>

#include "cuda/schedules/persistent/exchange.h"

namespace fastrnn::cuda {

// A product that a block takes part in: a tile's rows of an exchange times the block's columns of
// the weights, which stay packed in its shared memory. kPerUnit: values of k that a unit brings;
// kUnits: units of a block that brings them.
template <class Math, class S, int kUnits, int kTiles, int kPerUnit, class Thread>
class BlockProduct {
 public:
  // Packs the weights into shared memory. The sums of warps that have no share stay zero for good.
  // The block has to meet before they are used.
  template <class Source>
  FASTRNN_DEVICE BlockProduct(Thread& thread, const Exchange& exchange, char* shared,
                              const Source& source)
      : thread_(thread), exchange_(exchange) {
    packed_ = reinterpret_cast<Quad*>(shared);
    partial_ = reinterpret_cast<float*>(packed_ + exchange.groups * kTiles * kWarp);
    warp_ = thread.uniform(int(thread.index()) / kWarp);
    share_ = share_of(warp_, exchange.groups);
    const int first = share_.begin * kGroupValues<S> / kPerUnit;
    const int last = (share_.end * kGroupValues<S> - 1) / kPerUnit;
    first_producer_ = first / kUnits;
    last_producer_ = last / kUnits;
    if (last_producer_ >= exchange.marks) last_producer_ = exchange.marks - 1;
    pack_weights<Math, S, kTiles>(thread, exchange.groups, packed_, source);
    for (int i = int(thread.index()); i < kWalkWarps * kPartial; i += kWalkThreads) partial_[i] = 0;
  }
  // The first byte of shared memory that it leaves.
  FASTRNN_DEVICE char* end() const {
    return reinterpret_cast<char*>(partial_ + kWalkWarps * kPartial);
  }

  // Waits for the tile's rows of `steps` steps, as far as this warp reads them.
  FASTRNN_DEVICE void wait(int tile, std::int64_t steps) {
    if (share_.begin == share_.end) return;
    const std::uint64_t* arrived = exchange_.arrived + std::int64_t(tile) * exchange_.marks;
    for (int i = first_producer_ + int(thread_.index()) % kWarp; i <= last_producer_; i += kWarp)
      thread_.wait(arrived + i, std::uint64_t(steps));
    thread_.sync_warp();
  }

  FASTRNN_DEVICE void multiply(const TileRows& rows, int active) {
    if (share_.begin < share_.end)
      Math::template multiply<kTiles>(thread_, rows, active < kRowTile ? active : kRowTile, packed_,
                                      share_, partial_ + warp_ * kPartial);
    thread_.sync();
  }
  FASTRNN_DEVICE float at(int row, int column) const {
    const float* first = partial_ + partial_at(kTiles, row, column);
    float sum = 0;
    FASTRNN_UNROLL
    for (int warp = 0; warp < kWalkWarps; ++warp) sum += first[warp * kPartial];
    return sum;
  }

 private:
  static constexpr int kPartial = kRowTile * kTiles * kColumnTile;  // sums of a warp

  Thread& thread_;
  const Exchange& exchange_;
  Quad* packed_;    // [groups, kTiles, 32]
  float* partial_;  // [warps, kPartial]
  int warp_;
  WarpShare share_;
  int first_producer_, last_producer_;
};

// Gates' rows of a block's units: column gate * kUnits + u; k: a column of w_hh.
template <class S, int kUnits>
struct GateRows {
  const S* w;
  std::int64_t stride, hidden, columns, first_unit;

  FASTRNN_HD float operator()(int column, std::int64_t k) const {
    const std::int64_t unit = first_unit + column % kUnits;
    if (unit >= hidden || k >= columns) return 0;
    return widen(w[(column / kUnits * hidden + unit) * stride + k]);
  }
};
// Columns of w_hh; k = unit * kGates + gate: a row of it.
template <class S, int kGates>
struct GateColumns {
  const S* w;
  std::int64_t stride, hidden, columns, first_column;

  FASTRNN_HD float operator()(int column, std::int64_t k) const {
    const std::int64_t at = first_column + column, unit = k / kGates;
    if (at >= columns || unit >= hidden) return 0;
    return widen(w[(k % kGates * hidden + unit) * stride + at]);
  }
};

}  // namespace fastrnn::cuda
