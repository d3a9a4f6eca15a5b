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
};

struct Bfloat16Kernels {
  const char* name;
  const char* isa;  // the instruction set that these kernels belong to
  Bfloat16Product product;
  WeightFormat format;  // of the panels
  // The same as in Walks and Walk (isa.h).
  void (*pack)(const LayerShape&, const LayerWeights<Bfloat16>&, const Plan&, const PanelLayout&,
               float* panels, int rank);
  void (*forward[kCellCount])(const Bfloat16Forward&, const Plan&, const PanelLayout&,
                              float* panels, const ForwardLayout&, float* scratch, Team&, int rank);
};

// The kernels of the instruction set in use that this machine runs, or null: those with an
// instruction for the product, or those that widen.
const Bfloat16Kernels* bfloat16_kernels(Bfloat16Product product);
// Returns whether kernels of the instruction set in use are forced, and which; null: float32
// copies.
bool forced_bfloat16_kernels(const Bfloat16Kernels** kernels);

}  // namespace fastrnn::cpu
