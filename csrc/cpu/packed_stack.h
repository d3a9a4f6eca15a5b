// Stacked layers whose weights are packed once and serve many calls of inference.
#pragma once

#include <memory>
#include <vector>

#include "cpu/api.h"
#include "cpu/runtime/buffer_cache.h"

namespace fastrnn::cpu {

struct StackShape {
  CellRef cell;
  int layers, directions;    // L, D
  std::int64_t input_size;   // I
  std::int64_t hidden_size;  // H
  std::int64_t proj_size;    // P, 0: no projection
  // Whether each layer but the first adds its input to its output. h_n has no such sum.
  bool residual = false;

  std::int64_t output_size() const { return proj_size > 0 ? proj_size : hidden_size; }  // R
  int states() const { return layers * directions; }                                    // L*D
  // Whether the cell is one of a public module: packed layers have at most h and c, and no
  // parameters per unit.
  static bool supports(const CellInfo& cell) {
    return cell.states <= 2 && cell.parameters == 0 && cell.dense;
  }
  bool has_cell_state() const { return cell_info(cell).states == 2; }
  // Numbers of values of h and of c of a batch; 0 if the cell has no c.
  std::int64_t h_size(std::int64_t batch) const { return states() * batch * output_size(); }
  std::int64_t c_size(std::int64_t batch) const {
    return has_cell_state() ? states() * batch * hidden_size : 0;
  }
};

// The arguments and results of a call, in contiguous memory.
template <class T>
struct StackCall {
  std::int64_t steps, batch;  // T, B
  const T* x;                 // [T, B, I]
  const T* h0;                // [L*D, B, R] or null: zero
  const T* c0;                // [L*D, B, H] or null: zero, or the cell has no c
  T* y;                       // [T, B, D*R]; must not overlap x
  T* h_n;                     // [L*D, B, R]; must not overlap h0
  T* c_n;                     // [L*D, B, H] or null: the cell has no c
};

// Adds the input of a layer to its output, if the layer has a residual connection.
template <class T>
void add_residual(const StackShape& shape, int layer, const T* x, std::int64_t size, T* y) {
  if (!shape.residual || layer == 0) return;
  for (std::int64_t i = 0; i < size; ++i) y[i] += x[i];
}

template <class T>
class PackedStack {
 public:
  // threads: number that the width of the panels is chosen for. Calls may use more or fewer.
  FASTRNN_EXPORT PackedStack(const StackShape& shape, int threads);

  // Copies the weights of all layers and directions [L*D] into the panels. No call may run.
  FASTRNN_EXPORT void pack(const LayerWeights<T>* weights);
  // Any number of threads may call it at the same time.
  FASTRNN_EXPORT void forward(const StackCall<T>& call, int threads,
                              ParallelFor parallel_for) const;

  const StackShape& shape() const { return shape_; }
  // Without a sequence.
  LayerShape layer_shape(int layer) const;
  // The plan that a layer is packed for.
  const Plan& panel_plan(int layer) const { return plans_[layer]; }
  T* panels(int layer, int direction) const {
    return static_cast<T*>(panels_->data()) + offsets_[layer * shape_.directions + direction];
  }

 private:
  const StackShape shape_;
  std::vector<Plan> plans_;            // [L] that the panels are packed for
  std::vector<std::int64_t> offsets_;  // [L*D] of the panels, in elements
  std::unique_ptr<Workspace> panels_;
};

}  // namespace fastrnn::cpu
