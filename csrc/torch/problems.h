// The results of an operator, and the structs of problem/layer.h that a kernel gets: one for each
// direction.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "problem/layer.h"
#include "torch/arguments.h"

namespace fastrnn {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using TwelveTensors =
    decltype(std::tuple_cat(std::declval<EightTensors>(), std::declval<FourTensors>()));

inline FourTensors four(const std::vector<Tensor>& tensors, size_t first) {
  return {tensors[first], tensors[first + 1], tensors[first + 2], tensors[first + 3]};
}

// null.
inline int64_t direction_offset(const Tensor& t, int64_t d) {
  return d == 0 ? 0 : d * t.size(1) * t.size(2);
}
template <class S>
S* output_of(const Tensor& t, int64_t d) {
  return static_cast<S*>(t.data_ptr()) + direction_offset(t, d);
}
template <class S>
S* output_of(const std::optional<Tensor>& t, int64_t d) {
  return t ? output_of<S>(*t, d) : nullptr;
}
// The same of what it reads.
template <class S>
const S* input_of(const Tensor& t, int64_t d) {
  return static_cast<const S*>(t.const_data_ptr()) + direction_offset(t, d);
}
template <class S>
const S* input_of(const std::optional<Tensor>& t, int64_t d) {
  return t ? input_of<S>(*t, d) : nullptr;
}

// The resets of a padded batch on the CPU, checked; no mask: none.
struct LayerResets {
  const std::uint8_t* mask = nullptr;  // [T, B]
  // The new states and, if they are needed, their gradients, which are added: [D, B, *] of all
  // steps or [T, D, B, *] of each, contiguous, in the layer's compute type.
  std::optional<Tensor> h, c, d_h, d_c;

  template <class S>
  Resets<S> of(int64_t d) const {
    if (mask == nullptr) return {};
    return {mask, at<const S>(h, d), at<const S>(c, d), stride(h), stride(c)};
  }
  // That of a direction at the first step, or null.
  template <class S>
  static S* at(const std::optional<Tensor>& t, int64_t d) {
    if (!t) return nullptr;
    const int64_t last = t->dim() - 1;
    return static_cast<S*>(t->data_ptr()) + d * t->size(last - 1) * t->size(last);
  }

 private:
  static int64_t stride(const std::optional<Tensor>& t) {
    return t && t->dim() == 4 ? t->size(1) * t->size(2) * t->size(3) : 0;
  }
};

// Where large tensors come from.
using Allocate = Tensor (*)(const std::vector<int64_t>& sizes, ScalarType dtype,
                            const Tensor& like);

struct ForwardOutputs {
  Tensor y, h_n;
  std::optional<Tensor> c_n, saved;

  // All in the layer's compute type, saved in what that accumulates in.
  ForwardOutputs(const LayerArguments& layer, bool save, const Tensor& like,
                 Allocate allocate = empty)
      : y(empty(layer.output_sizes(), layer.compute, like)),
        h_n(empty(layer.state_sizes(layer.out()), layer.compute, like)) {
    if (layer.c0) c_n = empty(layer.state_sizes(layer.cell_units()), layer.compute, like);
    if (save && layer.cell->saved > 0)
      saved = allocate({layer.directions, layer.rows, layer.cell->saved * layer.hidden_size},
                       accumulate_type(layer.compute), like);
  }

  // Tensors that exist.
  ForwardOutputs(Tensor y_, Tensor h_n_, std::optional<Tensor> c_n_, std::optional<Tensor> saved_)
      : y(std::move(y_)), h_n(std::move(h_n_)), c_n(std::move(c_n_)), saved(std::move(saved_)) {}

