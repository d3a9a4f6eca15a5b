// Time loops with options (problem/recurrence.h) as the layers above see them.
#pragma once

#include "cpu/api.h"
#include "problem/recurrence.h"

namespace fastrnn::cpu {

// The cell of this name that has kernels, of cells/registry.h or cells/loop_cells.h, or null.
FASTRNN_EXPORT const CellInfo* find_recurrence_cell(const std::string& name);

// Run one direction. T: float or double. The rounding of d_vectors depends on the number of
// threads; no other result does.
template <class T>
FASTRNN_EXPORT void recurrence(const Recurrence<T>& problem, int threads, ParallelFor parallel_for);
template <class T>
FASTRNN_EXPORT void recurrence_gradients(const RecurrenceGradients<T>& problem, int threads,
                                         ParallelFor parallel_for);

}  // namespace fastrnn::cpu
