// One call: makes a plan, reserves threads, acquires a workspace and runs the time loop of the
// instruction set in use on a team of threads.
#include <stdexcept>

#include "cpu/bfloat16.h"
#include "cpu/int8.h"
#include "cpu/isa/bfloat16.h"
#include "cpu/isa/int8.h"
#include "cpu/panels.h"
#include "cpu/plan.h"
#include "cpu/recurrence.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/thread_budget.h"

namespace fastrnn::cpu {
namespace {

ContentionBackoff contention;

// The passes: the size of a workspace, and what a rank does with it.
template <class T>
struct ForwardPass {
  using Value = T;
  using Problem = LayerForward<T, T>;
  static constexpr Pass kPass = Pass::kForward;

  const Isa& isa;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    const PanelLayout panels(shape, plan);
    return panels.size + ForwardLayout(shape, plan, panels).size;
  }

  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    const PanelLayout panel_layout(problem.shape, plan);
    const ForwardLayout layout(problem.shape, plan, panel_layout);
    isa.walks<T>().pack(problem.shape, problem.weights, plan, panel_layout, workspace, rank);
    walk_of<T>(isa, problem.shape.cell)
        .forward(problem, plan, panel_layout, workspace, layout, workspace + panel_layout.size,
                 team, rank);
  }
};

// Forward with panels that were packed before.
template <class T>
struct PackedPass {
  using Value = T;
  using Problem = PackedForward<T>;
  static constexpr Pass kPass = Pass::kForward;

  const Isa& isa;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return ForwardLayout(shape, plan, PanelLayout(shape, plan)).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    const PanelLayout panel_layout(problem.shape, plan);
    const ForwardLayout layout(problem.shape, plan, panel_layout);
    walk_of<T>(isa, problem.shape.cell)
        .forward(problem, plan, panel_layout, problem.panels, layout, workspace, team, rank);
  }
};

template <class T>
struct BackwardPass {
  using Value = T;
  using Problem = LayerBackward<T, T>;
  static constexpr Pass kPass = Pass::kBackward;

  const Isa& isa;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return BackwardLayout(shape, plan).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    walk_of<T>(isa, problem.shape.cell)
        .backward(problem, plan, BackwardLayout(problem.shape, plan), workspace, team, rank);
  }
};

template <class T>
struct GradientPass {
  using Value = T;
  using Problem = LayerGradients<T>;
  static constexpr Pass kPass = Pass::kGradients;

  const Isa& isa;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return GradientLayout(shape, plan).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    walk_of<T>(isa, problem.shape.cell)
        .gradients(problem, plan, GradientLayout(problem.shape, plan), workspace, team, rank);
  }
};

struct Bfloat16Pass {
  using Value = float;
  using Problem = Bfloat16Forward;
  static constexpr Pass kPass = Pass::kForward;

  const Bfloat16Kernels& kernels;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    const PanelLayout panels(shape, plan);
    return panels.size + ForwardLayout(shape, plan, panels).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, float* workspace, Team& team,
                int rank) const {
    const PanelLayout panel_layout(problem.shape, plan);
    const ForwardLayout layout(problem.shape, plan, panel_layout);
    kernels.pack(problem.shape, problem.weights, plan, panel_layout, workspace, rank);
    kernels.forward[int(CellKind(problem.shape.cell))](
        problem, plan, panel_layout, workspace, layout, workspace + panel_layout.size, team, rank);
  }
};

struct Bfloat16BackwardPass {
  using Value = float;
  using Problem = Bfloat16Backward;
  static constexpr Pass kPass = Pass::kBackward;

  const Bfloat16Kernels& kernels;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return BackwardLayout(shape, plan).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, float* workspace, Team& team,
                int rank) const {
    kernels.backward[int(CellKind(problem.shape.cell))](
        problem, plan, BackwardLayout(problem.shape, plan), workspace, team, rank);
  }
};

