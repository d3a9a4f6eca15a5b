// The arguments and results of a kernel as plain data, for one direction of one layer. The CPU and
// CUDA use the same structs. Pointers belong to the caller and refer to memory of the device that
// runs the kernel.
//
// Storage is the type of the caller's tensors, Accumulator the type in which the kernel
// accumulates. The CPU uses one type for both.
#pragma once

#include <cstdint>

#include "cells/registry.h"
#include "problem/sequence.h"
#include "problem/weight_format.h"

namespace fastrnn {

struct LayerShape {
  CellRef cell;
  Sequence sequence;
  std::int64_t input_size;   // I
  std::int64_t hidden_size;  // H
  std::int64_t proj_size;    // P, 0: no projection

  std::int64_t output_size() const { return proj_size > 0 ? proj_size : hidden_size; }  // R
};

template <class Storage>
struct LayerWeights {
  const Storage* w_ih;                                 // [G*H, I]
  const Storage* w_hh;                                 // [G*H, R] or null: no recurrent product
  const Storage* b_ih;                                 // [G*H] or null
  const Storage* b_hh;                                 // [G*H] or null; as b_ih, if w_hh exists
  const Storage* w_hr;                                 // [P, H] or null
  std::int64_t w_ih_stride, w_hh_stride, w_hr_stride;  // of a row; columns are contiguous
  const Storage* w_unit;                               // [E*H] or null
};

// The rows of a padded batch whose state before a step is replaced.
template <class Storage>
struct Resets {
  const std::uint8_t* mask;  // [T, B] not 0 before a step whose state is replaced, or null: none
  const Storage* h;          // [B, R] the new states of a step; null (CUDA only): zeros
  const Storage* c;          // [B, C*H] the same
  std::int64_t h_stride, c_stride;  // between the states of two steps; 0: the same for all
};

template <class Storage, class Accumulator>
struct LayerForward {
  LayerShape shape;
  LayerWeights<Storage> weights;
  const Storage* x;  // [N, I]
  std::int64_t x_stride;
  const Storage* h0;  // [B, R]
  const Storage* c0;  // [B, C*H] or null; C: cell states
  Storage* y;         // [N, R], y_stride apart: both directions share rows of D*R
  std::int64_t y_stride;
  Storage* h_n;  // [B, R]
  Storage* c_n;  // [B, C*H] or null
  // [N, S*H] the values that backward needs, in the order of the cell's saved, or null
  Accumulator* saved;
  WeightFormat recurrent_format;  // format that w_hh may have where it is faster
  // [B, C*H] or null. If Storage is not Accumulator: the initial cell states, which the call
  // replaces by the final ones. c0 is not read then.
  Accumulator* unrounded_c;
  Resets<Storage> resets;
};

template <class Storage, class Accumulator, class PreGradient = Accumulator>
struct LayerBackward {
  LayerShape shape;
  LayerWeights<Storage> weights;
  const Storage* h0;  // [B, R]
  const Storage* c0;  // [B, C*H] or null
  const Storage* y;   // [N, R], y_stride apart
  std::int64_t y_stride;
  const Accumulator* saved;  // [N, S*H] or null
  const Storage* d_y;        // [N, R], d_y_stride apart, or null: zero
  std::int64_t d_y_stride;
  const Storage* d_h_n;  // [B, R] or null: zero
  const Storage* d_c_n;  // [B, C*H] or null: zero
  // [N, C*H] gradients at the cell states after every step, in addition to d_c_n, or null: zero
  const Storage* d_c_steps;
  PreGradient* d_pre;    // [N, (Q+E)*H] gradients at the pre-activations and parameters
  PreGradient* d_h_all;  // [N, P] gradients at the projected outputs, or null without projection
  Storage* d_h0;         // [B, R]
  Storage* d_c0;         // [B, C*H] or null
  Resets<Storage> resets;
  // The gradients at resets.h and resets.c, with their strides, are added to these; null: not
  // needed.
  Accumulator* d_reset_h;
  Accumulator* d_reset_c;
};

// The products after the backward time loop: gradients of the weights and of the input.
template <class Value>
struct LayerGradients {
  LayerShape shape;
  const Value* w_ih;  // [G*H, I], w_ih_stride apart
  std::int64_t w_ih_stride;
  const Value* x;  // [N, I], x_stride apart
  std::int64_t x_stride;
  const Value* h0;  // [B, R]
  const Value* y;   // [N, R], y_stride apart
  std::int64_t y_stride;
  RowRange rows;        // the rows of [N, *] to compute with: all, or a part (cpu/recompute.h)
  bool add_to_weights;  // d_w += instead of =, because other rows were there before
  const Value* d_pre;   // [rows.count, (Q+E)*H]
  Resets<Value> resets;
  // Results; null: not needed.
  Value* d_x;     // [N, I]
  bool add_to_x;  // d_x += instead of =, because the other direction has written d_x
  Value* d_w_ih;  // [G*H, I]
  Value* d_w_hh;  // [G*H, R]
  Value* d_b_ih;  // [G*H]
  Value* d_b_hh;  // [G*H]
};

}  // namespace fastrnn
