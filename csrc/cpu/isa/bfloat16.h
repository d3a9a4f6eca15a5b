// The bfloat16 kernels that an instruction set offers.
#pragma once

#include "cpu/bfloat16.h"
#include "cpu/isa/isa.h"
#include "cpu/layout.h"

namespace fastrnn::cpu {

// How kernels multiply bfloat16.
enum class Bfloat16Product {
  kWidened,  // multiply-adds of float32, after a load has been widened
  kDot,      // an instruction that multiplies pairs
  kTiles,    // AMX: an instruction that multiplies tiles of pairs
};

// Memory of a rank for the products after backward, in words of 32 bits: copies of A [kRows,
// kDepth] in bfloat16 and of B [kDepth / 2, kColumns] in pairs, which fit in the private cache of a
// core. Rows of A are kPitch apart: a power of two would map all rows to the same cache sets.
struct Bfloat16GradientLayout {
  static constexpr std::int64_t kRows = 240, kColumns = 256, kDepth = 512, kPitch = kDepth + 32;
  static constexpr std::int64_t kRankSize = kRows * kPitch / 2 + kDepth / 2 * kColumns;
  static constexpr std::int64_t a(int rank) { return rank * kRankSize; }
  static constexpr std::int64_t b(int rank) { return a(rank) + kRows * kPitch / 2; }
};

struct Bfloat16Kernels {
  const char* name;
  const char* isa;  // the instruction set that these kernels belong to
  Bfloat16Product product;
  WeightFormat format;  // of the panels
  // The same as in Walks and Walk (isa.h); null for cells without reduced formats.
  void (*pack)(const LayerShape&, const LayerWeights<Bfloat16>&, const Plan&, const PanelLayout&,
               float* panels, int rank);
  void (*forward[kCellCount])(const Bfloat16Forward&, const Plan&, const PanelLayout&,
                              float* panels, const ForwardLayout&, float* scratch, Team&, int rank);
  // Null without an instruction for the product.
  void (*backward[kCellCount])(const Bfloat16Backward&, const Plan&, const BackwardLayout&,
                               float* workspace, Team&, int rank);
  void (*gradients[kCellCount])(const Bfloat16Gradients&, const Plan&, float* workspace, Team&,
                                int rank);
};

// The kernels of the instruction set in use that this machine runs and that multiply in this way,
// or null.
const Bfloat16Kernels* bfloat16_kernels(Bfloat16Product product);
// Returns whether kernels of the instruction set in use are forced, and which; null: float32
// copies.
bool forced_bfloat16_kernels(const Bfloat16Kernels** kernels);

}  // namespace fastrnn::cpu