struct Bfloat16GradientPass {
  using Value = float;
  using Problem = Bfloat16Gradients;
  static constexpr Pass kPass = Pass::kGradients;

  const Bfloat16Kernels& kernels;

  std::int64_t workspace_size(const LayerShape&, const Plan& plan) const {
    return plan.threads * Bfloat16GradientLayout::kRankSize;
  }
  void run_rank(const Problem& problem, const Plan& plan, float* workspace, Team& team,
                int rank) const {
    kernels.gradients[int(CellKind(problem.shape.cell))](problem, plan, workspace, team, rank);
  }
};

template <class T>
struct RecurrencePass {
  using Value = T;
  using Problem = Recurrence<T>;
  static constexpr Pass kPass = Pass::kForward;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return RecurrenceLayout(shape, plan).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    isa()
        .recurrences<T>()
        .of_cell(problem.shape.cell.info())
        .forward(problem, plan, RecurrenceLayout(problem.shape, plan), workspace, team, rank);
  }
};

template <class T>
struct RecurrenceBackwardPass {
  using Value = T;
  using Problem = RecurrenceGradients<T>;
  static constexpr Pass kPass = Pass::kBackward;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return RecurrenceBackwardLayout(shape, plan).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, T* workspace, Team& team,
                int rank) const {
    isa()
        .recurrences<T>()
        .of_cell(problem.shape.cell.info())
        .backward(problem, plan, RecurrenceBackwardLayout(problem.shape, plan), workspace, team,
                  rank);
  }
};

struct Int8Pass {
  using Value = char;
  using Problem = Int8Forward;
  static constexpr Pass kPass = Pass::kForward;

  const Int8Kernels& kernels;

  std::int64_t workspace_size(const LayerShape& shape, const Plan& plan) const {
    return Int8Layout(shape, plan, kernels.tiles).size;
  }
  void run_rank(const Problem& problem, const Plan& plan, char* workspace, Team& team,
                int rank) const {
    kernels.forward[int(CellKind(problem.shape.cell))](
        problem, plan, Int8Layout(problem.shape, plan, kernels.tiles), workspace, team, rank);
  }
};

// One problem, or two that run at the same time: directions of a layer or layers of a stack. Each
// problem has a plan (all of as many threads), a team and a part of the workspace: rank r of the
// call is rank r % threads of problem r / threads.
template <class PassOf>
class Job {
  using T = typename PassOf::Value;
  using Problem = typename PassOf::Problem;

 public:
  Job(const PassOf& pass, const Problem* problems, int count, const Plan* plans)
      : pass_(pass),
        problems_(problems),
        count_(count),
        plans_(plans),
        second_offset_(pass.workspace_size(problems[0].shape, plans[0])),
        size_(second_offset_ + (count > 1 ? pass.workspace_size(problems[1].shape, plans[1]) : 0)),
        workspace_(size_ * sizeof(T) + Barrier::kBytes + count * plans[0].threads * Team::kBytes),
        teams_{Team(plans[0].threads, team_memory(0), interruption_, true),
               Team(count > 1 ? plans[1].threads : 0, team_memory(1), interruption_, false)} {}

  // The second problem reads the output of the first, while both run.
  void stack() { teams_[1].below = &teams_[0]; }

  void run(ParallelFor parallel_for) {
    const Plan& plan = plans_[0];
    // Whether ranks wait for each other. Then one thread may do the work of all: the results have
    // the same bits.
    const bool may_wait =
        plan.row_groups == 1 && (plan.unit_groups > 1 || teams_[1].below != nullptr);
    const auto begin = ContentionBackoff::Clock::now();
    const bool backs_off = may_wait && contention.is_backing_off(begin);
    run_team(backs_off ? 1 : count_ * plan.threads, parallel_for, run_rank, this);
    if (interruption_.requested()) throw std::runtime_error(kInterrupted);
    if (!may_wait || backs_off) return;
    std::chrono::nanoseconds slept(0);
    for (int which = 0; which < count_; ++which)
      slept = std::max(slept, teams_[which].barrier.longest_sleep(plan.threads));
    contention.record(begin, ContentionBackoff::Clock::now(), slept);
  }

