// The layer that the kernels must agree with: plain loops in double over random values. The
// formulas are those of csrc/cells, since this harness checks memory and threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "problem/layer.h"

namespace sanitize {

using fastrnn::CellKind;
using Values = std::vector<double>;

// A layer and a batch. `lengths` of the sequences must descend.
struct Case {
  std::string name;
  std::int64_t input_size, hidden_size, proj_size;
  std::vector<std::int64_t> lengths;
};

// Fills in this struct of the kernels, as no other code here does but a planted mistake.
inline fastrnn::LayerShape layer_shape(CellKind cell, const Case& sizes, bool reverse,
                                       const std::vector<std::int64_t>& step_offset,
                                       const std::vector<std::int64_t>& step_rows) {
  fastrnn::LayerShape shape{};
  shape.cell = cell;
  shape.sequence.steps = std::int64_t(step_rows.size());
  shape.sequence.batch = std::int64_t(sizes.lengths.size());
  shape.sequence.reverse = reverse;
  shape.sequence.step_offset = step_offset.data();
  shape.sequence.step_rows = step_rows.data();
  shape.input_size = sizes.input_size;
  shape.hidden_size = sizes.hidden_size;
  shape.proj_size = sizes.proj_size;
  return shape;
}

// One direction: what it is given, and what it must compute. Rows are those of all steps, N.
struct Direction {
  bool reverse;
  Values w_ih, w_hh, b_ih, b_hh;               // [G*H, I] [G*H, R] [G*H] [G*H]
  Values w_hr, w_unit;                         // [P, H] [E*H]
  Values h0, c0, d_y, d_h_n, d_c_n;            // [B, R] [B, C*H] [N, R] [B, R] [B, C*H]
  Values d_c_steps;                            // [N, C*H], or empty in forward direction
  Values y, h_n, c_n, saved;                   // [N, R] [B, R] [B, C*H] [N, S*H]
  Values d_pre, d_h_all, d_h0, d_c0;           // [N, (Q+E)*H] [N, R] [B, R] [B, C*H]
  Values d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh;  // [N, I] and like the weights
};

class Layer {
 public:
  Layer(CellKind cell, const Case& sizes, unsigned seed) : cell(cell), sizes(sizes), random_(seed) {
    for (std::int64_t t = 0; t < sizes.lengths[0]; ++t) {
      std::int64_t active = 0;
      for (const std::int64_t length : sizes.lengths) active += length > t ? 1 : 0;
      step_offset.push_back(rows);
      step_rows.push_back(active);
      rows += active;
    }
    x = draw(rows * sizes.input_size, 1.0);
    for (const bool reverse : {false, true}) directions.push_back(make_direction(reverse));
  }

  fastrnn::LayerShape shape(bool reverse) const {
    return layer_shape(cell, sizes, reverse, step_offset, step_rows);
  }
  const fastrnn::CellInfo& info() const { return fastrnn::cell_info(cell); }
  std::int64_t batch() const { return std::int64_t(sizes.lengths.size()); }
  std::int64_t output_size() const {
    return sizes.proj_size > 0 ? sizes.proj_size : sizes.hidden_size;
  }
  std::int64_t cell_units() const { return info().cell_states() * sizes.hidden_size; }

  const CellKind cell;
  const Case sizes;
  std::int64_t rows = 0;
  std::vector<std::int64_t> step_offset, step_rows;
  Values x;  // [N, I]
  std::vector<Direction> directions;

 private:
  // Values of float, so that both dtypes start from the same numbers.
  Values draw(std::int64_t count, double limit) {
    std::uniform_real_distribution<float> distribution(float(-limit), float(limit));
    Values values(static_cast<std::size_t>(count));
    for (double& value : values) value = distribution(random_);
    return values;
  }

