#include "cpu/serial_stack.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "cpu/plan.h"

namespace fastrnn::cpu {
namespace {

template <class T>
bool overlap(const T* a, std::int64_t a_size, const T* b, std::int64_t b_size) {
  const std::less<const T*> before;
  return before(a, b + b_size) && before(b, a + a_size);
}

// As many steps as are projected ahead at once.
std::int64_t steps_at_once(LayerShape shape, std::int64_t batch) {
  shape.sequence.batch = batch;
  return std::max<std::int64_t>(pick_chunk_rows(shape) / batch, 1);
}

}  // namespace

template <class T>
SerialStack<T>::SerialStack(const PackedStack<T>& stack, std::int64_t batch)
    : stack_(stack),
      batch_(batch),
      part_steps_(steps_at_once(stack.layer_shape(0), batch)),
      step_rows_(2 * part_steps_, batch),
      one_step_(prepare(1)),
      part_(prepare(part_steps_)) {
  for (std::int64_t t = 0; t < part_steps_; ++t) step_rows_[t] = t * batch;
  const StackShape& shape = stack.shape();
  std::int64_t scratch = 0;
  for (const auto* layers : {&one_step_, &part_})
    for (const Prepared& layer : *layers) scratch = std::max(scratch, layer.layout.size);
  const std::int64_t between = part_steps_ * batch * shape.output_size();
  WorkspaceBuilder builder;
  between_at_[0] = builder.add(shape.layers > 1 ? between : 0);
  between_at_[1] = builder.add(shape.layers > 2 ? between : 0);
  input_at_ = builder.add(batch * shape.input_size);
  scratch_at_ = builder.add(scratch);
  memory_ = std::make_unique<Workspace>(std::size_t(builder.size()) * sizeof(T));
  std::fill_n(static_cast<T*>(memory_->data()), builder.size(), T(0));  // no page faults later
}

template <class T>
auto SerialStack<T>::prepare(std::int64_t steps) const -> std::vector<Prepared> {
  std::vector<Prepared> layers;
  for (int layer = 0; layer < stack_.shape().layers; ++layer) {
    LayerShape shape = stack_.layer_shape(layer);
    shape.sequence = {steps, batch_, false, step_rows_.data(), step_rows_.data() + part_steps_};
    const Isa& isa = isa_named(stack_.panel_plan(layer).isa);
    const Plan plan = make_packed_plan(shape, isa, stack_.panel_plan(layer), 1, 1);
    const PanelLayout panel_layout(shape, plan);
    layers.push_back({shape, plan, panel_layout, ForwardLayout(shape, plan, panel_layout),
                      walk_of<T>(isa, shape.cell).forward, stack_.panels(layer, 0)});
  }
  return layers;
}

template <class T>
void SerialStack<T>::run(const T* x, std::int64_t steps, T* y, T* h, T* c, bool asks) {
  const StackShape& shape = stack_.shape();
  const std::int64_t x_size = batch_ * shape.input_size, y_size = batch_ * shape.output_size();
  Interruption interruption;
  if (steps == 1) {
    // Several layers have read x before the last one writes y.
    if (shape.layers == 1 && overlap(x, x_size, y, y_size))
      x = std::copy_n(x, x_size, static_cast<T*>(memory_->data()) + input_at_) - x_size;
    return run_part(one_step_, x, 1, y, h, c, interruption, asks);
  }
  for (std::int64_t done = 0; done < steps; done += part_steps_) {
    const std::int64_t count = std::min(part_steps_, steps - done);
    run_part(part_, x + done * x_size, count, y + done * y_size, h, c, interruption, asks);
    if (interruption.requested()) throw std::runtime_error(kInterrupted);
  }
}

template <class T>
void SerialStack<T>::run_part(const std::vector<Prepared>& layers, const T* x, std::int64_t steps,
                              T* y, T* h, T* c, Interruption& interruption, bool asks) {
  const std::int64_t h_size = batch_ * stack_.shape().output_size();
  const std::int64_t c_size = batch_ * stack_.shape().hidden_size;
  T* const memory = static_cast<T*>(memory_->data());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Prepared& layer = layers[i];
    LayerForward<T, T> problem{};
    problem.shape = layer.shape;
    problem.shape.sequence.steps = steps;
    problem.x = i == 0 ? x : memory + between_at_[(i - 1) % 2];
    problem.x_stride = layer.shape.input_size;
    problem.y = i + 1 == layers.size() ? y : memory + between_at_[i % 2];
    problem.y_stride = stack_.shape().output_size();
    // A single rank has read the initial states before it writes the final ones.
    problem.h0 = problem.h_n = h + std::int64_t(i) * h_size;
    if (c != nullptr) problem.c0 = problem.c_n = c + std::int64_t(i) * c_size;
    alignas(Barrier::kBytes) char team_memory[Team::kBytes];
    Team team(1, team_memory, interruption, asks);
    team.backwards = backwards_;
    layer.forward(problem, layer.plan, layer.panel_layout, layer.panels, layer.layout,
                  memory + scratch_at_, team, 0);
    add_residual(stack_.shape(), int(i), problem.x, steps * h_size, problem.y);
  }
  if (steps % 2 == 1) backwards_ = !backwards_;
}

template class SerialStack<float>;
template class SerialStack<double>;

}  // namespace fastrnn::cpu
