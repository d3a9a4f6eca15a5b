// The table of CUDA schedules, and which of them runs a layer. Plain C++: plans can be made where
// there is no CUDA.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/schedules/persistent/plan.h"
#include "cuda/schedules/schedule.h"
#include "cuda/schedules/stepwise/plan.h"

// The table, best first: the first row that fits and pays runs the layer. The last row fits and
// pays for every layer.
//           enumerator   name          type
#define FASTRNN_CUDA_SCHEDULES(SCHEDULE)          \
  SCHEDULE(kPersistent, "persistent", Persistent) \
  SCHEDULE(kStepwise, "stepwise", Stepwise)

namespace fastrnn::cuda {

enum class Schedule : int {
#define FASTRNN_SCHEDULE(kind, name, type) kind,
  FASTRNN_CUDA_SCHEDULES(FASTRNN_SCHEDULE)
#undef FASTRNN_SCHEDULE
};

// The planning functions of a row (schedules/schedule.h).
struct ScheduleInfo {
  Schedule schedule;
  const char* name;
  Plan (*plan)(const Request& request);
  bool (*fits)(const Request& request, const Plan& plan);
  bool (*pays)(const Request& request, const Plan& plan);
};
inline constexpr ScheduleInfo kSchedules[] = {
#define FASTRNN_SCHEDULE(kind, name, type) \
  {Schedule::kind, name, type::plan, type::fits, type::pays},
    FASTRNN_CUDA_SCHEDULES(FASTRNN_SCHEDULE)
#undef FASTRNN_SCHEDULE
};

// The choice of this name (of FASTRNN_SCHEDULE); null, "" and "auto" choose no schedule.
inline Choice choice_named(const char* name) {
  const std::string given = name == nullptr ? "" : name;
  if (given.empty() || given == "auto") return std::nullopt;
  std::string names = "auto";
  for (const ScheduleInfo& row : kSchedules) {
    if (given == row.name) return row.schedule;
    names += (&row == std::end(kSchedules) - 1 ? " or " : ", ") + std::string(row.name);
  }
  throw std::runtime_error("fastrnn: FASTRNN_SCHEDULE must be " + names + ", got '" + given + "'.");
}

// The plan of the first row that fits, pays and satisfies `can_launch(plan)`. A requested schedule
// need not pay; rows above it are skipped.
template <class CanLaunch>
Plan make_plan(const Request& request, const CanLaunch& can_launch) {
  for (const ScheduleInfo* row = kSchedules + int(request.choice.value_or(Schedule{}));; ++row) {
    if (row == std::end(kSchedules)) throw std::logic_error("fastrnn: no schedule fits.");
    Plan plan = row->plan(request);
    plan.schedule = row;
    if (row->fits(request, plan) && (request.choice == row->schedule || row->pays(request, plan)) &&
        can_launch(plan))
      return plan;
  }
}
inline Plan make_plan(const Request& request) {
  return make_plan(request, [](const Plan&) { return true; });
}

}  // namespace fastrnn::cuda
