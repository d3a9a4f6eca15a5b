// Offsets in the memory of a call, computed from sizes alone. The code that allocates the memory
// and the code of the instruction sets share these. Offsets are in elements of T.
#pragma once

#include <cstdint>

#include "cpu/api.h"

namespace fastrnn::cpu {

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A range of indices: [begin, end).
struct IndexRange {
  std::int64_t begin, end;
  IndexRange(std::int64_t begin_, std::int64_t end_) : begin(begin_), end(end_) {}
  // The part-th of `parts` nearly equal ranges of [0, count).
  IndexRange(std::int64_t count, int part, int parts)
      : begin(count * part / parts), end(count * (part + 1) / parts) {}
  // The i-th index of the range, or the i-th from the end. Loops that alternate the direction start
  // with the weights that are still in the cache.
  std::int64_t zigzag(std::int64_t i, bool backwards) const {
    return backwards ? end - 1 - i : begin + i;
  }
  std::int64_t size() const { return end - begin; }
  // The part-th of `parts` nearly equal ranges of this range.
  IndexRange cut(int part, int parts) const {
    IndexRange result(end - begin, part, parts);
    result.begin += begin;
    result.end += begin;
    return result;
  }
  // For a range of blocks of `block` units each: the range of their units, of which there are
  // `all`.
  IndexRange units(std::int64_t block, std::int64_t all) const {
    IndexRange result = *this;
    result.begin = begin * block < all ? begin * block : all;
    result.end = end * block < all ? end * block : all;
    return result;
  }
};

// The rows of a batch that a row group owns: neighbouring ones. Where sequences end at different
// steps, the first rows last, so that would give the groups unequal work: then every stride-th row.
struct OwnRows {
  std::int64_t first, end, stride;

  OwnRows(const Sequence& sequence, int group, int groups)
      : first(group), end(sequence.batch), stride(groups) {
    if (sequence.steps > 0 && sequence.rows(0) != sequence.rows(sequence.steps - 1)) return;
    const IndexRange neighbours(sequence.batch, group, groups);
    first = neighbours.begin;
    end = neighbours.end;
    stride = 1;
  }
  // The i-th own row.
  std::int64_t row(std::int64_t i) const { return first + i * stride; }
  // Own rows among the rows 0 ... rows - 1.
  std::int64_t count(std::int64_t rows) const {
    const std::int64_t last = rows < end ? rows : end;
    return last > first ? divide_up(last - first, stride) : 0;
  }
};

// Places the parts of a workspace one after the other, each at the start of a cache line.
class WorkspaceBuilder {
 public:
  // Returns the offset of a new part.
  std::int64_t add(std::int64_t elements) {
    const std::int64_t offset = size_;
    size_ += divide_up(elements, kLine) * kLine;
    return offset;
  }
  std::int64_t size() const { return size_; }

 private:
  static constexpr std::int64_t kLine = 32;  // elements: at least 128 bytes
  std::int64_t size_ = 0;
};

// Elements of a rank's own memory, whose cache lines no other rank writes.
constexpr std::int64_t padded_row(std::int64_t elements) { return divide_up(elements, 32) * 32; }

// The panels of one layer and direction: its weights and bias in the order in which forward reads
// them. They depend on the shape of the layer, the weights and the plan, not on the sequence, so
// they can outlive a call.
struct PanelLayout {
  std::int64_t unit_block, unit_blocks;  // U hidden units, ceil(H / U)
  std::int64_t proj_block, proj_blocks;  // the same for the P units of a projection
  std::int64_t w_ih;                     // [unit_blocks, I, G*U]; in bfloat16 [.., I/2, G*U] pairs
  std::int64_t w_hh;                     // [unit_blocks, R, G*U] in the plan's recurrent_format
  std::int64_t w_hr;                     // [proj_blocks, H, proj_block]
  std::int64_t bias;                     // [unit_blocks, Q*U]
  std::int64_t size;