  // As the schema returns them, with placeholders.
  FourTensors tensors(const LayerArguments& layer) const {
    return {layer.from_compute(y), layer.from_compute(h_n),
            c_n ? layer.from_compute(*c_n) : placeholder(layer.dtype, y),
            saved ? *saved : placeholder(accumulate_type(layer.dtype), y)};
  }
};

// The results of recurrent_states from those of recurrent_forward.
inline FiveTensors with_step_states(const FourTensors& results, const std::string& cell_name) {
  const auto& [y, h_n, c_n, saved] = results;
  const CellInfo& cell = *find_cell(cell_name);
  const ScalarType dtype = checked_dtype("y", y);
  if (cell.states == 1) return {y, h_n, c_n, placeholder(dtype, y), saved};
  const int64_t hidden = saved.size(2) / cell.saved;
  Tensor own = saved;
  const Tensor view =
      torch::stable::narrow(own, 2, cell.saved_state * hidden, cell.cell_states() * hidden);
  Tensor c_steps = empty(sizes_of(view), dtype, y);
  torch::stable::copy_(c_steps, view);
  return {y, h_n, c_n, c_steps, saved};
}

// Without results.
template <class S, class A>
LayerForward<S, A> forward_inputs(const LayerArguments& layer, int64_t d, const Rows& x) {
  LayerForward<S, A> problem{};
  problem.shape = layer.shape(d);
  problem.weights = layer.direction[d].view<S>();
  problem.x = static_cast<const S*>(x.data);
  problem.x_stride = x.stride;
  problem.h0 = input_of<S>(layer.h0, d);
  problem.c0 = input_of<S>(layer.c0, d);
  return problem;
}

template <class S, class A>
LayerForward<S, A> forward_problem(const LayerArguments& layer, int64_t d, const Rows& x,
                                   const ForwardOutputs& outputs) {
  LayerForward<S, A> problem = forward_inputs<S, A>(layer, d, x);
  problem.y = static_cast<S*>(outputs.y.data_ptr()) + d * layer.out();
  problem.y_stride = layer.directions * layer.out();
  problem.h_n = output_of<S>(outputs.h_n, d);
  problem.c_n = output_of<S>(outputs.c_n, d);
  problem.saved = output_of<A>(outputs.saved, d);
  return problem;
}

struct BackwardInputs {
  Rows y;
  Tensor saved;
  std::optional<Rows> d_y;
  std::optional<Tensor> d_h_n, d_c_n, d_c_steps;

  BackwardInputs(const LayerArguments& layer, const Tensor& y_, const Tensor& saved_,
                 const std::optional<Tensor>& d_y_, const std::optional<Tensor>& d_h_n_,
                 const std::optional<Tensor>& d_c_n_,
                 const std::optional<Tensor>& d_c_steps_ = std::nullopt)
      : y(layer.to_compute(y_)),
        saved(saved_),
        d_h_n(layer.contiguous_compute(d_h_n_)),
        d_c_n(layer.contiguous_compute(d_c_n_)),
        d_c_steps(layer.contiguous_compute(d_c_steps_)) {
    if (d_y_) d_y.emplace(layer.to_compute(*d_y_));
  }
};

struct BackwardOutputs {
  Tensor d_pre;
  std::optional<Tensor> d_h_all;
  Tensor d_h0;
  std::optional<Tensor> d_c0;

  // All in the layer's compute type.
  BackwardOutputs(const LayerArguments& layer, const Tensor& like, Allocate allocate = empty)
      : BackwardOutputs(layer, like, allocate, allocate) {}
  // d_pre from elsewhere: not every caller returns it.
  BackwardOutputs(const LayerArguments& layer, const Tensor& like, Allocate allocate,
                  Allocate allocate_pre)
      : d_pre(allocate_pre({layer.directions, layer.rows, layer.gradient_units()}, layer.compute,
                           like)),
        d_h0(empty(layer.state_sizes(layer.out()), layer.compute, like)) {
    if (layer.proj_size > 0)
      d_h_all = allocate({layer.directions, layer.rows, layer.proj_size}, layer.compute, like);
    if (layer.c0) d_c0 = empty(layer.state_sizes(layer.cell_units()), layer.compute, like);
  }

