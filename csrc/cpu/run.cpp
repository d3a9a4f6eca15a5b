// One call: a plan, a workspace, a team, and the walk of the cell on the instruction set in use.
#include "memory.h"
#include "plan.h"
#include "threads.h"

namespace fastrnn::cpu {
namespace {

template <class T, class Layout, class Problem>
using WalkRank = void (*)(const Problem&, const Plan&, const Layout&, T*, Team&, int);

// Directions that walk at the same time, each with a team and a workspace of its own:
// rank r of the call is rank r % plan.threads of direction r / plan.threads.
template <class T, class Layout, class Problem>
class Job {
 public:
  Job(const Problem* problems, int count, const Plan& plan, WalkRank<T, Layout, Problem> walk)
      : problems_(problems),
        count_(count),
        plan_(plan),
        walk_(walk),
        size_(Layout(problems[0].shape, plan).size),
        workspace_(count * size_ * sizeof(T)),
        teams_{Team(plan.threads), Team(count > 1 ? plan.threads : 0)} {}

  void run(ParallelFor parallel_for) {
    run_team(count_ * plan_.threads, parallel_for, run_rank, this);
  }

 private:
  static void run_rank(void* pointer, int rank, int size) {
    Job& job = *static_cast<Job*>(pointer);
    if (size == job.count_ * job.plan_.threads) {
      job.walk(rank / job.plan_.threads, job.plan_, rank % job.plan_.threads);
    } else {
      for (int direction = 0; direction < job.count_; ++direction)
        job.walk(direction, alone(job.plan_), 0);
    }
  }

  void walk(int direction, const Plan& plan, int rank) {
    const Problem& problem = problems_[direction];
    const Layout layout(problem.shape, plan);
    T* workspace = static_cast<T*>(workspace_.data()) + direction * size_;
    walk_(problem, plan, layout, workspace, teams_[direction], rank);
  }

  const Problem* const problems_;
  const int count_;
  const Plan plan_;
  const WalkRank<T, Layout, Problem> walk_;
  const std::int64_t size_;  // elements of one direction's workspace
  Workspace workspace_;
  Team teams_[kMostDirections];
};

template <class T>
bool half_weights(const LayerForward<T, T>& problem) {
  return problem.half_weights;
}
template <class Problem>
bool half_weights(const Problem&) {
  return false;
}

template <class T, class Layout, class Problem>
void run(const Problem* problems, int count, Pass pass, int threads, ParallelFor parallel_for,
         WalkRank<T, Layout, Problem> walk) {
  const LayerShape& shape = problems[0].shape;
  if (is_forked() && call_work(shape, pass) < kMinForkedWork) threads = 1;
  const bool half = half_weights(problems[0]);
  Plan plan = make_plan(shape, pass, sizeof(T), threads, count, half);
  const int wanted = plan.threads * plan.together;
  const Claim claim(wanted, wanted == 1 ? 1 : std::min(threads, usable_cpus()));
  if (claim.threads() < wanted)
    plan = make_plan(shape, pass, sizeof(T), claim.threads(), count, half);
  for (int done = 0; done < count; done += plan.together)
    Job<T, Layout, Problem>(problems + done, plan.together, plan, walk).run(parallel_for);
}

}  // namespace

Plan make_plan(const LayerShape& shape, Pass pass, int element_bytes, int threads, int directions,
               bool half_weights) {
  const int bound = max_threads();
  if (bound > 0) threads = std::min(threads, bound);
  return make_plan_for(shape, pass, isa(), element_bytes, std::max(threads, 1), directions,
                       half_weights);
}

template <class T>
void forward(const LayerForward<T, T>* directions, int count, int threads,
             ParallelFor parallel_for) {
  run<T, ForwardLayout>(directions, count, Pass::kForward, threads, parallel_for,
                        isa().walk<T>(directions[0].shape.cell).forward);
}

template <class T>
void backward(const LayerBackward<T, T>* directions, int count, int threads,
              ParallelFor parallel_for) {
  run<T, BackwardLayout>(directions, count, Pass::kBackward, threads, parallel_for,
                         isa().walk<T>(directions[0].shape.cell).backward);
}

template <class T>
void gradients(const LayerGradients<T>* directions, int count, int threads,
               ParallelFor parallel_for) {
  run<T, GradientLayout>(directions, count, Pass::kGradients, threads, parallel_for,
                         isa().walk<T>(directions[0].shape.cell).gradients);
}

template void forward<float>(const LayerForward<float, float>*, int, int, ParallelFor);
template void forward<double>(const LayerForward<double, double>*, int, int, ParallelFor);
template void backward<float>(const LayerBackward<float, float>*, int, int, ParallelFor);
template void backward<double>(const LayerBackward<double, double>*, int, int, ParallelFor);
template void gradients<float>(const LayerGradients<float>*, int, int, ParallelFor);
template void gradients<double>(const LayerGradients<double>*, int, int, ParallelFor);

}  // namespace fastrnn::cpu
