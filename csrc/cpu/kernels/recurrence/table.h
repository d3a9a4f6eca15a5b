// The kernels of time loops with options, by cell.
#pragma once

#include "cpu/kernels/recurrence/backward.h"
#include "cpu/kernels/recurrence/forward.h"
#include "cpu/kernels/recurrence/two_products.h"

FASTRNN_KERNELS_BEGIN

template <class Cell, class T>
void recurrence_rank(const Recurrence<T>& problem, const Plan& plan, const RecurrenceLayout& layout,
                     T* workspace, Team& team, int rank) {
  if constexpr (cells::kHasTwoProducts<Cell>)
    TwoProductsForward<Cell, T>(problem, plan, layout, workspace, team, rank).run();
  else
    RecurrenceForward<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

template <class Cell, class T>
void recurrence_gradients_rank(const RecurrenceGradients<T>& problem, const Plan& plan,
                               const RecurrenceBackwardLayout& layout, T* workspace, Team& team,
                               int rank) {
  if constexpr (cells::kHasTwoProducts<Cell>)
    TwoProductsBackward<Cell, T>(problem, plan, layout, workspace, team, rank).run();
  else
    RecurrenceBackward<Cell, T>(problem, plan, layout, workspace, team, rank).run();
}

// The cells of torch.nn and the RNN with the sigmoid: a dense product and no parameters per unit,
// and a cell state only in halves.
template <class Cell, class T>
constexpr RecurrenceKernels<T> recurrence_kernels() {
  if constexpr (Cell::kDenseRecurrence && Cell::kParameters == 0 &&
                (Cell::kStates == 1 || cells::HalvesOf<Cell>::kExist))
    return {recurrence_rank<Cell, T>, recurrence_gradients_rank<Cell, T>};
  else
    return {nullptr, nullptr};
}

template <class T>
constexpr RecurrenceTable<T> recurrences() {
  return {{
#define FASTRNN_CELL(kind, name, type) recurrence_kernels<type, T>(),
              FASTRNN_CELLS(FASTRNN_CELL)},
          {FASTRNN_LOOP_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
          }};
}

FASTRNN_KERNELS_END
