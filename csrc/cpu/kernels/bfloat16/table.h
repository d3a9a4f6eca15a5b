// The bfloat16 kernels of one instruction set: a row of the table in cpu/isa/bfloat16_dispatch.cpp.
//
// They are the time loop of schedule/forward.h with panels of a format that multiplies bfloat16: a
// record as in product.h or tiles.h, with its panels, the rows of its tiles and its product.
// Another format needs a source file in cpu/isa/, a row in the dispatch table and a line in
// pick_bfloat16_kernels (cpu/plan.cpp).
#pragma once

// First: it compiles the cells for the instruction set.
#if defined(FASTRNN_BF16_TILES)
#include "cpu/kernels/bfloat16/tiles.h"
#else
#include "cpu/kernels/bfloat16/product.h"
#endif

#include "cpu/isa/bfloat16.h"
#include "cpu/kernels/bfloat16/gradients.h"
#include "cpu/kernels/schedule/backward.h"
#include "cpu/kernels/schedule/forward.h"

#if !defined(FASTRNN_BF16_OWNER)
#define FASTRNN_BF16_OWNER FASTRNN_ISA
#endif
#define FASTRNN_BF16_QUOTED_NAME(name) #name
#define FASTRNN_BF16_QUOTED(name) FASTRNN_BF16_QUOTED_NAME(name)

FASTRNN_KERNELS_BEGIN

#if defined(FASTRNN_BF16_TILES)
using Bfloat16Format = Bfloat16Tiles;
#else
using Bfloat16Format = Bfloat16Pairs;
#endif
using Bfloat16Panels = ForwardPanels<float, Bfloat16Format, Bfloat16Format>;

inline void bfloat16_pack_rank(const LayerShape& shape, const LayerWeights<Bfloat16>& weights,
                               const Plan& plan, const PanelLayout& layout, float* panels,
                               int rank) {
  Bfloat16Panels(shape, weights, plan, layout, panels).pack(rank);
}

template <class Cell>
void bfloat16_forward_rank(const Bfloat16Forward& problem, const Plan& plan,
                           const PanelLayout& panel_layout, float* panels,
                           const ForwardLayout& layout, float* scratch, Team& team, int rank) {
  const Bfloat16Panels packed(problem.shape, problem.weights, plan, panel_layout, panels);
  ForwardWalk<Cell, float, Bfloat16Panels>(problem, plan, packed, layout, scratch, team, rank)
      .run();
  Bfloat16Format::finish();
}

// A cell without these kernels has null pointers.
template <class Cell>
constexpr auto bfloat16_forward_of() {
  using Function = decltype(&bfloat16_forward_rank<cells::Lstm>);
  if constexpr (kHasReducedFormats<Cell>)
    return Function(bfloat16_forward_rank<Cell>);
  else
    return Function(nullptr);
}

#if defined(FASTRNN_BF16_TILES) || defined(FASTRNN_BF16_DOT)
template <class Cell>
void bfloat16_gradient_rank(const Bfloat16Gradients& problem, const Plan& plan, float* workspace,
                            Team& team, int rank) {
  Bfloat16GradientWalk<Cell, Bfloat16Format>(problem, plan, workspace, team, rank).run();
  Bfloat16Format::finish();
}
template <class Cell>
void bfloat16_backward_rank(const Bfloat16Backward& problem, const Plan& plan,
                            const BackwardLayout& layout, float* workspace, Team& team, int rank) {
  BackwardWalk<Cell, float, Bfloat16Format>(
      problem, problem.stored_w_hh, problem.stored_w_hh_stride, plan, layout, workspace, team, rank)
      .run();
  Bfloat16Format::finish();
}
template <class Cell>
constexpr auto bfloat16_backward_of() {
  using Function = decltype(&bfloat16_backward_rank<cells::Lstm>);
  if constexpr (kHasReducedFormats<Cell>)
    return Function(bfloat16_backward_rank<Cell>);
  else
    return Function(nullptr);
}
template <class Cell>
constexpr auto bfloat16_gradients_of() {
  using Function = decltype(&bfloat16_gradient_rank<cells::Lstm>);
  if constexpr (kHasReducedFormats<Cell>)
    return Function(bfloat16_gradient_rank<Cell>);
  else
    return Function(nullptr);
}
#define FASTRNN_BF16_BACKWARD(type) bfloat16_backward_of<type>()
#define FASTRNN_BF16_GRADIENTS(type) bfloat16_gradients_of<type>()
#else
#define FASTRNN_BF16_BACKWARD(type) nullptr
#define FASTRNN_BF16_GRADIENTS(type) nullptr
#endif

extern const Bfloat16Kernels kBfloat16Kernels;
const Bfloat16Kernels kBfloat16Kernels = {
    FASTRNN_BF16_QUOTED(FASTRNN_ISA),
    FASTRNN_BF16_QUOTED(FASTRNN_BF16_OWNER),
    Bfloat16Format::kProduct,
    Bfloat16Format::kFormat,
    bfloat16_pack_rank,
    {
#define FASTRNN_CELL(kind, name, type) bfloat16_forward_of<type>(),
        FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    },
    {
#define FASTRNN_CELL(kind, name, type) FASTRNN_BF16_BACKWARD(type),
        FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    },
    {
#define FASTRNN_CELL(kind, name, type) FASTRNN_BF16_GRADIENTS(type),
        FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    },
};

FASTRNN_KERNELS_END
