// Offsets in the memory of a time loop with parts (problem/recurrence.h), in values of T, as in
// layout.h.
#pragma once

#include "cpu/layout.h"
#include "problem/recurrence.h"

namespace fastrnn::cpu {

struct RecurrenceLayout {
  std::int64_t unit_block, unit_blocks, padded;  // U units, ceil(H / U), U * blocks
  std::int64_t panels;                           // [unit_blocks, H, G*U]
  std::int64_t products;                         // [B, G, padded] w_hh h of a step
  std::int64_t operand;                          // [B, H] what w_hh multiplies
  std::int64_t rank_row;  // of each rank [S, padded] what the cell saves, if the call does not
  std::int64_t row_size;
  // With two products (kernels/recurrence/two_products.h) each matrix counts as one gate of many
  // units: their rows are neighbours in w_hh, and a tile of one gate may be wide.
  std::int64_t second_blocks;  // unit_blocks are those of the first product
  std::int64_t second_panels;  // [second_blocks, H, U]; panels are [unit_blocks, H, U]
  std::int64_t product_row;    // values of a row of products: of the first, then of the second
  std::int64_t gates;          // [B, S*H] what the cell saves, if the call does not
  std::int64_t size;

  RecurrenceLayout(const LayerShape& shape, const Plan& plan) {
    const CellInfo& cell = cell_info(shape.cell);
    const std::int64_t batch = shape.sequence.batch;
    WorkspaceBuilder builder;
    second_blocks = second_panels = product_row = gates = 0;
    if (const int first = first_gates(cell); first < cell.gates) {
      const std::int64_t hidden = shape.hidden_size;
      unit_block = std::int64_t(plan.back_vectors) * plan.vector_lanes;
      unit_blocks = divide_up(first * hidden, unit_block);
      second_blocks = divide_up((cell.gates - first) * hidden, unit_block);
      padded = rank_row = row_size = 0;
      panels = builder.add(unit_blocks * unit_block * hidden);
      second_panels = builder.add(second_blocks * unit_block * hidden);
      product_row = std::max(unit_blocks, second_blocks) * unit_block;
      products = builder.add(batch * product_row);
      operand = builder.add(batch * hidden);
      gates = builder.add(batch * cell.saved * hidden);
      size = builder.size();
      return;
    }
    unit_block = std::int64_t(plan.unit_vectors) * plan.vector_lanes;
    unit_blocks = divide_up(shape.hidden_size, unit_block);
    padded = unit_block * unit_blocks;
    panels = builder.add(padded * cell.gates * shape.hidden_size);
    products = builder.add(batch * cell.gates * padded);
    operand = builder.add(batch * shape.hidden_size);
    row_size = divide_up(cell.saved * padded, kRankLine) * kRankLine;
    rank_row = builder.add(plan.threads * row_size);
    size = builder.size();
  }

  // Rows of different ranks share no cache line.
  static constexpr std::int64_t kRankLine = 32;
};

struct RecurrenceBackwardLayout {
  std::int64_t out_block, out_blocks, padded;
  std::int64_t panels;    // [out_blocks, G*H, out_block]
  std::int64_t products;  // [B, padded] d_a w_hh of a step, with two products of one at a time
  std::int64_t direct;    // [B, padded] gradients at h around w_hh
  std::int64_t rank_row;  // of each rank [padded] gradients at LN(c')
  std::int64_t sums;      // of each rank d_vectors, twice: of the last rows, and of all before
  std::int64_t sums_size;
  std::int64_t size;

  RecurrenceBackwardLayout(const LayerShape& shape, const Plan& plan) {
    const CellInfo& cell = cell_info(shape.cell);
    out_block = std::int64_t(plan.back_vectors) * plan.vector_lanes;
    out_blocks = divide_up(shape.hidden_size, out_block);
    padded = out_block * out_blocks;
    const std::int64_t batch = shape.sequence.batch;
    WorkspaceBuilder builder;
    panels = builder.add(padded * cell.gates * shape.hidden_size);
    products = builder.add(batch * padded);
    direct = builder.add(batch * padded);
    rank_row = builder.add(plan.threads * padded);
    sums_size =
        divide_up(recurrence_vectors(cell, shape.hidden_size), RecurrenceLayout::kRankLine) *
        RecurrenceLayout::kRankLine;
    sums = builder.add(plan.threads * 2 * sums_size);
    size = builder.size();
  }
};

}  // namespace fastrnn::cpu