  Direction make_direction(bool reverse) {
    const std::int64_t gate_rows = info().gates * sizes.hidden_size;
    const double limit = 1.0 / std::sqrt(double(sizes.hidden_size));
    Direction d{};
    d.reverse = reverse;
    d.w_ih = draw(gate_rows * sizes.input_size, limit);
    d.w_hh = draw(info().dense ? gate_rows * output_size() : 0, limit);
    d.b_ih = draw(gate_rows, limit);
    d.b_hh = draw(info().dense ? gate_rows : 0, limit);
    d.w_hr = draw(sizes.proj_size * sizes.hidden_size, limit);
    d.w_unit = draw(info().parameters * sizes.hidden_size, 1.0);
    d.h0 = draw(batch() * output_size(), 1.0);
    d.c0 = draw(batch() * cell_units(), 1.0);
    if (info().states > 2)  // the normaliser of an sLSTM is positive
      for (double& value : d.c0) value = std::abs(value) + 0.5;
    d.d_y = draw(rows * output_size(), 1.0);
    d.d_h_n = draw(batch() * output_size(), 1.0);
    d.d_c_n = draw(batch() * cell_units(), 1.0);
    if (reverse) d.d_c_steps = draw(rows * cell_units(), 1.0);
    switch (cell) {
#define FASTRNN_CELL(kind, name, type) \
  case CellKind::kind:                 \
    run<type>(d);                      \
    break;
      FASTRNN_CELLS(FASTRNN_CELL)
#undef FASTRNN_CELL
    }
    return d;
  }

  // The row of sequence b at the step before t in order of computation, -1 if it starts at t.
  std::int64_t row_before(std::int64_t t, std::int64_t b, bool reverse) const {
    const std::int64_t before = reverse ? t + 1 : t - 1;
    if (before < 0 || before >= sizes.lengths[std::size_t(b)]) return -1;
    return step_offset[std::size_t(before)] + b;
  }