 private:
  static void run_rank(void* pointer, int rank, int size) {
    Job& job = *static_cast<Job*>(pointer);
    const int threads = job.plans_[0].threads;
    if (size == job.count_ * threads) {
      job.walk(rank / threads, job.plans_[rank / threads], rank % threads);
    } else {
      for (int which = 0; which < job.count_; ++which) {
        job.teams_[which].below = nullptr;  // has finished before
        job.teams_[which].asks = true;
        job.walk(which, single_threaded(job.plans_[which]), 0);
      }
    }
  }

  void walk(int which, const Plan& plan, int rank) {
    T* workspace = static_cast<T*>(workspace_.data()) + which * second_offset_;
    pass_.run_rank(problems_[which], plan, workspace, teams_[which], rank);
  }

  // Memory of a team, after both parts of the workspace.
  void* team_memory(int which) const {
    const auto end = reinterpret_cast<std::uintptr_t>(workspace_.data()) + size_ * sizeof(T);
    const std::uintptr_t first = (end + Barrier::kBytes - 1) / Barrier::kBytes * Barrier::kBytes;
    return reinterpret_cast<void*>(first + which * plans_[0].threads * Team::kBytes);
  }

  const PassOf pass_;
  const Problem* const problems_;
  const int count_;
  const Plan* const plans_;
  const std::int64_t second_offset_;  // start of the second part of the workspace, in elements
  const std::int64_t size_;           // of both parts
  Workspace workspace_;
  Interruption interruption_;
  Team teams_[kMaxDirections];
};

// Reserves `wanted` threads, or as many as other calls have left of the `threads` threads of the
// pool and the usable CPUs.
ThreadReservation reserve_threads(int wanted, int threads) {
  return ThreadReservation(wanted, wanted == 1 ? 1 : std::min(threads, usable_cpus()));
}

int bounded_threads(int threads) {
  const int bound = max_threads();
  return std::max(bound > 0 ? std::min(threads, bound) : threads, 1);
}

// plan_for(threads): the plan for up to so many threads of a layer of this shape.
template <class PassOf, class PlanFor>
void run(const PassOf& pass, const typename PassOf::Problem* problems, int count,
         const LayerShape& shape, int threads, ParallelFor parallel_for, const PlanFor& plan_for) {
  if (is_forked() && call_work(shape, PassOf::kPass) < kMinForkedWork) threads = 1;
  Plan plan = plan_for(threads);
  const int wanted = plan.threads * plan.together;
  const ThreadReservation reservation = reserve_threads(wanted, threads);
  if (reservation.threads() < wanted) plan = plan_for(reservation.threads());
  const Plan plans[kMaxDirections] = {plan, plan};
  for (int done = 0; done < count; done += plan.together)
    Job<PassOf>(pass, problems + done, plan.together, plans).run(parallel_for);
}

// The same for the part of a layer. plan_for(threads): the plan of the whole layer.
template <class PassOf, class PlanFor>
void run_part(const PassOf& pass, const typename PassOf::Problem* problems, int count,
              const WholeLayer& whole, int threads, ParallelFor parallel_for,
              const PlanFor& plan_for) {
  run(pass, problems, count, whole.shape, threads, parallel_for, [&](int granted) {
    const Plan plan = plan_for(granted);
    return whole.directions == count
               ? plan
               : make_direction_plan(whole.shape, PassOf::kPass, plan, bounded_threads(granted));
  });
}

// The same with the plan for a type of the kernels. whole: null if the problems are all.
template <class PassOf>
void run(const PassOf& pass, const typename PassOf::Problem* problems, int count,
         WeightFormat allowed_format, int threads, ParallelFor parallel_for,
         const WholeLayer* whole = nullptr) {
  const WholeLayer own = {problems[0].shape, count};
  const WholeLayer& all = whole != nullptr ? *whole : own;
  run_part(pass, problems, count, all, threads, parallel_for, [&](int granted) {
    return make_plan(all.shape, PassOf::kPass, sizeof(typename PassOf::Value), granted,
                     all.directions, allowed_format);
  });
}

