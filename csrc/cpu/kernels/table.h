// The kernels of one instruction set, instantiated for every cell and type: a row of the dispatch
// table.
#pragma once

#include "cpu/kernels/int8/table.h"
#include "cpu/kernels/peak.h"
#include "cpu/kernels/recurrence/table.h"
#include "cpu/kernels/scan/scan.h"
#include "cpu/kernels/walk.h"

FASTRNN_KERNELS_BEGIN

template <class T>
constexpr Walks<T> walks() {
  return {pack_rank<T>,
          RecurrentFormats<T>::List::kSet,
          {
#define FASTRNN_CELL(kind, name, type) walk<type, T, FormatsOf<type, T>>(),
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