  static double dot(const double* a, const double* b, std::int64_t count, std::int64_t b_stride) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i * b_stride];
    return sum;
  }
  // to[i] += factor * from[i]
  static void add(double* to, double factor, const double* from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
  }

  template <class Cell>
  void run(Direction& d) const {
    const std::int64_t inputs = sizes.input_size, hidden = sizes.hidden_size;
    const std::int64_t outputs = output_size(), steps = std::int64_t(step_rows.size());
    const bool projected = sizes.proj_size > 0;
    constexpr int kCellStates = fastrnn::cells::kCellStates<Cell>;
    constexpr int kColumns = fastrnn::cells::kGradientColumns<Cell>;
    constexpr int kParameters = fastrnn::cells::kParametersLength<Cell>;
    const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };

    d.y.resize(size(rows * outputs));
    d.saved.resize(size(rows * Cell::kSaved * hidden));
    d.h_n = d.h0;
    d.c_n = d.c0;
    for (std::int64_t k = 0; k < steps; ++k) {
      const std::int64_t t = d.reverse ? steps - 1 - k : k;
      for (std::int64_t b = 0; b < step_rows[size(t)]; ++b) {
        const std::int64_t row = step_offset[size(t)] + b;
        const Values h(d.h_n.begin() + b * outputs, d.h_n.begin() + (b + 1) * outputs);
        Values next_h(size(hidden));
        for (std::int64_t u = 0; u < hidden; ++u) {
          double pre[Cell::kPre] = {}, saved[Cell::kSaved + 1], parameters[kParameters] = {};
          double state[Cell::kStates] = {}, next_state[Cell::kStates] = {};
          for (int gate = 0; gate < Cell::kGates; ++gate) {
            const std::int64_t w = gate * hidden + u;
            pre[Cell::kPreX[gate]] += d.b_ih[size(w)] + dot(x.data() + row * inputs,
                                                            d.w_ih.data() + w * inputs, inputs, 1);
            if (Cell::kDenseRecurrence)
              pre[Cell::kPreH[gate]] +=
                  d.b_hh[size(w)] + dot(h.data(), d.w_hh.data() + w * outputs, outputs, 1);
          }
          if (!projected) state[0] = h[size(u)];
          for (int s = 0; s < kCellStates; ++s)
            state[s + 1] = d.c_n[size((b * kCellStates + s) * hidden + u)];
          for (int i = 0; i < Cell::kParameters; ++i)
            parameters[i] = d.w_unit[size(i * hidden + u)];
          Cell::forward(fastrnn::cells::StepInputs<double>{pre, state, parameters},
                        fastrnn::cells::StepOutputs<double>{saved, next_state});
          for (int s = 0; s < Cell::kSaved; ++s)
            d.saved[size((row * Cell::kSaved + s) * hidden + u)] = saved[s];
          next_h[size(u)] = next_state[0];
          for (int s = 0; s < kCellStates; ++s)
            d.c_n[size((b * kCellStates + s) * hidden + u)] = next_state[s + 1];
        }
        for (std::int64_t u = 0; u < outputs; ++u) {
          const double value = projected ? dot(next_h.data(), d.w_hr.data() + u * hidden, hidden, 1)
                                         : next_h[size(u)];
          d.y[size(row * outputs + u)] = d.h_n[size(b * outputs + u)] = value;
        }
      }
    }

    d.d_pre.resize(size(rows * kColumns * hidden));
    d.d_h_all.resize(size(rows * outputs));
    d.d_x.resize(x.size());
    d.d_w_ih.resize(d.w_ih.size());
    d.d_w_hh.resize(d.w_hh.size());
    d.d_b_ih.resize(d.b_ih.size());
    d.d_b_hh.resize(d.b_hh.size());
    d.d_h0 = d.d_h_n;
    d.d_c0 = d.d_c_n;
    for (std::int64_t k = steps - 1; k >= 0; --k) {
      const std::int64_t t = d.reverse ? steps - 1 - k : k;
      for (std::int64_t b = 0; b < step_rows[size(t)]; ++b) {
        const std::int64_t row = step_offset[size(t)] + b, before = row_before(t, b, d.reverse);
        double* d_h = d.d_h_all.data() + row * outputs;
        double* carry = d.d_h0.data() + b * outputs;
        for (std::int64_t u = 0; u < outputs; ++u) {
          d_h[u] = carry[u] + d.d_y[size(row * outputs + u)];
          carry[u] = 0.0;
        }
        const double* h = before < 0 ? d.h0.data() + b * outputs : d.y.data() + before * outputs;
        double* d_pre_row = d.d_pre.data() + row * kColumns * hidden;
        for (std::int64_t u = 0; u < hidden; ++u) {
          double saved[Cell::kSaved + 1] = {}, parameters[kParameters] = {};
          double state[Cell::kStates] = {}, next_state[Cell::kStates] = {};
          double d_next_state[Cell::kStates] = {}, d_pre[kColumns], d_state[Cell::kStates] = {};
          for (int s = 0; s < Cell::kSaved; ++s)
            saved[s] = d.saved[size((row * Cell::kSaved + s) * hidden + u)];
          if (!projected) {
            state[0] = h[u];
            next_state[0] = d.y[size(row * outputs + u)];
          }
          for (int s = 0; s < kCellStates; ++s) {
            const std::int64_t i = (b * kCellStates + s) * hidden + u;
            state[s + 1] =
                before < 0
                    ? d.c0[size(i)]
                    : d.saved[size((before * Cell::kSaved + Cell::kSavedState + s) * hidden + u)];
            d_next_state[s + 1] = d.d_c0[size(i)];
            if (!d.d_c_steps.empty())
              d_next_state[s + 1] += d.d_c_steps[size((row * kCellStates + s) * hidden + u)];
          }
          for (int i = 0; i < Cell::kParameters; ++i)
            parameters[i] = d.w_unit[size(i * hidden + u)];
          d_next_state[0] = projected ? dot(d_h, d.w_hr.data() + u, outputs, hidden) : d_h[u];
          Cell::backward(
              fastrnn::cells::StepGradientInputs<double>{saved, state, next_state, d_next_state,
                                                         parameters},
              fastrnn::cells::StepGradientOutputs<double>{d_pre, d_state, d_pre + Cell::kPre});
          for (int q = 0; q < kColumns; ++q) d_pre_row[q * hidden + u] = d_pre[q];
          for (int s = 0; s < kCellStates; ++s)
            d.d_c0[size((b * kCellStates + s) * hidden + u)] = d_state[s + 1];
          if (Cell::kDirectPath) carry[u] += d_state[0];
        }
        for (std::int64_t w = 0; w < Cell::kGates * hidden; ++w) {
          const std::int64_t gate = w / hidden, u = w % hidden;
          const double d_gate_x = d_pre_row[Cell::kPreX[gate] * hidden + u];
          add(d.d_x.data() + row * inputs, d_gate_x, d.w_ih.data() + w * inputs, inputs);
          add(d.d_w_ih.data() + w * inputs, d_gate_x, x.data() + row * inputs, inputs);
          d.d_b_ih[size(w)] += d_gate_x;
          if (!Cell::kDenseRecurrence) continue;
          const double d_gate_h = d_pre_row[Cell::kPreH[gate] * hidden + u];
          add(carry, d_gate_h, d.w_hh.data() + w * outputs, outputs);
          add(d.d_w_hh.data() + w * outputs, d_gate_h, h, outputs);
          d.d_b_hh[size(w)] += d_gate_h;
        }
      }
    }
  }

  std::mt19937 random_;
};

}  // namespace sanitize