  PanelLayout(const LayerShape& shape, const Plan& plan) {
    const CellInfo& cell = cell_info(shape.cell);
    unit_block = std::int64_t(plan.unit_vectors) * plan.vector_lanes;
    unit_blocks = divide_up(shape.hidden_size, unit_block);
    proj_block = std::int64_t(plan.back_vectors) * plan.vector_lanes;
    proj_blocks = divide_up(shape.proj_size, proj_block);
    WorkspaceBuilder builder;
    const std::int64_t packed = plan.packed ? 1 : 0;  // unpacked weights have no panels
    const std::int64_t width = unit_blocks * cell.gates * unit_block;
    const int recurrent_bytes = weight_bytes(plan.recurrent_format, plan.element_bytes);
    // A pair of bfloat16 is as large as an element. Other matrices than w_hh are native.
    const bool pairs = is_bfloat16(plan.recurrent_format);
    const auto depth = [&](std::int64_t k) {
      return panel_rows(pairs ? plan.recurrent_format : WeightFormat::kNative, k);
    };
    w_ih = builder.add(packed * depth(shape.input_size) * width);
    w_hh = builder.add(
        (cell.dense ? packed : 0) *
        (pairs ? depth(shape.output_size()) * width
               : divide_up(shape.output_size() * width * recurrent_bytes, plan.element_bytes)));
    w_hr = builder.add(packed * proj_blocks * depth(shape.hidden_size) * proj_block);
    bias = builder.add(unit_blocks * cell.pre * unit_block);
    size = builder.size();
  }
};

// What forward writes and reads during one call, apart from the panels.
struct ForwardLayout {
  std::int64_t h;              // [2, B, R]  h of the last step and of this one
  std::int64_t unprojected_h;  // [B, H]     h before projection
  std::int64_t c;              // [B, S, H]  the S states beside h, if c_n has another type
  // [unit_blocks, chunk_rows, Q*U]  pre-activations projected ahead; if the cell computes rows also
  // [unit_blocks, B, Q*U]           those of a step, if nothing is projected ahead
  std::int64_t gates_x;
  std::int64_t rows;  // of each rank [buffers + S, H]  if the cell computes rows
  std::int64_t row_size;
  std::int64_t size;

  ForwardLayout(const LayerShape& shape, const Plan& plan, const PanelLayout& panels) {
    const std::int64_t batch = shape.sequence.batch;
    const std::int64_t row = panels.unit_blocks * cell_info(shape.cell).pre * panels.unit_block;
    WorkspaceBuilder builder;
    h = builder.add(2 * batch * shape.output_size());
    unprojected_h = builder.add(shape.proj_size > 0 ? batch * shape.hidden_size : 0);
    const int own_states =
        is_bfloat16(plan.recurrent_format) ? cell_info(shape.cell).states - 1 : 0;
    c = builder.add(batch * own_states * shape.hidden_size);
    const CellInfo& cell = cell_info(shape.cell);
    const std::int64_t kept_rows = cell.computes_rows ? batch : 0;
    gates_x = builder.add((plan.input_fused ? kept_rows : plan.chunk_rows) * row);
    row_size = cell.computes_rows ? padded_row((cell.forward_buffers + cell.saved) *
                                               panels.unit_blocks * panels.unit_block)
                                  : 0;
    rows = builder.add(plan.threads * row_size);
    size = builder.size();
  }
};

struct BackwardLayout {
  std::int64_t out_block, out_blocks;    // units of h per block, ceil(R / out_block)
  std::int64_t unit_block, unit_blocks;  // hidden units per block, with a projection
  std::int64_t panels_h;  // [out_blocks, G*H, out_block]; in bfloat16 [.., G*H/2, ..] pairs
  std::int64_t panels_p;  // [unit_blocks, P, unit_block]
  std::int64_t carry;     // [B, out_blocks*out_block]  gradient at h, passed from step to step
  std::int64_t rounded;   // [2, B, G*H] bfloat16       d_pre of two steps, if w_hh is in bfloat16
  std::int64_t rows;      // of each rank [buffers, out_blocks*out_block]  as in forward
  std::int64_t row_size;
  std::int64_t size;

  BackwardLayout(const LayerShape& shape, const Plan& plan) {
    const CellInfo& cell = cell_info(shape.cell);
    out_block = unit_block = std::int64_t(plan.back_vectors) * plan.vector_lanes;
    out_blocks = divide_up(shape.output_size(), out_block);
    unit_blocks = shape.proj_size > 0 ? divide_up(shape.hidden_size, unit_block) : 0;
    WorkspaceBuilder builder;
    const std::int64_t gates = cell.gates * shape.hidden_size;
    panels_h = builder.add(
        cell.dense ? out_blocks * panel_rows(plan.recurrent_format, gates) * out_block : 0);
    panels_p = builder.add(unit_blocks * shape.proj_size * unit_block);
    carry = builder.add(shape.sequence.batch * out_blocks * out_block);
    rounded = builder.add(is_bfloat16(plan.recurrent_format) ? shape.sequence.batch * gates : 0);
    row_size = padded_row(cell.backward_buffers * out_blocks * out_block);
    rows = builder.add(plan.threads * row_size);
    size = builder.size();
  }
};

// Memory of a rank for the products of the gradients: copies of A [kRows, depth] and B [depth,
// kColumns], which fit in the private cache of a core. Rows of A are `pitch` apart: a power of two
// would map all rows to the same cache sets.
struct GradientLayout {
  static constexpr std::int64_t kRows = 240, kColumns = 256;
  std::int64_t depth, pitch;
  std::int64_t size;

  GradientLayout(const LayerShape&, const Plan& plan)
      : depth(plan.gradient_depth), pitch(depth + 16), size(plan.threads * rank_size()) {}
  std::int64_t a(int rank) const { return rank * rank_size(); }
  std::int64_t b(int rank) const { return a(rank) + kRows * pitch; }

 private:
  std::int64_t rank_size() const { return kRows * pitch + depth * kColumns; }
};

}  // namespace fastrnn::cpu
