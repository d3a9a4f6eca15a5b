// From the operators' arguments to one checked value, for the CPU and CUDA alike: every check that
// keeps a kernel from reading or writing where it must not.
//
//   schema -> LayerArguments (checked, laid out) -> torch/problems.h -> problem/layer.h
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "problem/layer.h"
#include "torch/slots.h"
#include "torch/stable.h"

namespace fastrnn {

// A matrix whose rows are contiguous, and how far apart they are: the tensor's own memory if it is
// laid out so (all leading dimensions collapse into one stride), else a copy.
struct Rows {
  Tensor kept;
  const void* data;
  int64_t stride;

  explicit Rows(const Tensor& t) : kept(t) {
    if (!collapses(t, stride)) {
      kept = torch::stable::contiguous(t);
      stride = t.size(t.dim() - 1);
    }
    data = kept.const_data_ptr();  // of a lazy clone too: to ask for more would copy it
  }

 private:
  static bool collapses(const Tensor& t, int64_t& stride) {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const int64_t last = int64_t(sizes.size()) - 1;
    if (sizes[last] != 1 && strides[last] != 1) return false;
    bool found = false;
    int64_t expected = 0;
    stride = sizes[last];
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (!found) {
        stride = strides[i];
        if (stride < sizes[last]) return false;  // rows that overlap: expanded
        found = true;
      } else if (strides[i] != expected) {
        return false;
      }
      expected = strides[i] * sizes[i];
    }
    return true;
  }
};

// One direction's parameters.
struct Direction {
  Rows w_ih;
  std::optional<Rows> w_hh;
  std::optional<Tensor> b_ih, b_hh;
  std::optional<Rows> w_hr;
  std::optional<Tensor> w_unit;

  template <class S>
  LayerWeights<S> view() const {
    return {static_cast<const S*>(w_ih.data),
            w_hh ? static_cast<const S*>(w_hh->data) : nullptr,
            b_ih ? static_cast<const S*>(b_ih->const_data_ptr()) : nullptr,
            b_hh ? static_cast<const S*>(b_hh->const_data_ptr()) : nullptr,
            w_hr ? static_cast<const S*>(w_hr->data) : nullptr,
            w_ih.stride,
            w_hh ? w_hh->stride : 0,
            w_hr ? w_hr->stride : 0,
            w_unit ? static_cast<const S*>(w_unit->const_data_ptr()) : nullptr};
  }
};

// The arguments that the operators share, checked and laid out for kernels of the type `compute`.
// They speak of sequences, or of one step of one direction: then x is [B, I] without batch_sizes,
// and y, the states and their gradients are [B, *] as well. (A cell that made views of [1, B, *]
// would pay for each in torch's graph more than for the step.)
struct LayerArguments {
  const CellInfo* cell;
  ScalarType dtype, compute;
  int32_t code;  // dtype, as torch numbers it
  DeviceId place;
  int64_t steps, batch, input_size, hidden_size, proj_size, rows, directions;
  bool packed, single;  // single: one step
  std::vector<int64_t> step_offset, step_rows;
  std::vector<Direction> direction;
  Tensor h0;
  std::optional<Tensor> c0;

  // data: x (forward) or y (backward), [T,B,*] or packed [N,*].
  LayerArguments(const char* data_name, const Tensor& data, const Tensor& h0_,
                 const std::optional<Tensor>& c0_, const std::vector<Tensor>& weights,
                 int64_t slots, const std::optional<std::vector<Tensor>>& sequence,
                 const std::string& cell_name, ScalarType compute_type);

  int64_t out() const { return proj_size > 0 ? proj_size : hidden_size; }            // R
  int64_t cell_units() const { return cell->cell_states() * hidden_size; }           // C*H
  int64_t gradient_units() const { return cell->gradient_columns() * hidden_size; }  // (Q+E)*H

  LayerShape shape(int64_t d) const {
    const Sequence sequence = {int64_t(step_rows.size()), batch, d == 1, step_offset.data(),
                               step_rows.data()};
    return {*cell, sequence, input_size, hidden_size, proj_size};
  }

  // The shape of y: [T, B, D*R], packed [N, D*R], of one step [B, R].
  std::vector<int64_t> output_sizes() const {
    if (packed || single) return {rows, directions * out()};
    return {steps, batch, directions * out()};
  }
  // The shape of a state of so many units: [D, B, units], of one step [B, units].
  std::vector<int64_t> state_sizes(int64_t units) const {
    if (single) return {batch, units};
    return {directions, batch, units};
  }

  // Checks device, dtype and memory of a tensor.
  void check_like(const char* name, const Tensor& t) const;

  // A tensor that check_like has passed, in the type to compute in.
  Tensor to_compute(const Tensor& t) const {
    return compute == dtype ? t : torch::stable::to(t, compute);
  }
  // A result, in the caller's type.
  Tensor from_compute(const Tensor& t) const {
    return compute == dtype ? t : torch::stable::to(t, dtype);
  }
  Tensor contiguous_compute(const Tensor& t) const { return as_contiguous(to_compute(t)); }
  std::optional<Tensor> contiguous_compute(const std::optional<Tensor>& t) const {
    return t ? std::optional(contiguous_compute(*t)) : std::nullopt;
  }

 private:
  void read_weights(const std::vector<Tensor>& weights, int64_t slots);
  void read_sequence(const char* data_name, const Tensor& data, int64_t slots,
                     const std::optional<std::vector<Tensor>>& sequence);
  void read_padded(const char* data_name, const Tensor& data);
  void read_packed(const char* data_name, const Tensor& data, const Tensor& batch_sizes);
  void check_products() const;
};

// Checks that a tensor's storage holds all of its values: it may have been resized afterwards.
void check_memory(const char* name, const Tensor& t, int64_t value_bytes);
// Returns the cell of this name.
// In find_cell.cpp for the CPU, in ops_cuda.cpp for CUDA. Throws if there is no such cell.
const CellInfo* find_cell(const std::string& name);
// Returns the checked number of rows of each step of a packed batch of `batch` sequences.
std::vector<int64_t> packed_step_rows(const Tensor& batch_sizes, int64_t batch);

// Checks the last dimension of x.
void check_input(const LayerArguments& layer, const Tensor& x);

// Checks the values that forward has kept for backward.
void check_kept(const LayerArguments& layer, const char* name, const Tensor& kept,
                std::initializer_list<int64_t> sizes);
// Checks y and the gradients of the results of forward.
void check_gradients(const LayerArguments& layer, const Tensor& y, const std::optional<Tensor>& d_y,
                     const std::optional<Tensor>& d_h_n, const std::optional<Tensor>& d_c_n,
                     const std::optional<Tensor>& d_c_steps = std::nullopt);
// Checks what backward gets beyond the layer itself.
void check_backward(const LayerArguments& layer, const Tensor& y, const Tensor& saved,
                    const std::optional<Tensor>& d_y, const std::optional<Tensor>& d_h_n,
                    const std::optional<Tensor>& d_c_n,
                    const std::optional<Tensor>& d_c_steps = std::nullopt);

}  // namespace fastrnn
