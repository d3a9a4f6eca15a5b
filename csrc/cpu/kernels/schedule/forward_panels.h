// The weights and the bias of a layer's direction, packed for forward. Each rank of the plan packs
// a part.
#pragma once

#include "cpu/kernels/product/weight_matrix.h"

FASTRNN_KERNELS_BEGIN

// RecurrentFormat: the format of w_hh. OtherFormat: that of the other matrices.
template <class T, class RecurrentFormat, class OtherFormat = NativeFormat<T>>
class ForwardPanels {
 public:
  using Storage = typename OtherFormat::Source;  // type of the caller's tensors

  ForwardPanels(const LayerShape& shape, const LayerWeights<Storage>& weights, const Plan& plan,
                const PanelLayout& panel_layout, T* panels)
      : cell(cell_info(shape.cell)),
        w_ih({weights.w_ih, weights.w_ih_stride, true, cell.gates, shape.hidden_size,
              shape.input_size},
             panels + panel_layout.w_ih, plan.unit_vectors, plan.packed),
        w_hh({weights.w_hh, weights.w_hh_stride, true, cell.gates, shape.hidden_size,
              shape.output_size()},
             panels + panel_layout.w_hh, plan.unit_vectors, plan.packed),
        w_hr({weights.w_hr, weights.w_hr_stride, true, 1, shape.output_size(), shape.hidden_size},
             panels + panel_layout.w_hr, plan.back_vectors, plan.packed),
        layout(panel_layout),
        shape_(shape),
        weights_(weights),
        plan_(plan),
        bias_(panels + panel_layout.bias),
        bias_width_(cell.pre * panel_layout.unit_block) {}

  // Packs a rank's part. Row groups share the panels of their blocks and the work of packing them.
  void pack(int rank) const {
    const IndexRange blocks = part(layout.unit_blocks, rank);
    w_ih.pack(blocks);
    if (cell.dense) w_hh.pack(blocks);
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) pack_bias(block);
    if (shape_.proj_size > 0) w_hr.pack(part(layout.proj_blocks, rank));
  }

  // The bias [Q*U] of a block.
  const T* bias(std::int64_t block) const { return bias_ + block * bias_width_; }

  const CellInfo& cell;
  const WeightMatrix<T, OtherFormat> w_ih;
  const WeightMatrix<T, RecurrentFormat> w_hh;
  const WeightMatrix<T, OtherFormat> w_hr;
  const PanelLayout& layout;

 private:
  IndexRange part(std::int64_t blocks, int rank) const {
    return IndexRange(blocks, rank % plan_.unit_groups, plan_.unit_groups)
        .cut(rank / plan_.unit_groups, plan_.row_groups);
  }

  // Adds b_ih and b_hh of gates that share a pre-activation.
  void pack_bias(std::int64_t block) const {
    T* bias = bias_ + block * bias_width_;
    for (std::int64_t i = 0; i < bias_width_; ++i) bias[i] = T(0);
    if (weights_.b_ih == nullptr) return;
    const std::int64_t unit_block = layout.unit_block, first = block * unit_block;
    const std::int64_t present = std::min(unit_block, shape_.hidden_size - first);
    for (int gate = 0; gate < cell.gates; ++gate) {
      for (std::int64_t u = 0; u < present; ++u) {
        const std::int64_t row = gate * shape_.hidden_size + first + u;
        bias[cell.pre_x[gate] * unit_block + u] += T(weights_.b_ih[row]);
        if (weights_.b_hh != nullptr)
          bias[cell.pre_h[gate] * unit_block + u] += T(weights_.b_hh[row]);
      }
    }
  }

  const LayerShape& shape_;
  const LayerWeights<Storage>& weights_;
  const Plan& plan_;
  T* const bias_;
  const std::int64_t bias_width_;
};

FASTRNN_KERNELS_END
