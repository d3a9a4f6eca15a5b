// What a kernel computes, as plain data: one direction of one layer. The same structs serve the CPU
// and CUDA. Pointers belong to the caller and refer to memory of the device that runs the kernel.
//
// S is the type of the caller's tensors, A the type the kernel accumulates in (on the CPU S = A).
#pragma once

#include <cstdint>

#include "cells/registry.h"
#include "problem/sequence.h"
#include "problem/weight_format.h"

namespace fastrnn {

struct LayerShape {
  CellKind cell;
  Sequence sequence;
  std::int64_t input_size;   // I
  std::int64_t hidden_size;  // H
  std::int64_t proj_size;    // P, 0: no projection

  std::int64_t output_size() const { return proj_size > 0 ? proj_size : hidden_size; }  // R
};

template <class S>
struct LayerWeights {
  const S* w_ih;                                       // [G*H, I]
  const S* w_hh;                                       // [G*H, R]
  const S* b_ih;                                       // [G*H] or null
  const S* b_hh;                                       // [G*H] or null (both or none)
  const S* w_hr;                                       // [P, H] or null
  std::int64_t w_ih_stride, w_hh_stride, w_hr_stride;  // of a row; columns are contiguous
};

template <class S, class A>
struct LayerForward {
  LayerShape shape;
  LayerWeights<S> weights;
  const S* x;  // [N, I]
  std::int64_t x_stride;
  const S* h0;  // [B, R]
  const S* c0;  // [B, H] or null
  S* y;         // [N, R], y_stride apart: both directions share rows of D*R
  std::int64_t y_stride;
  S* h_n;    // [B, R]
  S* c_n;    // [B, H] or null
  A* saved;  // [N, S*H] what backward needs (columns in the order of the cell's saved), or null
  WeightFormat recurrent_format;  // the caller allows this format for w_hh, where it is faster
};

template <class S, class A, class D = A>
struct LayerBackward {
  LayerShape shape;
  LayerWeights<S> weights;
  const S* h0;  // [B, R]
  const S* c0;  // [B, H] or null
  const S* y;   // [N, R], y_stride apart
  std::int64_t y_stride;
  const A* saved;  // [N, S*H] or null
  const S* d_y;    // [N, R], d_y_stride apart, or null: zero
  std::int64_t d_y_stride;
  const S* d_h_n;  // [B, R] or null: zero
  const S* d_c_n;  // [B, H] or null: zero
  D* d_pre;        // [N, Q*H] gradients at the pre-activations
  D* d_h_all;      // [N, P] gradients at the projected outputs, or null without projection
  S* d_h0;         // [B, R]
  S* d_c0;         // [B, H] or null
};

// The products over all steps that follow the walk back: gradients of the weights and of the input.
template <class T>
struct LayerGradients {
  LayerShape shape;
  const T* w_ih;  // [G*H, I], w_ih_stride apart
  std::int64_t w_ih_stride;
  const T* x;  // [N, I], x_stride apart
  std::int64_t x_stride;
  const T* h0;  // [B, R]
  const T* y;   // [N, R], y_stride apart
  std::int64_t y_stride;
  const T* d_pre;  // [N, Q*H]
  // What is wanted; null: not this.
  T* d_x;         // [N, I]
  bool add_to_x;  // d_x += instead of =: the other direction has been there
  T* d_w_ih;      // [G*H, I]
  T* d_w_hh;      // [G*H, R]
  T* d_b_ih;      // [G*H]
  T* d_b_hh;      // [G*H]
};

}  // namespace fastrnn
