// One call: a plan, a workspace, a team, and the walk of the cell on the instruction set in use.
#include "memory.h"
#include "plan.h"

namespace fastrnn::cpu {
namespace {

template <class Problem, class Layout, class T>
struct Job {
  using WalkRank = void (*)(const Problem&, const Plan&, const Layout&, T*, Barrier&, int);

  const Problem& problem;
  const Plan& plan;
  T* workspace;
  Barrier& barrier;
  WalkRank walk;

  static void run(void* pointer, int rank, int size) {
    const Job& job = *static_cast<Job*>(pointer);
    const LayerShape& shape = job.problem.shape;
    const Plan plan = size == job.plan.threads ? job.plan : alone(job.plan);
    const Layout layout(shape, plan);
    job.walk(job.problem, plan, layout, job.workspace, job.barrier, rank);
  }
};

template <class T, class Layout, class Problem>
void run(const Problem& problem, Pass pass, int threads, ParallelFor parallel_for,
         void (*walk)(const Problem&, const Plan&, const Layout&, T*, Barrier&, int)) {
  const Plan plan = make_plan(problem.shape, pass, sizeof(T), threads);
  Workspace workspace(Layout(problem.shape, plan).size * sizeof(T));
  Barrier barrier(plan.threads);
  Job<Problem, Layout, T> job{problem, plan, static_cast<T*>(workspace.data()), barrier, walk};
  run_team(plan.threads, parallel_for, Job<Problem, Layout, T>::run, &job);
}

}  // namespace

Plan make_plan(const LayerShape& shape, Pass pass, int element_bytes, int threads) {
  const int bound = max_threads();
  if (bound > 0) threads = std::min(threads, bound);
  return make_plan_for(shape, pass, isa(), element_bytes, std::max(threads, 1));
}

template <class T>
void forward(const LayerForward<T, T>& problem, int threads, ParallelFor parallel_for) {
  run<T, ForwardLayout>(problem, Pass::kForward, threads, parallel_for,
                        isa().walk<T>(problem.shape.cell).forward);
}

template <class T>
void backward(const LayerBackward<T, T>& problem, int threads, ParallelFor parallel_for) {
  run<T, BackwardLayout>(problem, Pass::kBackward, threads, parallel_for,
                         isa().walk<T>(problem.shape.cell).backward);
}

template <class T>
void gradients(const LayerGradients<T>& problem, int threads, ParallelFor parallel_for) {
  run<T, GradientLayout>(problem, Pass::kGradients, threads, parallel_for,
                         isa().walk<T>(problem.shape.cell).gradients);
}

template void forward<float>(const LayerForward<float, float>&, int, ParallelFor);
template void forward<double>(const LayerForward<double, double>&, int, ParallelFor);
template void backward<float>(const LayerBackward<float, float>&, int, ParallelFor);
template void backward<double>(const LayerBackward<double, double>&, int, ParallelFor);
template void gradients<float>(const LayerGradients<float>&, int, ParallelFor);
template void gradients<double>(const LayerGradients<double>&, int, ParallelFor);

}  // namespace fastrnn::cpu
