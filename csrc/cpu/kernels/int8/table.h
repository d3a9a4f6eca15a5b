// The int8 kernels of one instruction set: a row of the table in cpu/isa/int8_dispatch.cpp.
#pragma once

#include "cpu/kernels/int8/forward.h"

#if !defined(FASTRNN_INT8_OWNER)
#define FASTRNN_INT8_OWNER FASTRNN_ISA
#endif
#define FASTRNN_INT8_QUOTED_NAME(name) #name
#define FASTRNN_INT8_QUOTED(name) FASTRNN_INT8_QUOTED_NAME(name)

FASTRNN_KERNELS_BEGIN

#if defined(FASTRNN_INT8_TILES)
constexpr bool kInt8HasTiles = true;
#else
constexpr bool kInt8HasTiles = false;
#endif

template <class Cell>
void int8_forward_rank(const Int8Forward& problem, const Plan& plan, const Int8Layout& layout,
                       char* workspace, Team& team, int rank) {
  Int8Walk<Cell>(problem, plan, layout, workspace, team, rank).run();
  finish_int8();
}

// Null for a cell that has no int8 kernel.
template <CellKind kind, class Cell>
constexpr auto int8_rank() {
  using Function = decltype(&int8_forward_rank<cells::Lstm>);
  if constexpr (has_int8(cell_info(kind)))
    return Function(int8_forward_rank<Cell>);
  else
    return Function(nullptr);
}

extern const Int8Kernels kInt8Kernels;
const Int8Kernels kInt8Kernels = {
    FASTRNN_INT8_QUOTED(FASTRNN_ISA),
    FASTRNN_INT8_QUOTED(FASTRNN_INT8_OWNER),
    kInt8HasTiles,
    {
#define FASTRNN_CELL(kind, name, type) int8_rank<CellKind::kind, type>(),
        FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    },
    int8_sums_of,
};

FASTRNN_KERNELS_END
