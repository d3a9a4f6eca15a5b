// Layers in bfloat16 as it is stored, as the layers above see them. The values of a step (gates,
// the cell state) and those saved for backward are float32; h is rounded to bfloat16 after each
// step, as y is.
#pragma once

#include <string>
#include <vector>

#include "cpu/api.h"
#include "problem/bfloat16.h"

namespace fastrnn::cpu {

using Bfloat16Forward = LayerForward<Bfloat16, float>;

// The backward time loop. Its values are float32, except that the product with w_hh rounds d_pre.
struct Bfloat16Backward : LayerBackward<float, float> {
  const Bfloat16* stored_w_hh;  // [G*H, R]; weights.w_hh is not read
  std::int64_t stored_w_hh_stride;
};

// The products after the backward time loop (LayerGradients). The time loop itself computes in
// float32, so d_pre and the results are float32.
struct Bfloat16Gradients {
  LayerShape shape;
  const Bfloat16* w_ih;  // [G*H, I], w_ih_stride apart
  std::int64_t w_ih_stride;
  const Bfloat16* x;  // [N, I], x_stride apart
  std::int64_t x_stride;
  const Bfloat16* h0;  // [B, R]
  const Bfloat16* y;   // [N, R], y_stride apart
  std::int64_t y_stride;
  const float* d_pre;  // [N, (Q+E)*H]
  // Results; null: not needed.
  float* d_x;     // [N, I]
  bool add_to_x;  // d_x += instead of =
  float* d_w_ih;  // [G*H, I]
  float* d_w_hh;  // [G*H, R]
  float* d_b_ih;  // [G*H]
  float* d_b_hh;  // [G*H]
};

// Whether these kernels compute forward for a layer of this shape. Otherwise the caller converts
// its tensors and computes in float32.
FASTRNN_EXPORT bool computes_bfloat16(const LayerShape& shape);
// Whether bfloat16 copies of float32 tensors, made for one call, are faster than float32.
FASTRNN_EXPORT bool bfloat16_pays_for_copies(const LayerShape& shape);
// The same for all sequences of a layer: the copies are faster with min_rows or more (steps times
// batch) and a batch from batches[0] to batches[1] - 1, from batches[2] to batches[3] - 1, and so
// on. The last range may have no end.
struct Bfloat16Copies {
  std::int64_t min_rows;
  std::vector<std::int64_t> batches;
};
FASTRNN_EXPORT Bfloat16Copies bfloat16_copies(const LayerShape& shape);
// One line for users: which kernels compute forward in bfloat16 for this shape, and why.
FASTRNN_EXPORT std::string bfloat16_reason(const LayerShape& shape);
// The plan of forward or backward: of float32 copies, unless these kernels compute it.
FASTRNN_EXPORT Plan make_bfloat16_plan(const LayerShape& shape, Pass pass, int threads,
                                       int directions);

// Runs the directions of a layer (1 or 2, which differ only in `reverse` and their pointers), if
// computes_bfloat16(shape). whole: as for forward in cpu/api.h.
FASTRNN_EXPORT void bfloat16_forward(const Bfloat16Forward* directions, int count, int threads,
                                     ParallelFor parallel_for, const WholeLayer* whole = nullptr);

// The same for the backward time loop.
FASTRNN_EXPORT bool computes_bfloat16_backward(const LayerShape& shape);
FASTRNN_EXPORT void bfloat16_backward(const Bfloat16Backward* directions, int count, int threads,
                                      ParallelFor parallel_for);
// The same for the products after the backward time loop.
FASTRNN_EXPORT bool computes_bfloat16_gradients(const LayerShape& shape);
FASTRNN_EXPORT std::string bfloat16_gradients_reason(const LayerShape& shape);
FASTRNN_EXPORT void bfloat16_gradients(const Bfloat16Gradients* directions, int count, int threads,
                                       ParallelFor parallel_for);

// Bfloat16 kernels of the instruction set in use that this machine can run, the slowest first.
FASTRNN_EXPORT std::vector<std::string> available_bfloat16_kernels();
// Forces kernels for all shapes as long as their instruction set is in use; "float32" forces
// float32 copies, "" restores the choice. Returns false if they are not available.
FASTRNN_EXPORT bool set_bfloat16_kernels(const std::string& name);

}  // namespace fastrnn::cpu