// Whether two layers with these plans run at the same time; if so, changes the plans to do so.
bool stack_plans(const LayerShape& upper, int element_bytes, Plan* plans) {
  if (!pick_stacked(upper, element_bytes, plans[0], plans[1])) return false;
  plans[0].chunk_rows = pick_follow_rows(upper, plans[0]);
  plans[1].chunk_rows = pick_follow_rows(upper, plans[1]);
  return true;
}

// Runs two layers of a stack at the same time with their plans. Returns false, having done nothing,
// if too few threads are free.
template <class PassOf>
bool run_pair(const PassOf& pass, const typename PassOf::Problem* layers, const Plan* plans,
              int threads, ParallelFor parallel_for) {
  const int wanted = 2 * plans[0].threads;
  const ThreadReservation reservation = reserve_threads(wanted, threads);
  if (reservation.threads() < wanted) return false;
  Job<PassOf> job(pass, layers, 2, plans);
  job.stack();
  job.run(parallel_for);
  return true;
}

std::string to_string(const Bfloat16Choice& choice) {
  const std::string name = choice.kernels == nullptr ? "float32 copies" : choice.kernels->name;
  return name + ": " + choice.reason;
}

}  // namespace

Plan make_plan(const LayerShape& shape, Pass pass, int element_bytes, int threads, int directions,
               WeightFormat allowed_format) {
  return make_plan_for(shape, pass, isa(), element_bytes, bounded_threads(threads), directions,
                       allowed_format);
}

bool make_stacked_plans(const LayerShape& lower, const LayerShape& upper, int element_bytes,
                        int threads, Plan* plans) {
  plans[0] = make_plan(lower, Pass::kForward, element_bytes, threads, 2);
  plans[1] = make_plan(upper, Pass::kForward, element_bytes, threads, 2);
  return stack_plans(upper, element_bytes, plans);
}

template <class T>
void forward(const LayerForward<T, T>* directions, int count, int threads, ParallelFor parallel_for,
             const WholeLayer* whole) {
  run(ForwardPass<T>{isa()}, directions, count, directions[0].recurrent_format, threads,
      parallel_for, whole);
}

template <class T>
void forward_stack(const LayerForward<T, T>* layers, int count, int threads,
                   ParallelFor parallel_for) {
  for (int done = 0; done < count;) {
    Plan plans[2];
    const bool pair =
        !is_forked() && done + 1 < count &&
        make_stacked_plans(layers[done].shape, layers[done + 1].shape, sizeof(T), threads, plans) &&
        run_pair(ForwardPass<T>{isa()}, layers + done, plans, threads, parallel_for);
    if (!pair) forward(layers + done, 1, threads, parallel_for);
    done += pair ? 2 : 1;
  }
}

template <class T>
void backward(const LayerBackward<T, T>* directions, int count, int threads,
              ParallelFor parallel_for, const WholeLayer* whole) {
  run(BackwardPass<T>{isa()}, directions, count, WeightFormat::kNative, threads, parallel_for,
      whole);
}

template <class T>
void gradients(const LayerGradients<T>* directions, int count, int threads,
               ParallelFor parallel_for) {
  run(GradientPass<T>{isa()}, directions, count, WeightFormat::kNative, threads, parallel_for);
}

bool computes_bfloat16(const LayerShape& shape) {
  return pick_bfloat16_kernels(shape).kernels != nullptr;
}

bool computes_bfloat16_backward(const LayerShape& shape) {
  return pick_bfloat16_backward(shape).kernels != nullptr;
}
bool computes_bfloat16_gradients(const LayerShape& shape) {
  return pick_bfloat16_gradients(shape).kernels != nullptr;
}

