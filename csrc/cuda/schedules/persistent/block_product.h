// A block's part of a product whose weights stay in its shared memory.
#pragma once

#include <cstdint>

#include "cuda/schedules/persistent/exchange.h"

namespace fastrnn::cuda {

// Multiplies a tile's rows of an exchange by the block's columns of the weights. kPerUnit: values
// of k per unit; kUnits: units of each block that writes into the exchange.
template <class Math, class S, int kUnits, int kTiles, int kPerUnit, class Thread>
class BlockProduct {
 public:
  // Packs the weights into shared memory and clears the partial sums: those of warps without a
  // share of k stay zero. The threads must synchronise before the first product.
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
    if (last_producer_ >= exchange.writers) last_producer_ = exchange.writers - 1;
    pack_weights<Math, S, kTiles>(thread, exchange.groups, packed_, source);
    for (int i = int(thread.index()); i < kWalkWarps * kPartial; i += kWalkThreads) partial_[i] = 0;
  }
  // The first byte of shared memory after it.
  FASTRNN_DEVICE char* end() const {
    return reinterpret_cast<char*>(partial_ + kWalkWarps * kPartial);
  }

  // Waits until the blocks whose values this warp reads have written `steps` steps of the tile.
  FASTRNN_DEVICE void wait(int tile, std::int64_t steps) {
    if (share_.begin == share_.end) return;
    const std::uint64_t* arrived = exchange_.arrived + std::int64_t(tile) * exchange_.writers;
    for (int i = first_producer_ + int(thread_.index()) % kWarp; i <= last_producer_; i += kWarp)
      thread_.wait(arrived + i, std::uint64_t(steps));
    thread_.sync_warp();
  }

  // Multiplies the first `active` rows of a tile. Synchronises the block.
  FASTRNN_DEVICE void multiply(const TileRows& rows, int active) {
    if (share_.begin < share_.end)
      Math::template multiply<kTiles>(thread_, rows, active < kRowTile ? active : kRowTile, packed_,
                                      share_, partial_ + warp_ * kPartial);
    thread_.sync();
  }
  // An element of the product: the sum over the warps' shares of k.
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

// The weights of a product with w^T, for the gates of a block's units. Column gate * kUnits + u is
// a row of w, k one of its columns.
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
// The weights of a product with w. k = unit * kGates + gate is a row of w.
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
