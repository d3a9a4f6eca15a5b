// The kernels of a cell that computes rows, as functions that a rank of a call runs.
#pragma once

#include "cpu/kernels/rows/backward.h"
#include "cpu/kernels/rows/forward.h"
#include "cpu/kernels/walk.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
void forward_rows_rank(const LayerForward<T, T>& problem, const Plan& plan,
                       const PanelLayout& panel_layout, T* panels, const ForwardLayout& layout,
                       T* scratch, Team& team, int rank) {
  with_panels<typename RecurrentFormats<T>::List>(
      problem.shape, problem.weights, plan, panel_layout, panels, [&](const auto& packed) {
        using Panels = std::decay_t<decltype(packed)>;
        RowForward<Cell, T, Panels>(problem, plan, packed, layout, scratch, team, rank).run();
      });
}

template <class Cell, class T>
void backward_rows_rank(const LayerBackward<T, T>& problem, const Plan& plan,
                        const BackwardLayout& layout, T* workspace, Team& team, int rank) {
  RowBackward<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

// Of a pointwise cell, or of one that computes rows.
template <class Cell, class T>
constexpr Walk<T> walk_of_any() {
  if constexpr (cells::RowTraits<Cell>::kComputesRows)
    return {forward_rows_rank<Cell, T>, backward_rows_rank<Cell, T>, gradient_rank<Cell, T>};
  else
    return walk<Cell, T>();
}

FASTRNN_KERNELS_END