  // As the schema returns them, with placeholders.
  FourTensors tensors(const LayerArguments& layer) const {
    return {d_pre, d_h_all ? *d_h_all : placeholder(layer.compute, d_pre), layer.from_compute(d_h0),
            d_c0 ? layer.from_compute(*d_c0) : placeholder(layer.dtype, d_pre)};
  }
};

template <class S, class A>
LayerBackward<S, A, S> backward_problem(const LayerArguments& layer, int64_t d,
                                        const BackwardInputs& inputs,
                                        const BackwardOutputs& outputs) {
  LayerBackward<S, A, S> problem{};
  problem.shape = layer.shape(d);
  problem.weights = layer.direction[d].view<S>();
  problem.h0 = input_of<S>(layer.h0, d);
  problem.c0 = input_of<S>(layer.c0, d);
  problem.y = static_cast<const S*>(inputs.y.data) + d * layer.out();
  problem.y_stride = inputs.y.stride;
  if (layer.cell->saved > 0) problem.saved = input_of<A>(inputs.saved, d);
  if (inputs.d_y) {
    problem.d_y = static_cast<const S*>(inputs.d_y->data) + d * layer.out();
    problem.d_y_stride = inputs.d_y->stride;
  }
  problem.d_h_n = input_of<S>(inputs.d_h_n, d);
  problem.d_c_n = input_of<S>(inputs.d_c_n, d);
  problem.d_c_steps = input_of<S>(inputs.d_c_steps, d);
  problem.d_pre = output_of<S>(outputs.d_pre, d);
  problem.d_h_all = output_of<S>(outputs.d_h_all, d);
  problem.d_h0 = output_of<S>(outputs.d_h0, d);
  problem.d_c0 = output_of<S>(outputs.d_c0, d);
  return problem;
}

// The tensors that the products are written into, in the layer's compute type; empty where they are
// not asked for. Each direction has d_w_ih, d_w_hh, d_b_ih and d_b_hh, biases or not.
struct GradientOutputs {
  Tensor d_x;
  std::vector<Tensor> d_weights;

  GradientOutputs(const LayerArguments& layer, const Tensor& x, const std::vector<Tensor>& weights,
                  int64_t slots, int64_t outputs, Allocate allocate, Allocate allocate_x)
      : d_x(has_slot(outputs, kDX) ? allocate_x(sizes_of(x), layer.compute, x)
                                   : placeholder(layer.compute, x)) {
    const int64_t count = count_slots(slots);
    d_weights.reserve(layer.directions * kGradientsPerDirection);
    for (int64_t d = 0; d < layer.directions; ++d) {
      for (int slot = kWIh; slot < kGradientsPerDirection; ++slot) {
        const int output = kDWIh + int(d) * kGradientsPerDirection + slot;
        if (has_slot(slots, slot) && has_slot(outputs, output)) {
          const Tensor& weight = weights[d * count + count_slots(slots, slot)];
          d_weights.push_back(allocate(sizes_of(weight), layer.compute, weight));
        } else {
          d_weights.push_back(placeholder(layer.compute, x));
        }
      }
    }
  }

  // Null where it is not asked for.
  template <class T>
  T* weight(int64_t d, WeightSlot slot) const {
    const Tensor& t = d_weights[d * kGradientsPerDirection + slot];
    return t.dim() == 1 && t.size(0) == 0 ? nullptr : static_cast<T*>(t.data_ptr());
  }
};
static_assert(kBHh + 1 == kGradientsPerDirection, "the results follow the weight slots");

// Without d_pre.
template <class T>
LayerGradients<T> gradient_problem(const LayerArguments& layer, int64_t d, const Rows& x,
                                   const Rows& y, const GradientOutputs& outputs, bool need_x) {
  LayerGradients<T> problem{};
  problem.shape = layer.shape(d);
  problem.w_ih = static_cast<const T*>(layer.direction[d].w_ih.data);
  problem.w_ih_stride = layer.direction[d].w_ih.stride;
  problem.x = static_cast<const T*>(x.data);
  problem.x_stride = x.stride;
  problem.h0 = input_of<T>(layer.h0, d);
  problem.y = static_cast<const T*>(y.data) + d * layer.out();
  problem.y_stride = y.stride;
  problem.rows = {0, layer.rows};
  problem.d_x = need_x ? static_cast<T*>(outputs.d_x.data_ptr()) : nullptr;
  problem.add_to_x = d > 0;
  problem.d_w_ih = outputs.weight<T>(d, kWIh);
  problem.d_w_hh = outputs.weight<T>(d, kWHh);
  problem.d_b_ih = outputs.weight<T>(d, kBIh);
  problem.d_b_hh = outputs.weight<T>(d, kBHh);
  return problem;
}

}  // namespace fastrnn
