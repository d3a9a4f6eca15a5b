// One layer on the CPU from checked arguments, for the operators of several files (ops.cpp).
#pragma once

#include <optional>
#include <vector>

#include "torch/problems.h"

namespace fastrnn {

// Tensors for results: memory of torch's allocator, because a caller may resize a storage.
Tensor ordinary(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
// Tensors that never leave a call: memory that is kept from one call to the next.
Tensor recycled(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
// Tensors for `saved`: either of the two, by size.
Tensor for_saved(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);

// Runs the time loop of forward. x has the layer's compute type.
void run_forward(const LayerArguments& layer, const Tensor& x, const ForwardOutputs& outputs,
                 WeightFormat weight_format = WeightFormat::kNative,
                 const LayerResets& resets = {});

// The gradients of a layer in its compute type. d_x and those of the weights (for each direction
// d_w_ih, d_w_hh, d_b_ih and d_b_hh) are placeholders where they were not asked for.
struct Gradients {
  Tensor d_x, d_h0;
  std::optional<Tensor> d_c0, d_h_all;
  std::vector<Tensor> d_weights;

  // As the schema returns them, with placeholders.
  std::vector<Tensor> tensors(const LayerArguments& layer) const {
    std::vector<Tensor> all{layer.from_compute(d_x), layer.from_compute(d_h0),
                            d_c0 ? layer.from_compute(*d_c0) : placeholder(layer.dtype, d_x),
                            d_h_all ? *d_h_all : placeholder(layer.compute, d_x)};
    for (const Tensor& d_weight : d_weights) all.push_back(layer.from_compute(d_weight));
    return all;
  }
};

// Raises for a cell with parameters, whose gradients `run_gradients` cannot compute.
void check_no_parameters(const LayerArguments& layer);

// A bfloat16 layer whose weights, x and y are multiplied as they are stored.
struct StoredLayer {
  const LayerArguments& layer;  // in bfloat16
  Rows y;
};

// Runs the time loop of backward and the products after it. With `stored`, x is in bfloat16, and
// there are no resets.
Gradients run_gradients(const LayerArguments& layer, const BackwardInputs& inputs, const Tensor& x,
                        const std::vector<Tensor>& weights, int64_t slots, int64_t outputs,
                        Allocate allocate_x, const StoredLayer* stored = nullptr,
                        const LayerResets& resets = {});

}  // namespace fastrnn
