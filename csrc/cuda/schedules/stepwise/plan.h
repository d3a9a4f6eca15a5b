// The stepwise schedule: one cuBLAS product and one pointwise kernel per step. It fits everything.
#pragma once

#include "cuda/schedules/schedule.h"

namespace fastrnn::cuda {

// gates_x of a chunk is written by one product and read step by step. It should still be in the L2
// cache (40 MB on an A100, 50 MB on an H100) when its step reads it.
inline constexpr std::int64_t kStepwiseChunkBytes = std::int64_t(24) << 20;

struct Stepwise {
  static Plan plan(const Request& request) {
    return {nullptr, Tiling{}, rows_of_gates(request, kStepwiseChunkBytes), request.has_resets};
  }
  static bool fits(const Request&, const Plan&) { return true; }
  static bool pays(const Request&, const Plan&) { return true; }

  // Defined in stepwise.h.
  template <class S>
  static constexpr bool kRuns = true;
  template <class S>
  static std::size_t workspace_bytes(const LayerShape& shape, int directions, const Plan& plan,
                                     Pass pass);
  template <class S, class Machine>
  static bool can_launch(const Request& request, const Plan& plan, Machine& machine);
  template <class S, class Machine>
  static void forward(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                      Machine& machine);
  template <class S, class Machine>
  static void backward(const Backward<S>* problems, int directions, const Plan& plan,
                       void* workspace, Machine& machine);
};

}  // namespace fastrnn::cuda
