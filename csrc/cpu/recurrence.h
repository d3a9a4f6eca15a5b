// Time loops with layer normalisation, zoneout and recurrent dropout as the layers above see them.
#pragma once

#include "cpu/api.h"
#include "problem/recurrence.h"

namespace fastrnn::cpu {

// Whether there are kernels for a cell.
FASTRNN_EXPORT bool has_recurrence(const CellInfo& cell);

// Run one direction. T: float or double. The rounding of d_vectors depends on the number of
// threads; no other result does.
template <class T>
FASTRNN_EXPORT void recurrence(const Recurrence<T>& problem, int threads, ParallelFor parallel_for);
template <class T>
FASTRNN_EXPORT void recurrence_gradients(const RecurrenceGradients<T>& problem, int threads,
                                         ParallelFor parallel_for);

}  // namespace fastrnn::cpu
