// The kernels of one instruction set, instantiated for every cell and type: a row of the dispatch.
#pragma once

#include "cpu/kernels/peak.h"
#include "cpu/kernels/product/formats.h"
#include "cpu/kernels/schedule/backward.h"
#include "cpu/kernels/schedule/forward.h"
#include "cpu/kernels/schedule/gradients.h"

FASTRNN_KERNELS_BEGIN

// The one place where the plan's format chooses the code.
template <class Cell, class T, class... Formats>
FASTRNN_INLINE void forward_in(FormatList<Formats...>, const LayerForward<T, T>& problem,
                               const Plan& plan, const ForwardLayout& layout, T* workspace,
                               Team& team, int rank) {
  ((plan.recurrent_format == Formats::kFormat
        ? ForwardWalk<Cell, T, Formats>(problem, plan, layout, workspace, team, rank).run()
        : void()),
   ...);
}

template <class Cell, class T>
void forward_rank(const LayerForward<T, T>& problem, const Plan& plan, const ForwardLayout& layout,
                  T* workspace, Team& team, int rank) {
  forward_in<Cell>(typename RecurrentFormats<T>::List(), problem, plan, layout, workspace, team,
                   rank);
}

template <class Cell, class T>
void backward_rank(const LayerBackward<T, T>& problem, const Plan& plan,
                   const BackwardLayout& layout, T* workspace, Team& team, int rank) {
  BackwardWalk<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

template <class Cell, class T>
void gradient_rank(const LayerGradients<T>& problem, const Plan& plan, const GradientLayout& layout,
                   T* workspace, Team& team, int rank) {
  GradientWalk<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

template <class T>
constexpr Walks<T> walks() {
  return {{
#define FASTRNN_CELL(kind, name, type) \
  {forward_rank<type, T>, backward_rank<type, T>, gradient_rank<type, T>},
              FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
          },
          RecurrentFormats<T>::List::kSet};
}

#define FASTRNN_TEXT_OF(name) #name
#define FASTRNN_TEXT(name) FASTRNN_TEXT_OF(name)
extern const Isa kIsa;
const Isa kIsa = {
    FASTRNN_TEXT(FASTRNN_ISA),         FASTRNN_VECTOR_BYTES, walks<float>(), walks<double>(),
    {multiply_add_chains, kPeakFlops},
};

FASTRNN_KERNELS_END
