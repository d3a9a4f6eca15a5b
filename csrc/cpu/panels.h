// Forward with weights that were packed before: packing once serves all calls with one plan. If the
// plan leaves weights unpacked, each call still reads them.
#pragma once

#include "cpu/api.h"

namespace fastrnn::cpu {

// Number of elements of the panels of a layer's direction.
FASTRNN_EXPORT std::int64_t panel_size(const LayerShape& shape, const Plan& plan);

// Packs on the calling thread. panels: panel_size elements, aligned to 64 bytes.
template <class T>
FASTRNN_EXPORT void pack_panels(const LayerShape& shape, const LayerWeights<T>& weights,
                                const Plan& plan, T* panels);

// Runs one direction of a layer with the threads of the plan. panels: packed for this plan under
// the instruction set in use, or null: the call packs its own.
template <class T>
FASTRNN_EXPORT void forward_packed(const LayerForward<T, T>& problem, const Plan& plan, T* panels,
                                   ParallelFor parallel_for);

}  // namespace fastrnn::cpu
