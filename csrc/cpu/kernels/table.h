// The kernels of one instruction set, instantiated for every cell and type: a row of the dispatch
// table.
#pragma once

#include "cpu/kernels/int8/table.h"
#include "cpu/kernels/peak.h"
#include "cpu/kernels/product/formats.h"
#include "cpu/kernels/recurrence/table.h"
#include "cpu/kernels/scan/scan.h"
#include "cpu/kernels/schedule/backward.h"
#include "cpu/kernels/schedule/forward.h"
#include "cpu/kernels/schedule/gradients.h"

FASTRNN_KERNELS_BEGIN

// Calls function(panels) with ForwardPanels in the format of the plan. Here, and only here, a
// format chooses code.
template <class T, class Function>
FASTRNN_INLINE void with_panels(const LayerShape& shape, const LayerWeights<T>& weights,
                                const Plan& plan, const PanelLayout& layout, T* panels,
                                Function&& function) {
  RecurrentFormats<T>::List::select(plan.recurrent_format, [&](auto tag) {
    function(ForwardPanels<T, typename decltype(tag)::Type>(shape, weights, plan, layout, panels));
  });
}

template <class T>
void pack_rank(const LayerShape& shape, const LayerWeights<T>& weights, const Plan& plan,
               const PanelLayout& layout, T* panels, int rank) {
  with_panels(shape, weights, plan, layout, panels, [&](const auto& packed) { packed.pack(rank); });
}

template <class Cell, class T>
void forward_rank(const LayerForward<T, T>& problem, const Plan& plan,
                  const PanelLayout& panel_layout, T* panels, const ForwardLayout& layout,
                  T* scratch, Team& team, int rank) {
  with_panels(problem.shape, problem.weights, plan, panel_layout, panels, [&](const auto& packed) {
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

template <class T>
constexpr Walks<T> walks() {
  return {pack_rank<T>,
          RecurrentFormats<T>::List::kSet,
          {
#define FASTRNN_CELL(kind, name, type) \
  {forward_rank<type, T>, backward_rank<type, T>, gradient_rank<type, T>},
              FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
          }};
}

#define FASTRNN_QUOTED_NAME(name) #name
#define FASTRNN_QUOTED(name) FASTRNN_QUOTED_NAME(name)
extern const Isa kIsa;
const Isa kIsa = {
    FASTRNN_QUOTED(FASTRNN_ISA),
    FASTRNN_VECTOR_BYTES,
    walks<float>(),
    walks<double>(),
    {multiply_add_chains, kPeakFlops},
    scan_types(),
    recurrences<float>(),
    recurrences<double>(),
};

FASTRNN_KERNELS_END
