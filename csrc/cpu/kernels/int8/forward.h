// Int8Walk: one pass of the forward time loop with int8 weights by one rank.
//
// A rank owns blocks of 16 hidden units (all gates of their units) and computes them for the whole
// batch. First the ranks round all rows of x to bytes, each a part. Then each rank projects x for
// many steps ahead, and multiplies h in each step. There is one barrier per step, as every rank
// reads all of h.
//
// h is rounded with a fixed scale per sequence, 1/127 of max(1, |h0|), which no later h exceeds:
// the rank that computes a unit also rounds it. Where the cell's state has no such bound (ReLU),
// each rank rounds all rows of h itself, with the scale that the row needs.
#pragma once

// First: it compiles the cells for the instruction set.
#include "cpu/kernels/int8/rounding.h"

FASTRNN_KERNELS_BEGIN

template <class Cell>
class Int8Walk {
 public:
  Int8Walk(const Int8Forward& problem, const Plan& plan, const Int8Layout& layout, char* workspace,
           Team& team, int rank)
      : problem_(problem),
        shape_(problem.shape),
        sequence_(problem.shape.sequence),
        plan_(plan),
        layout_(layout),
        workspace_(workspace),
        team_(team),
        barrier_(team.barrier),
        rank_(rank),
        blocks_(int8_blocks(problem.shape.hidden_size), rank, plan.threads),
        quads_x_(int8_quads(problem.shape.input_size)),
        quads_h_(int8_quads(problem.shape.hidden_size)) {}

  void run() {
    if (sequence_.steps == 0) return finish_untouched();
    copy_rests();
    const IndexRange rows(sequence_.total_rows(), rank_, plan_.threads);
    for (std::int64_t row = rows.begin; row < rows.end; ++row)
      round_row(problem_.x + row * problem_.x_stride, shape_.input_size,
                part<std::uint8_t>(layout_.x) + row * layout_.x_row,
                part<float>(layout_.x_scales)[row], part<std::int32_t>(layout_.x_zeros)[row]);
    StepRows at = sequence_.at(sequence_.step(0));
    start_rows(at, 0);
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);
    std::int64_t chunk_end = 0;  // steps before this one have their gates_x
    for (std::int64_t k = 0; k < sequence_.steps; ++k) {
      if (team_.gives_up(rank_, step_work())) {
        for (; k < sequence_.steps; ++k) barrier_.arrive(rank_);
        return;
      }
      if (k == chunk_end) chunk_end = project_ahead(k);
      if (k > 0) barrier_.wait(rank_, 0, plan_.threads);
      step(at, int(k % 2));
      if (k + 1 < sequence_.steps)
        start_rows(at = sequence_.at(sequence_.step(k + 1)), int((k + 1) % 2));
      barrier_.arrive(rank_);
    }
  }

 private:
  using Vec = Pack<float>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kGates = Cell::kGates;
  static constexpr bool kBounded = Cell::kBoundedState;
  static constexpr int kTileHeight = int8_tile_rows<kGates>();
  static constexpr std::int64_t kGateWidth = kGates * kInt8Units;     // of scales and sums
  static constexpr std::int64_t kPreWidth = Cell::kPre * kInt8Units;  // of gates_x and bias
  static constexpr std::int32_t kZeroPoint = 128;                     // of h with a fixed scale

  template <class Value>
  Value* part(std::int64_t offset) const {
    return reinterpret_cast<Value*>(workspace_ + offset);
  }
  // Multiply-adds of this rank in a step. Four times as many as in float32 take as long.
  std::int64_t step_work() const {
    return 1 + sequence_.batch * blocks_.size() * kGateWidth *
                   (shape_.input_size + shape_.hidden_size) / 4;
  }
  IndexRange own_units() const { return blocks_.units(kInt8Units, shape_.hidden_size); }

  std::uint8_t* h_bytes(int parity) const {
    return part<std::uint8_t>(layout_.h) + parity * sequence_.batch * layout_.h_row;
  }
  // Scales of h. A rank that computes NaN in a row makes the scale of its next step NaN, so that
  // all units become NaN, as in float32. Several ranks may do so at the same time.
  std::atomic<float>* h_scales(int parity) const {
    return part<std::atomic<float>>(layout_.h_scales) + parity * sequence_.batch;
  }

  // The weights of one vector of units of a block. rest: an offset of the layout.
  Int8Block weights(const Int8Matrix& matrix, std::int64_t quads, std::int64_t rest,
                    std::int64_t block, std::int64_t unit) const {
    const bool is_whole = quads % kInt8RestQuads == 0;
    return {matrix.panels + (block * quads * kGateWidth + unit) * kInt8Depth,
            is_whole ? nullptr : rest_of(rest, block), matrix.sums + block * kGateWidth + unit,
            quads};
  }
  std::int8_t* rest_of(std::int64_t rest, std::int64_t block) const {
    return part<std::int8_t>(rest) + block * kGates * kInt8RestBytes;
  }
  // Only this rank reads the copies of its blocks.
  void copy_rests() const {
#if defined(FASTRNN_INT8_TILES)
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      const Int8Block x = weights(problem_.w_ih, quads_x_, layout_.x_rest, block, 0);
      const Int8Block h = weights(problem_.w_hh, quads_h_, layout_.h_rest, block, 0);
      if (x.rest != nullptr) copy_rest<kGates>(x.panel, x.quads, rest_of(layout_.x_rest, block));
      if (h.rest != nullptr) copy_rest<kGates>(h.panel, h.quads, rest_of(layout_.h_rest, block));
    }
