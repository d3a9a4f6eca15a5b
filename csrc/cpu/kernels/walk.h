// The kernels of one cell and type, as functions that a rank of a call runs.
#pragma once

#include "cpu/kernels/product/formats.h"
#include "cpu/kernels/schedule/backward.h"
#include "cpu/kernels/schedule/forward.h"
#include "cpu/kernels/schedule/gradients.h"

FASTRNN_KERNELS_BEGIN

// The formats of w_hh in forward for a cell of the registry.
template <class Cell, class T>
using FormatsOf = std::conditional_t<kHasReducedFormats<Cell>, typename RecurrentFormats<T>::List,
                                     FormatList<NativeFormat<T>>>;

// Calls function(panels) with ForwardPanels in the format of the plan. Here, and only here, a
// format chooses code.
template <class Formats, class T, class Function>
FASTRNN_INLINE void with_panels(const LayerShape& shape, const LayerWeights<T>& weights,
                                const Plan& plan, const PanelLayout& layout, T* panels,
                                Function&& function) {
  Formats::select(plan.recurrent_format, [&](auto tag) {
    function(ForwardPanels<T, typename decltype(tag)::Type>(shape, weights, plan, layout, panels));
  });
}

template <class T>
void pack_rank(const LayerShape& shape, const LayerWeights<T>& weights, const Plan& plan,
               const PanelLayout& layout, T* panels, int rank) {
  with_panels<typename RecurrentFormats<T>::List>(shape, weights, plan, layout, panels,
                                                  [&](const auto& packed) { packed.pack(rank); });
}

template <class Cell, class T, class Formats>
void forward_rank(const LayerForward<T, T>& problem, const Plan& plan,
                  const PanelLayout& panel_layout, T* panels, const ForwardLayout& layout,
                  T* scratch, Team& team, int rank) {
  with_panels<Formats>(
      problem.shape, problem.weights, plan, panel_layout, panels, [&](const auto& packed) {
        using Panels = std::decay_t<decltype(packed)>;
        ForwardWalk<Cell, T, Panels>(problem, plan, packed, layout, scratch, team, rank).run();
      });
}

template <class Cell, class T>
void backward_rank(const LayerBackward<T, T>& problem, const Plan& plan,
                   const BackwardLayout& layout, T* workspace, Team& team, int rank) {
  BackwardWalk<Cell, T>(problem, problem.weights.w_hh, problem.weights.w_hh_stride, plan, layout,
                        workspace, team, rank)
      .run();
}

template <class Cell, class T>
void gradient_rank(const LayerGradients<T>& problem, const Plan& plan, const GradientLayout& layout,
                   T* workspace, Team& team, int rank) {
  GradientWalk<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

template <class Cell, class T, class Formats = typename RecurrentFormats<T>::List>
constexpr Walk<T> walk() {
  return {forward_rank<Cell, T, Formats>, backward_rank<Cell, T>, gradient_rank<Cell, T>};
}

FASTRNN_KERNELS_END
