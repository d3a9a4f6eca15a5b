// Forward with weights that were packed before: packing once serves many calls.
#pragma once

#include "cpu/api.h"

namespace fastrnn::cpu {

// The plan for panels that outlive a call. Calls whose sequences and threads differ from this plan
// can use them too.
FASTRNN_EXPORT Plan make_panel_plan(const LayerShape& shape, int element_bytes, int threads);

// Number of elements of the panels of a layer's direction.
FASTRNN_EXPORT std::int64_t panel_size(const LayerShape& shape, const Plan& panel_plan);

// Packs on the calling thread. panels: panel_size elements, aligned to 64 bytes.
template <class T>
FASTRNN_EXPORT void pack_panels(const LayerShape& shape, const LayerWeights<T>& weights,
                                const Plan& panel_plan, T* panels);

// One direction of a layer with its panels; its weights are not read.
template <class T>
struct PackedForward : LayerForward<T, T> {
  T* panels;
};

// Runs the directions of a layer (1 or 2), whose panels were packed for the plan.
template <class T>
FASTRNN_EXPORT void forward_packed(const PackedForward<T>* directions, int count,
                                   const Plan& panel_plan, int threads, ParallelFor parallel_for);
// Runs two layers of one direction at the same time; the y of the first is the x of the second.
// Returns false, having done nothing, if that is slower or too few threads are free.
template <class T>
FASTRNN_EXPORT bool forward_packed_pair(const PackedForward<T>* layers, const Plan* panel_plans,
                                        int threads, ParallelFor parallel_for);

}  // namespace fastrnn::cpu