#endif
  }

  // Prepares the rows that start at a step: c in c_n and, with a fixed scale, the bytes of h.
  void start_rows(const StepRows& at, int parity) {
    const IndexRange units = own_units();
    for (std::int64_t b = at.first_starting; b < at.rows; ++b) {
      if constexpr (Cell::kStates == 2)
        std::copy(problem_.c0 + b * shape_.hidden_size + units.begin,
                  problem_.c0 + b * shape_.hidden_size + units.end,
                  problem_.c_n + b * shape_.hidden_size + units.begin);
      if constexpr (kBounded) start_row(b, units, parity);
    }
  }
  void start_row(std::int64_t b, const IndexRange& units, int parity) {
    const float* h0 = problem_.h0 + b * shape_.hidden_size;
    Vec most(1.0f), wrong(0.0f);
    for (std::int64_t i = 0; i < shape_.hidden_size; i += kLanes) {
      const Vec v = Vec::load(h0 + i, shape_.hidden_size - i);
      const Vec magnitude = select(Vec(0.0f) > v, -v, v);
      most = select(magnitude > most, magnitude, most);
      wrong = wrong + v * Vec(0.0f);
    }
    float lanes[kLanes];
    most.store(lanes);
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    const float scale = wrong.total() == 0.0f ? lanes[0] * (1.0f / 127.0f)
                                              : std::numeric_limits<float>::quiet_NaN();
    if (rank_ == 0)
      for (int p = 0; p < 2; ++p)
        new (&h_scales(p)[b]) std::atomic<float>(scale);  // other ranks read it after a barrier
    const Vec inverse(1.0f / scale);
    for (std::int64_t i = units.begin; i < units.end; i += kLanes)
      store_bytes(h_bytes(parity) + b * layout_.h_row + i,
                  rounded(Vec::load(h0 + i, units.end - i), inverse, kZeroPoint - IntVector{}));
  }

  // Without steps the initial states are the final ones.
  void finish_untouched() {
    const IndexRange units = own_units();
    for (std::int64_t b = 0; b < sequence_.batch; ++b) {
      const std::int64_t row = b * shape_.hidden_size;
      std::copy(problem_.h0 + row + units.begin, problem_.h0 + row + units.end,
                problem_.h_n + row + units.begin);
      if constexpr (Cell::kStates == 2)
        std::copy(problem_.c0 + row + units.begin, problem_.c0 + row + units.end,
                  problem_.c_n + row + units.begin);
    }
  }

  float* gates_x(std::int64_t block, std::int64_t row) const {
    return part<float>(layout_.gates_x) +
           (block * plan_.chunk_rows + row - chunk_first_row_) * kPreWidth;
  }

  // Computes bias + x w_ih^T of this rank's blocks for the steps from k on that fit in a chunk.
  // Returns the first step after them. Only this rank reads these values.
  std::int64_t project_ahead(std::int64_t k) {
    const std::int64_t end = sequence_.chunk_end(k, plan_.chunk_rows);
    const RowRange chunk = sequence_.rows_between(k, end);
    chunk_first_row_ = chunk.first;
    const float* scales = part<float>(layout_.x_scales);
    const std::int32_t* zeros = part<std::int32_t>(layout_.x_zeros);
    const std::uint8_t* bytes = part<std::uint8_t>(layout_.x);
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for (std::int64_t unit = 0; unit < kInt8Units; unit += kLanes) {
        Vec bias[Cell::kPre], row_scales[kGates];
        for (int q = 0; q < Cell::kPre; ++q)
          bias[q] = Vec::load(problem_.bias + block * kPreWidth + q * kInt8Units + unit);
        for (int g = 0; g < kGates; ++g)
          row_scales[g] =
              Vec::load(problem_.w_ih.scales + block * kGateWidth + g * kInt8Units + unit);
        const Int8Block own = weights(problem_.w_ih, quads_x_, layout_.x_rest, block, unit);
        for_each_int8_tile<kGates>(
            chunk.first, chunk.first + chunk.count, [&](std::int64_t row, int count) {
              IntVector sums[kTileHeight * kGates];
              multiply_bytes<kGates>(count, own, bytes + row * layout_.x_row, layout_.x_row,
                                     zeros + row, sums);
              for (int m = 0; m < count; ++m) {
                float* to = gates_x(block, row + m) + unit;
                Vec pre[Cell::kPre];
                for (int q = 0; q < Cell::kPre; ++q) pre[q] = bias[q];
                add_sums(sums + m * kGates, row_scales, Vec(scales[row + m]), Cell::kPreX, pre);
                for (int q = 0; q < Cell::kPre; ++q) pre[q].store(to + q * kInt8Units);
              }
            });
      }
    }
    return end;
  }

  // Adds the products of one row to the pre-activations.
  FASTRNN_INLINE static void add_sums(const IntVector* sums, const Vec* row_scales, Vec scale,
                                      const int (&columns)[kGates], Vec* pre) {
    for (int g = 0; g < kGates; ++g) {
      const Vec value(__builtin_convertvector(sums[g], Vec::Vector));
      pre[columns[g]] = pre[columns[g]] + value * (row_scales[g] * scale);
    }
  }

  void step(const StepRows& at, int parity) {
    const std::uint8_t* bytes;
    const std::int32_t* zeros = nullptr;
    const float* own_scales = nullptr;
    if constexpr (kBounded) {
      bytes = h_bytes(parity);
    } else {
      bytes = round_rows(at);
      own_scales = part<float>(layout_.own_scales) + rank_ * sequence_.batch;
      zeros = part<std::int32_t>(layout_.own_zeros) + rank_ * sequence_.batch;
    }
    std::int32_t fixed_zeros[kTileHeight];
    std::fill(fixed_zeros, fixed_zeros + kTileHeight, kZeroPoint);
    for (std::int64_t i = 0; i < blocks_.size(); ++i) {
      const std::int64_t block = blocks_.zigzag(i, parity != 0);
      for (std::int64_t unit = 0; unit < kInt8Units; unit += kLanes) {
        if (block * kInt8Units + unit >= shape_.hidden_size) break;
        const Int8Block own = weights(problem_.w_hh, quads_h_, layout_.h_rest, block, unit);
        for_each_int8_tile<kGates>(0, at.rows, [&](std::int64_t row, int count) {
          IntVector sums[kTileHeight * kGates];
          multiply_bytes<kGates>(count, own, bytes + row * layout_.h_row, layout_.h_row,
                                 kBounded ? fixed_zeros : zeros + row, sums);
          pointwise(at, block, unit, row, count, parity, own_scales, sums);
        });
      }
    }
  }

  // Rounds h before a step for all rows, in memory of this rank.
  const std::uint8_t* round_rows(const StepRows& at) {
    const std::int64_t first = rank_ * sequence_.batch;
    std::uint8_t* bytes = part<std::uint8_t>(layout_.own_h) + first * layout_.h_row;
    for (std::int64_t b = 0; b < at.rows; ++b)
      round_row(state_before(at, b), shape_.hidden_size, bytes + b * layout_.h_row,
                part<float>(layout_.own_scales)[first + b],
                part<std::int32_t>(layout_.own_zeros)[first + b]);
    return bytes;
  }
  const float* state_before(const StepRows& at, std::int64_t b) const {
    return at.state_before(b, static_cast<const float*>(problem_.y), problem_.y_stride, problem_.h0,
                           shape_.hidden_size);
  }

  // The cell's forward step for `count` rows, `first` the first one, and one vector of units.
  void pointwise(const StepRows& at, std::int64_t block, std::int64_t unit, std::int64_t first,
                 int count, int parity, const float* own_scales, const IntVector* sums) {
    const std::int64_t hidden = shape_.hidden_size, first_unit = block * kInt8Units + unit;
    const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - first_unit);
    Vec row_scales[kGates];
    for (int g = 0; g < kGates; ++g)
      row_scales[g] = Vec::load(problem_.w_hh.scales + block * kGateWidth + g * kInt8Units + unit);
    const float* gates = gates_x(block, at.first + first) + unit;
    for (int m = 0; m < count; ++m) {
      const std::int64_t b = first + m;
      float scale;
      if constexpr (kBounded)
        scale = h_scales(parity)[b].load(std::memory_order_relaxed);
      else
        scale = own_scales[b];
      Vec pre[Cell::kPre], state[Cell::kStates] = {}, next_state[Cell::kStates];
      Vec saved[std::max(Cell::kSaved, 1)];
      for (int q = 0; q < Cell::kPre; ++q)
        pre[q] = Vec::load(gates + m * kPreWidth + q * kInt8Units);
      add_sums(sums + m * kGates, row_scales, Vec(scale), Cell::kPreH, pre);
      if constexpr (Cell::kForwardReadsH)
        state[0] = Vec::load(state_before(at, b) + first_unit, lanes);
      float* c = Cell::kStates == 2 ? problem_.c_n + b * hidden + first_unit : nullptr;
      if constexpr (Cell::kStates == 2) state[1] = Vec::load(c, lanes);
      Cell::forward(cells::StepInputs<Vec>{pre, state, nullptr},
                    cells::StepOutputs<Vec>{saved, next_state});
      const Vec h = next_state[0];
      if constexpr (Cell::kStates == 2) next_state[1].store(c, lanes);
      h.store(problem_.y + (at.first + b) * problem_.y_stride + first_unit, lanes);
      if (at.ends(b)) h.store(problem_.h_n + b * hidden + first_unit, lanes);
      if constexpr (kBounded) {
        store_bytes(h_bytes(1 - parity) + b * layout_.h_row + first_unit,
                    rounded(h, Vec(1.0f / scale), kZeroPoint - IntVector{}));
        const Vec wrong = h * Vec(0.0f);
        if (is_nan_in(wrong))
          h_scales(1 - parity)[b].store(std::numeric_limits<float>::quiet_NaN(),
                                        std::memory_order_relaxed);
      }
    }
  }

  static FASTRNN_INLINE bool is_nan_in(Vec v) {
#if FASTRNN_VECTOR_BYTES == 64
    return _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q) != 0;
#elif FASTRNN_VECTOR_BYTES == 32
    return _mm256_movemask_ps(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q)) != 0;
#else
    bool found = false;
    for (int i = 0; i < kLanes; ++i) found |= v.v[i] != v.v[i];
    return found;
#endif
  }

  const Int8Forward& problem_;
  const LayerShape& shape_;
  const Sequence& sequence_;
  const Plan& plan_;
  const Int8Layout& layout_;
  char* const workspace_;
  Team& team_;
  Barrier& barrier_;
  const int rank_;
  const IndexRange blocks_;
  const std::int64_t quads_x_, quads_h_;
  std::int64_t chunk_first_row_ = 0;
};

FASTRNN_KERNELS_END
