#include "cpu/packed_stack.h"

#include <algorithm>
#include <optional>

#include "cpu/layout.h"
#include "cpu/panels.h"

namespace fastrnn::cpu {
namespace {

// The panels are planned for a sequence of this many steps: it uses all threads.
constexpr std::int64_t kTypicalSteps = 64;

// The steps of a padded batch, as Sequence reads them.
class PaddedSteps {
 public:
  PaddedSteps(std::int64_t steps, std::int64_t batch) : one_row_(batch) {
    if (steps == 1) return;
    rows_.resize(2 * steps, batch);
    for (std::int64_t t = 0; t < steps; ++t) rows_[t] = t * batch;
  }
  Sequence sequence(std::int64_t steps, std::int64_t batch, bool reverse) const {
    if (steps == 1) return {1, batch, reverse, &kNoOffset, &one_row_};
    return {steps, batch, reverse, rows_.data(), rows_.data() + steps};
  }

 private:
  static constexpr std::int64_t kNoOffset = 0;
  const std::int64_t one_row_;
  std::vector<std::int64_t> rows_;  // [T] offsets, [T] numbers of rows
};

}  // namespace

template <class T>
PackedStack<T>::PackedStack(const StackShape& shape, int threads) : shape_(shape) {
  WorkspaceBuilder builder;
  for (int layer = 0; layer < shape.layers; ++layer) {
    LayerShape typical = layer_shape(layer);
    typical.sequence.steps = kTypicalSteps;
    typical.sequence.batch = 1;
    plans_.push_back(make_panel_plan(typical, sizeof(T), threads));
    for (int direction = 0; direction < shape.directions; ++direction)
      offsets_.push_back(builder.add(panel_size(typical, plans_.back())));
  }
  panels_ = std::make_unique<Workspace>(std::size_t(builder.size()) * sizeof(T));
}

template <class T>
LayerShape PackedStack<T>::layer_shape(int layer) const {
  const std::int64_t below = shape_.directions * shape_.output_size();
  return {shape_.cell, Sequence{}, layer == 0 ? shape_.input_size : below, shape_.hidden_size,
          shape_.proj_size};
}

template <class T>
void PackedStack<T>::pack(const LayerWeights<T>* weights) {
  for (int layer = 0; layer < shape_.layers; ++layer)
    for (int direction = 0; direction < shape_.directions; ++direction)
      pack_panels(layer_shape(layer), weights[layer * shape_.directions + direction], plans_[layer],
                  panels(layer, direction));
}

template <class T>
void PackedStack<T>::forward(const StackCall<T>& call, int threads,
                             ParallelFor parallel_for) const {
  const std::int64_t batch = call.batch, out = shape_.output_size();
  const std::int64_t h_size = batch * out, c_size = batch * shape_.hidden_size;  // of one state
  const std::int64_t width = shape_.directions * out;
  const std::int64_t between = shape_.layers > 1 ? call.steps * batch * width : 0;
  const std::int64_t zeros =
      call.h0 == nullptr || call.c0 == nullptr ? std::max(h_size, c_size) : 0;
  WorkspaceBuilder builder;
  const std::int64_t buffers[] = {builder.add(between),
                                  builder.add(shape_.layers > 2 ? between : 0)};
  const std::int64_t zero_at = builder.add(zeros);
  std::optional<Workspace> memory;
  if (builder.size() > 0) memory.emplace(std::size_t(builder.size()) * sizeof(T));
  T* const workspace = memory ? static_cast<T*>(memory->data()) : nullptr;
  if (zeros > 0) std::fill_n(workspace + zero_at, zeros, T(0));

  const PaddedSteps steps(call.steps, batch);
  auto problem = [&](int layer, int direction) {
    const int state = layer * shape_.directions + direction;
    PackedForward<T> result{};
    result.shape = layer_shape(layer);
    result.shape.sequence = steps.sequence(call.steps, batch, direction == 1);
    result.x = layer == 0 ? call.x : workspace + buffers[(layer - 1) % 2];
    result.x_stride = result.shape.input_size;
    result.h0 = call.h0 != nullptr ? call.h0 + state * h_size : workspace + zero_at;
    result.c0 = call.c0 != nullptr ? call.c0 + state * c_size : workspace + zero_at;
    T* y = layer + 1 == shape_.layers ? call.y : workspace + buffers[layer % 2];
    result.y = y + direction * out;
    result.y_stride = width;
    result.h_n = call.h_n + state * h_size;
    result.c_n = call.c_n != nullptr ? call.c_n + state * c_size : nullptr;
    result.panels = panels(layer, direction);
    return result;
  };
  for (int layer = 0; layer < shape_.layers; ++layer) {
    if (shape_.directions == 1 && !shape_.residual && layer + 1 < shape_.layers) {
      const PackedForward<T> pair[] = {problem(layer, 0), problem(layer + 1, 0)};
      if (forward_packed_pair(pair, &plans_[layer], threads, parallel_for)) {
        ++layer;
        continue;
      }
    }
    const PackedForward<T> directions[] = {problem(layer, 0),
                                           problem(layer, shape_.directions - 1)};
    forward_packed(directions, shape_.directions, plans_[layer], threads, parallel_for);
    add_residual(shape_, layer, directions[0].x, call.steps * batch * width, directions[0].y);
  }
}

template class PackedStack<float>;
template class PackedStack<double>;

}  // namespace fastrnn::cpu