std::string bfloat16_reason(const LayerShape& shape) {
  return to_string(pick_bfloat16_kernels(shape));
}
std::string bfloat16_gradients_reason(const LayerShape& shape) {
  return to_string(pick_bfloat16_gradients(shape));
}

Plan make_bfloat16_plan(const LayerShape& shape, Pass pass, int threads, int directions) {
  const bool is_forward = pass == Pass::kForward;
  const Bfloat16Kernels* kernels =
      (is_forward ? pick_bfloat16_kernels(shape) : pick_bfloat16_backward(shape)).kernels;
  if (kernels == nullptr) return make_plan(shape, pass, sizeof(float), threads, directions);
  const auto make = is_forward ? make_bfloat16_plan_for : make_bfloat16_backward_plan_for;
  return make(shape, isa(), kernels->format, bounded_threads(threads), directions);
}

void bfloat16_forward(const Bfloat16Forward* directions, int count, int threads,
                      ParallelFor parallel_for, const WholeLayer* whole) {
  const WholeLayer own = {directions[0].shape, count};
  const WholeLayer& all = whole != nullptr ? *whole : own;
  const Bfloat16Kernels* kernels = pick_bfloat16_kernels(all.shape).kernels;
  if (kernels == nullptr) throw std::runtime_error("fastrnn: there are no kernels for bfloat16.");
  run_part(Bfloat16Pass{*kernels}, directions, count, all, threads, parallel_for, [&](int granted) {
    return make_bfloat16_plan_for(all.shape, isa(), kernels->format, bounded_threads(granted),
                                  all.directions);
  });
}

void bfloat16_backward(const Bfloat16Backward* directions, int count, int threads,
                       ParallelFor parallel_for) {
  const LayerShape& shape = directions[0].shape;
  const Bfloat16Kernels* kernels = pick_bfloat16_backward(shape).kernels;
  if (kernels == nullptr) throw std::runtime_error("fastrnn: there are no kernels for bfloat16.");
  run(Bfloat16BackwardPass{*kernels}, directions, count, shape, threads, parallel_for,
      [&](int granted) {
        return make_bfloat16_backward_plan_for(shape, isa(), kernels->format,
                                               bounded_threads(granted), count);
      });
}

void bfloat16_gradients(const Bfloat16Gradients* directions, int count, int threads,
                        ParallelFor parallel_for) {
  const LayerShape& shape = directions[0].shape;
  const Bfloat16Kernels* kernels = pick_bfloat16_gradients(shape).kernels;
  if (kernels == nullptr) throw std::runtime_error("fastrnn: there are no kernels for bfloat16.");
  run(Bfloat16GradientPass{*kernels}, directions, count, shape, threads, parallel_for,
      [&](int granted) {
        return make_plan(shape, Pass::kGradients, sizeof(float), granted, count);
      });
}

void int8_forward(const Int8Forward* directions, int count, int threads, ParallelFor parallel_for) {
  const LayerShape& shape = directions[0].shape;
  run(Int8Pass{*pick_int8_kernels(shape).kernels}, directions, count, shape, threads, parallel_for,
      [&](int granted) { return make_int8_plan(shape, granted, count); });
}

Plan make_int8_plan(const LayerShape& shape, int threads, int directions) {
  return make_int8_plan_for(shape, isa(), bounded_threads(threads), directions);
}

std::string int8_reason(const LayerShape& shape) {
  const Int8Choice choice = pick_int8_kernels(shape);
  return std::string(choice.kernels->name) + ": " + choice.reason;
}

const CellInfo* find_recurrence_cell(const std::string& name) {
  for (const LoopCell& cell : kLoopCells)
    if (name == cell.info.name) return &cell.info;
  for (const CellInfo& info : kCells)
    if (name == info.name)
      return isa().recurrences_float.of_cell(info).forward != nullptr ? &info : nullptr;
  return nullptr;
}

