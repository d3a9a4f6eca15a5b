// The arguments and results of inference with int8 weights, for one direction of one layer.
//
// A weight is an integer of 8 bits times the scale of its row: w = scale q, |q| <= 127. The values
// that it multiplies are bytes: x = scale (b - zero_point), with a scale and a zero point for each
// row of x, and h in the same way. Products of bytes are added in 32 bits without rounding:
//
//   sum_k x_k w_k = x_scale w_scale (sum_k b_k q_k - zero_point sum_k q_k)
//
// The last sum is a constant of the row of weights, so it is stored. Everything after the products
// (gates, cell state, output) is float32.
//
// Weights are stored in panels, in the order in which the kernels read them. The order is the same
// for every instruction set, so that a stored model runs on every machine:
//
//   panel  [ceil(H / 16)][ceil(K / 4)][G][16 units][4]     K: I for w_ih and H for w_hh
//   values of a row of weights (scales, sums)  [ceil(H / 16)][G][16]
//   bias   [ceil(H / 16)][Q][16]           b_ih + b_hh by pre-activation
//
// Units beyond H and columns beyond K hold zeros.
#pragma once

#include <cstdint>

#include "problem/layer.h"

namespace fastrnn {

constexpr std::int64_t kInt8Units = 16;  // hidden units per block of a panel
constexpr std::int64_t kInt8Depth = 4;   // values along K that lie next to each other
// The largest K: partial sums, at most 2 * 255 * 127 * K with the zero point, fit in 32 bits.
constexpr std::int64_t kInt8MostColumns = 32768;

// Whether a cell has int8 kernels.
constexpr bool has_int8(const CellInfo& cell) { return cell.reduced; }

constexpr std::int64_t int8_blocks(std::int64_t units) {
  return (units + kInt8Units - 1) / kInt8Units;
}
constexpr std::int64_t int8_quads(std::int64_t columns) {
  return (columns + kInt8Depth - 1) / kInt8Depth;
}

// A matrix of weights in panels.
struct Int8Matrix {
  const std::int8_t* panels;
  const float* scales;
  const std::int32_t* sums;
};

struct Int8Forward {
  LayerShape shape;
  Int8Matrix w_ih, w_hh;
  const float* bias;
  const float* x;  // [N, I]
  std::int64_t x_stride;
  const float* h0;  // [B, H]
  const float* c0;  // [B, H] or null
  float* y;         // [N, H], y_stride apart: both directions share rows of D*H
  std::int64_t y_stride;
  float* h_n;  // [B, H]
  float* c_n;  // [B, H] or null
};

}  // namespace fastrnn
