// The table of schedules as a machine runs it: the functions of each row of cuda/plan.h for tensors
// of type S. The schedules define them in their own folders; a GPU's are compiled by the .cu files
// there, with the macro below.
#pragma once

#include "cuda/plan.h"

namespace fastrnn::cuda {

// All null where the schedule has no kernels for S.
template <class S, class Machine>
struct Runner {
  std::size_t (*workspace_bytes)(const LayerShape& shape, int directions, const Plan& plan,
                                 Pass pass);
  bool (*can_launch)(const Request& request, const Plan& plan, Machine& machine);
  void (*forward)(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                  Machine& machine);
  void (*backward)(const Backward<S>* problems, int directions, const Plan& plan, void* workspace,
                   Machine& machine);
};

template <class Type, class S, class Machine>
constexpr Runner<S, Machine> make_runner() {
  if constexpr (Type::template kRuns<S>) {
    return {Type::template workspace_bytes<S>, Type::template can_launch<S, Machine>,
            Type::template forward<S, Machine>, Type::template backward<S, Machine>};
  } else {
    return {};
  }
}

// Made of the same list as kSchedules, so a schedule that plans but cannot run does not compile.
template <class S, class Machine>
inline constexpr Runner<S, Machine> kRunners[] = {
#define FASTRNN_SCHEDULE(kind, name, type) make_runner<type, S, Machine>(),
    FASTRNN_CUDA_SCHEDULES(FASTRNN_SCHEDULE)
#undef FASTRNN_SCHEDULE
};

template <class S, class Machine>
const Runner<S, Machine>& runner_of(const Plan& plan) {
  return kRunners<S, Machine>[int(plan.schedule->schedule)];
}

// The plan that this machine can run.
template <class S, class Machine>
Plan make_plan_on(const Request& request, Machine& machine) {
  return make_plan(request, [&](const Plan& plan) {
    const Runner<S, Machine>& runner = runner_of<S, Machine>(plan);
    return runner.can_launch != nullptr && runner.can_launch(request, plan, machine);
  });
}

}  // namespace fastrnn::cuda

// Compiles the functions that a Runner of a schedule points to. Schedules with many kernels have
// one .cu file per type, so that they compile in parallel.
#define FASTRNN_INSTANTIATE_SCHEDULE(type, S, Machine)                                           \
  template std::size_t type::workspace_bytes<S>(const LayerShape&, int, const Plan&, Pass);      \
  template bool type::can_launch<S, Machine>(const Request&, const Plan&, Machine&);             \
  template void type::forward<S, Machine>(const Forward<S>*, int, const Plan&, void*, Machine&); \
  template void type::backward<S, Machine>(const Backward<S>*, int, const Plan&, void*, Machine&);