template <class T>
void recurrence(const Recurrence<T>& problem, int threads, ParallelFor parallel_for) {
  run(RecurrencePass<T>{}, &problem, 1, WeightFormat::kNative, threads, parallel_for);
}

template <class T>
void recurrence_gradients(const RecurrenceGradients<T>& problem, int threads,
                          ParallelFor parallel_for) {
  run(RecurrenceBackwardPass<T>{}, &problem, 1, WeightFormat::kNative, threads, parallel_for);
}

Plan make_panel_plan(const LayerShape& shape, int element_bytes, int threads) {
  return make_panel_plan_for(shape, isa(), element_bytes, bounded_threads(threads));
}

std::int64_t panel_size(const LayerShape& shape, const Plan& panel_plan) {
  return PanelLayout(shape, panel_plan).size;
}

template <class T>
void pack_panels(const LayerShape& shape, const LayerWeights<T>& weights, const Plan& panel_plan,
                 T* panels) {
  isa_named(panel_plan.isa)
      .walks<T>()
      .pack(shape, weights, single_threaded(panel_plan), PanelLayout(shape, panel_plan), panels, 0);
}

template <class T>
void forward_packed(const PackedForward<T>* directions, int count, const Plan& panel_plan,
                    int threads, ParallelFor parallel_for) {
  const Isa& isa = isa_named(panel_plan.isa);
  const LayerShape& shape = directions[0].shape;
  const PackedPass<T> pass{isa};
  run(pass, directions, count, shape, threads, parallel_for, [&](int granted) {
    return make_packed_plan(shape, isa, panel_plan, bounded_threads(granted), count);
  });
}

template <class T>
bool forward_packed_pair(const PackedForward<T>* layers, const Plan* panel_plans, int threads,
                         ParallelFor parallel_for) {
  if (is_forked()) return false;
  const Isa& isa = isa_named(panel_plans[0].isa);
  Plan plans[2];
  for (int layer = 0; layer < 2; ++layer)
    plans[layer] =
        make_packed_plan(layers[layer].shape, isa, panel_plans[layer], bounded_threads(threads), 2);
  return stack_plans(layers[1].shape, sizeof(T), plans) &&
         run_pair(PackedPass<T>{isa}, layers, plans, threads, parallel_for);
}

void forget_contention() { contention.forget(); }

template void forward(const LayerForward<float, float>*, int, int, ParallelFor, const WholeLayer*);
template void forward(const LayerForward<double, double>*, int, int, ParallelFor,
                      const WholeLayer*);
template void forward_stack<float>(const LayerForward<float, float>*, int, int, ParallelFor);
template void forward_stack<double>(const LayerForward<double, double>*, int, int, ParallelFor);
template void backward(const LayerBackward<float, float>*, int, int, ParallelFor,
                       const WholeLayer*);
template void backward(const LayerBackward<double, double>*, int, int, ParallelFor,
                       const WholeLayer*);
template void gradients<float>(const LayerGradients<float>*, int, int, ParallelFor);
template void gradients<double>(const LayerGradients<double>*, int, int, ParallelFor);
template void recurrence(const Recurrence<float>&, int, ParallelFor);
template void recurrence(const Recurrence<double>&, int, ParallelFor);
template void recurrence_gradients(const RecurrenceGradients<float>&, int, ParallelFor);
template void recurrence_gradients(const RecurrenceGradients<double>&, int, ParallelFor);
template void pack_panels(const LayerShape&, const LayerWeights<float>&, const Plan&, float*);
template void pack_panels(const LayerShape&, const LayerWeights<double>&, const Plan&, double*);
template void forward_packed(const PackedForward<float>*, int, const Plan&, int, ParallelFor);
template void forward_packed(const PackedForward<double>*, int, const Plan&, int, ParallelFor);
template bool forward_packed_pair(const PackedForward<float>*, const Plan*, int, ParallelFor);
template bool forward_packed_pair(const PackedForward<double>*, const Plan*, int, ParallelFor);

}  // namespace fastrnn::cpu
