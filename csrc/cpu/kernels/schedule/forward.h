// ForwardWalk: one pass of the forward time loop over a sequence by one rank.
//
//            unit blocks ->
//        +-----+-----+-----+-----+       A rank owns the blocks of its unit group (all gates of
//   rows |  0  |  0  |  1  |  1  |       their units) and the rows of its row group. Within a row
//   of   +-----+-----+-----+-----+       group each step needs all of h_{t-1}, so there is one
//   B    |  2  |  2  |  3  |  3  |       barrier per step. Row groups synchronise only once, after
//        +-----+-----+-----+-----+       packing.
#pragma once

#include "cpu/kernels/schedule/forward_panels.h"
#include "cpu/kernels/schedule/step_resets.h"
#include "cpu/kernels/vector/storage.h"

FASTRNN_KERNELS_BEGIN

// Panels: ForwardPanels in the plan's format. The caller's tensors, and h between steps, have their
// Storage type; gates, c and the saved values have the type T.
template <class Cell, class T, class Panels>
class ForwardWalk {
  using Storage = typename Panels::Storage;

 public:
  ForwardWalk(const LayerForward<Storage, T>& problem, const Plan& plan, const Panels& panels,
              const ForwardLayout& layout, T* scratch, Team& team, int rank)
      : problem_(problem),
        shape_(problem.shape),
        plan_(plan),
        panels_(panels),
        panel_layout_(panels.layout),
        layout_(layout),
        scratch_(scratch),
        team_(team),
        barrier_(team.barrier),
        work_queues_(team.work_queues),
        below_(team.below),
        rank_(rank),
        group_first_(rank / plan.unit_groups * plan.unit_groups),
        rows_(shape_.sequence, rank / plan.unit_groups, plan.row_groups),
        blocks_(panel_layout_.unit_blocks, rank % plan.unit_groups, plan.unit_groups),
        proj_blocks_(panel_layout_.proj_blocks, rank % plan.unit_groups, plan.unit_groups),
        output_size_(shape_.output_size()),
        width_(Cell::kPre * panel_layout_.unit_block),
        columns_x_(Cell::kPreX, Cell::kGates, plan.unit_vectors, kLanes),
        columns_h_(Cell::kPreH, Cell::kGates, plan.unit_vectors, kLanes),
        columns_p_(kZero, 1, plan.back_vectors, kLanes),
        tile_height_(std::min(panels_.w_ih.tile_height(), panels_.w_hh.tile_height())) {}

  void run() {
    StepRows at{};
    if (shape_.sequence.steps > 0) {
      start_rows(at = shape_.sequence.at(shape_.sequence.step(0)), 0);
      reset_first_step();
    }
    barrier_.arrive(rank_);
    barrier_.wait(rank_, 0, plan_.threads);  // all row groups have packed their part of the panels
    std::int64_t chunk_end = 0;              // steps before this one have their gates_x
    for (std::int64_t k = 0; k < shape_.sequence.steps; ++k) {
      if (team_.gives_up(rank_, step_work())) return arrive_for(shape_.sequence.steps - k);
      if (plan_.input_fused)
        await_input(k + 1);
      else if (k == chunk_end)
        chunk_end = project_ahead(k);
      step(at, k % 2, k > 0, StepResets<Storage>(problem_.resets, shape_.sequence, k + 1));
      if (k + 1 < shape_.sequence.steps)
        start_rows(at = shape_.sequence.at(shape_.sequence.step(k + 1)), (k + 1) % 2);
      barrier_.arrive(rank_);
    }
    if (shape_.sequence.steps == 0) finish_untouched();
  }

 private:
  using Vec = Pack<T>;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kZero[] = {0};
  static constexpr int kCellStates = cells::kCellStates<Cell>;
  // c_n holds the states beside h between steps.
  static constexpr bool kKeepsC = std::is_same_v<Storage, T>;

  // Multiply-adds of this rank in a step.
  std::int64_t step_work() const {
    return 1 + rows_.count(shape_.sequence.batch) * width_ * blocks_.size() *
                   (shape_.input_size + output_size_);
  }
  // Arrives as often as in `steps` steps, see Team::gives_up.
  void arrive_for(std::int64_t steps) {
    if (shape_.proj_size > 0) steps *= 2;
    while (steps-- > 0) barrier_.arrive(rank_);
  }

  // Waits until the layer below, if it runs at the same time, has computed the input of the first
  // `steps` steps. Its ranks arrive once after packing and once per step.
  void await_input(std::int64_t steps) {
    if (below_ == nullptr) return;
    for (int rank = 0; rank < below_->threads; ++rank)
      barrier_.add_sleep(rank_, below_->barrier.await(rank, std::uint32_t(1 + steps)));
  }

  // The hidden units and the units of h that this rank computes.
  IndexRange own_hidden() const {
    return blocks_.units(panel_layout_.unit_block, shape_.hidden_size);
  }
  IndexRange own_out() const {
    return shape_.proj_size > 0 ? proj_blocks_.units(panel_layout_.proj_block, output_size_)
                                : own_hidden();
  }

  // Stores the initial states of rows that start at a step where the step before would have stored
  // its own: h in the buffer that the step reads, c where c_state is.
  void start_rows(const StepRows& at, int parity) {
    const IndexRange out = own_out(), hidden = own_hidden();
    for (std::int64_t i = rows_.count(at.first_starting); i < rows_.count(at.rows); ++i) {
      const std::int64_t b = rows_.row(i);
      copy_state(problem_.h0, b, output_size_, out, h(parity));
      if (kKeepsC || problem_.unrounded_c == nullptr) copy_cell_states(b, hidden, c_state());
    }
  }
  // Replaces states before the first step.
  void reset_first_step() {
    const StepResets<Storage> resets(problem_.resets, shape_.sequence, 0);
    if (resets.mask == nullptr) return;
    for (std::int64_t i = 0; i < rows_.count(shape_.sequence.batch); ++i) {
      reset_h(resets, rows_.row(i), own_out(), 0);
      reset_c(resets, rows_.row(i), own_hidden());
    }
  }
  // Replaces units of the state of row b that a step reads, if it has a reset. The rank that has
  // computed these units calls this directly afterwards.
  void reset_h(const StepResets<Storage>& resets, std::int64_t b, const IndexRange& units,
               int parity) {
    if (resets.at(b)) copy_state(resets.h, b, output_size_, units, h(parity));
  }
  void reset_c(const StepResets<Storage>& resets, std::int64_t b, const IndexRange& units) {
    for (int s = 0; s < kCellStates && resets.at(b); ++s)
      copy_state(resets.c, b * kCellStates + s, shape_.hidden_size, units, c_state());
  }
  // The same for rows of a block after pointwise().
  void reset_block(const StepResets<Storage>& resets, std::int64_t block, std::int64_t first,
                   int count, int parity) {
    const std::int64_t unit = block * panel_layout_.unit_block;
    const IndexRange units(unit, std::min(unit + panel_layout_.unit_block, shape_.hidden_size));
    for (int m = 0; m < count; ++m) {
      const std::int64_t b = first + m * rows_.stride;
      if (shape_.proj_size == 0) reset_h(resets, b, units, 1 - parity);
      reset_c(resets, b, units);
    }
  }
  // Without steps the initial states are the final ones.
  void finish_untouched() {
    for (std::int64_t i = 0; i < rows_.count(shape_.sequence.batch); ++i) {
      const std::int64_t b = rows_.row(i);
      copy_state(problem_.h0, b, output_size_, own_out(), problem_.h_n);
      copy_cell_states(b, own_hidden(), problem_.c_n);
    }
  }
  template <class To>
  void copy_cell_states(std::int64_t b, const IndexRange& units, To* to) {
    for (int s = 0; s < kCellStates; ++s)
      copy_state(problem_.c0, b * kCellStates + s, shape_.hidden_size, units, to);
  }
  // Copies units of row b of [B, size].
  template <class To>
  static void copy_state(const Storage* from, std::int64_t b, std::int64_t size,
                         const IndexRange& units, To* to) {
    for (std::int64_t i = b * size + units.begin; i < b * size + units.end; ++i)
      to[i] = To(from[i]);
  }

  Storage* h(int parity) const {
    return reinterpret_cast<Storage*>(scratch_ + layout_.h) +
           parity * shape_.sequence.batch * output_size_;
  }
  Storage* unprojected_h() const {
    return reinterpret_cast<Storage*>(scratch_ + layout_.unprojected_h);
  }
  // [B, S, H] the S states beside h of the step before, which the step replaces.
  T* c_state() const {
    if constexpr (kKeepsC) return problem_.c_n;
    if (problem_.unrounded_c != nullptr) return problem_.unrounded_c;
    return scratch_ + layout_.c;
  }

  // C += x w_ih^T for one block and `count` rows of x, `apart` rows apart.
  void add_input(std::int64_t block, std::int64_t row, std::int64_t apart, int count, T* c,
                 std::int64_t c_stride, const Prefetch& prefetch) {
    panels_.w_ih.multiply(block, count, problem_.x + row * problem_.x_stride,
                          apart * problem_.x_stride, c, c_stride, columns_x_, prefetch);
  }

  // While the index-th of `tiles` tiles is multiplied with a panel, loads its part of the panel
  // that is multiplied next.
  template <class Matrix>
  Prefetch part_of(const Matrix& matrix, std::int64_t next_block, std::int64_t index,
                   std::int64_t tiles) const {
    return plan_.prefetch ? matrix.panel_part(next_block, index, tiles) : Prefetch{};
  }

  // Computes gates_x of this rank's blocks for the steps from k on that fit in a chunk (at least
  // one). Returns the first step after them. Only this rank reads these values, so no rank waits
  // for them.
  std::int64_t project_ahead(std::int64_t k) {
    const std::int64_t end = shape_.sequence.chunk_end(k, plan_.chunk_rows);
    const RowRange chunk = shape_.sequence.rows_between(k, end);
    await_input(end);
    chunk_first_row_ = chunk.first;
    const std::int64_t last_row = chunk.first + chunk.count;
    const int height = panels_.w_ih.tile_height();
    const std::int64_t tiles = tile_count(chunk.first, last_row, height);
    for (std::int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      const std::int64_t next = std::min(block + 1, blocks_.end - 1);
      std::int64_t index = 0;
      for_each_tile(chunk.first, last_row, height, [&](std::int64_t row, int count) {
        T* c = gates_x(block, row);
        for (int m = 0; m < count; ++m) copy_row(panels_.bias(block), c + m * width_);
        add_input(block, row, 1, count, c, width_, part_of(panels_.w_ih, next, index++, tiles));
      });
    }
    return end;
  }

  // Rows of a block are contiguous, as a tile reads them.
  T* gates_x(std::int64_t block, std::int64_t row) const {
    return scratch_ + layout_.gates_x +
           (block * plan_.chunk_rows + row - chunk_first_row_) * width_;
  }
  void copy_row(const T* from, T* to) const {
    for (std::int64_t i = 0; i < width_; i += kLanes) Vec::load(from + i).store(to + i);
  }

  // Whether a step goes through the blocks from the last one to the first.
  bool goes_back(int parity) const { return (parity != 0) != team_.backwards; }

  // Calls body(block) for this rank's blocks and, if blocks are shared, for blocks that the other
  // ranks of its group have not started.
  template <class Wait, class Body>
  void for_each_block(int parity, Wait&& wait, Body&& body) {
    if (!plan_.shared) {
      for (std::int64_t i = 0; i < blocks_.size(); ++i) body(blocks_.zigzag(i, goes_back(parity)));
      return;
    }
    std::int64_t i;
    while (work_queues_.take(rank_, parity, blocks_.size(), true, i))
      body(blocks_.zigzag(i, goes_back(parity)));
    wait();  // all ranks have left the step before, so its queues can be refilled
    work_queues_.refill(rank_, 1 - parity);
    for (int next = 1; next < plan_.unit_groups; ++next) {
      const int group = (rank_ + next) % plan_.unit_groups;
      const IndexRange theirs(panel_layout_.unit_blocks, group, plan_.unit_groups);
      while (work_queues_.take(group_first_ + group, parity, theirs.size(), false, i))
        body(theirs.zigzag(i, goes_back(parity)));
    }
  }

  // resets: those before the next step.
  void step(const StepRows& at, int parity, bool others_wrote, const StepResets<Storage>& resets) {
    const std::int64_t own = rows_.count(at.rows);
    const Storage* h_before = h(parity);
    bool waited = !others_wrote;
    auto wait = [&] {
      if (!waited) barrier_.wait(rank_, group_first_, plan_.unit_groups);
      waited = true;
    };
    alignas(64) T scratch[kTileRows * kTileVectors * kLanes];
    const std::int64_t tiles = tile_count(0, own, tile_height_);
    for_each_block(parity, wait, [&](std::int64_t block) {
      const std::int64_t next = goes_back(parity) ? std::max(block - 1, blocks_.begin)
                                                  : std::min(block + 1, blocks_.end - 1);
      std::int64_t index = 0;
      for_each_tile(0, own, tile_height_, [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        T* c = scratch;
        if (plan_.input_fused) {
          for (int m = 0; m < count; ++m) copy_row(panels_.bias(block), c + m * width_);
          add_input(block, at.first + row, rows_.stride, count, c, width_,
                    part_of(panels_.w_ih, next, index, tiles));
        } else {
          c = gates_x(block, at.first + row);
        }
        wait();  // the input product needs no other rank; wait for h only afterwards
        if constexpr (Cell::kDenseRecurrence)
          panels_.w_hh.multiply(block, count, h_before + row * output_size_,
                                rows_.stride * output_size_, c, width_, columns_h_,
                                part_of(panels_.w_hh, next, index, tiles));
        pointwise(at, block, row, count, parity, c);
        if (resets.mask != nullptr) reset_block(resets, block, row, count, parity);
        ++index;
      });
    });
    wait();
    if (shape_.proj_size > 0) project_state(at, own, parity, resets);
  }

  // The cell's forward step for a tile of `count` own rows, `first` the first one, one vector of
  // units after the other.
  void pointwise(const StepRows& at, std::int64_t block, std::int64_t first, int count, int parity,
                 const T* pre_tile) {
    // Local copies: the compiler must assume that the stores below change any member.
    const std::int64_t hidden = shape_.hidden_size, unit_block = panel_layout_.unit_block;
    const std::int64_t apart = rows_.stride;  // rows from one row of the tile to the next
    const std::int64_t y_stride = problem_.y_stride, ending = at.first_ending;
    const std::int64_t tile_stride = width_;
    const std::int64_t row = at.first + first;
    const bool projected = shape_.proj_size > 0, save = problem_.saved != nullptr;
    for (int u = 0; u < plan_.unit_vectors; ++u) {
      const std::int64_t unit = block * unit_block + u * kLanes;
      const std::int64_t lanes = std::min<std::int64_t>(kLanes, hidden - unit);
      if (lanes <= 0) break;
      const T* gates = pre_tile + u * kLanes;
      const Storage* h_before = h(parity) + first * hidden + unit;  // not read with a projection
      Storage* h_after = (projected ? unprojected_h() : h(1 - parity)) + first * hidden + unit;
      T* c = kCellStates > 0 ? c_state() + first * kCellStates * hidden + unit : nullptr;
      T* saved_row = save ? problem_.saved + row * Cell::kSaved * hidden + unit : nullptr;
      Storage* y = problem_.y + row * y_stride + unit;
      Storage* h_n = problem_.h_n + first * hidden + unit;
      Vec parameters[cells::kParametersLength<Cell>];
      for (int k = 0; k < Cell::kParameters; ++k)
        parameters[k] = load_values(problem_.weights.w_unit + k * hidden + unit, lanes);
      for (int m = 0; m < count; ++m) {
        Vec pre[Cell::kPre], state[Cell::kStates] = {}, next_state[Cell::kStates];
        Vec saved[cells::kSavedLength<Cell>];
        for (int q = 0; q < Cell::kPre; ++q) pre[q] = Vec::load(gates + q * unit_block);
        if constexpr (Cell::kForwardReadsH)
          state[0] = load_values(h_before + m * apart * hidden, lanes);
        for (int s = 0; s < kCellStates; ++s)
          state[s + 1] = Vec::load(c + (m * apart * kCellStates + s) * hidden, lanes);
        Cell::forward(cells::StepInputs<Vec>{pre, state, parameters},
                      cells::StepOutputs<Vec>{saved, next_state});
        store_values(next_state[0], h_after + m * apart * hidden, lanes);
        for (int s = 0; s < kCellStates; ++s) {
          const std::int64_t place = (m * apart * kCellStates + s) * hidden;
          next_state[s + 1].store(c + place, lanes);
          if (!kKeepsC && first + m * apart >= ending)
            store_values(next_state[s + 1],
                         problem_.c_n + first * kCellStates * hidden + unit + place, lanes);
        }
        if (Cell::kSaved > 0 && save)
          for (int s = 0; s < Cell::kSaved; ++s)
            saved[s].store(saved_row + (m * apart * Cell::kSaved + s) * hidden, lanes);
        if (!projected) {
          store_values(next_state[0], y + m * apart * y_stride, lanes);
          if (first + m * apart >= ending)
            store_values(next_state[0], h_n + m * apart * hidden, lanes);
        }
        gates += tile_stride;
      }
    }
  }

  // Stores h' in y, and in h_n if the sequence ends at this step.
  void store_output(const StepRows& at, std::int64_t b, std::int64_t unit, std::int64_t lanes,
                    Vec h_new) {
    store_values(h_new, problem_.y + (at.first + b) * problem_.y_stride + unit, lanes);
    if (at.ends(b)) store_values(h_new, problem_.h_n + b * output_size_ + unit, lanes);
  }

  // h' = m w_hr^T, m the unprojected h, after all ranks of the group have computed m.
  void project_state(const StepRows& at, std::int64_t own, int parity,
                     const StepResets<Storage>& resets) {
    barrier_.arrive(rank_);
    barrier_.wait(rank_, group_first_, plan_.unit_groups);
    alignas(64) T scratch[kTileRows * kTileVectors * kLanes];
    const std::int64_t hidden = shape_.hidden_size;
    for (std::int64_t block = proj_blocks_.begin; block < proj_blocks_.end; ++block) {
      for_each_tile(0, own, panels_.w_hr.tile_height(), [&](std::int64_t first, int count) {
        const std::int64_t row = rows_.row(first);
        for (std::int64_t i = 0; i < count * panel_layout_.proj_block; ++i) scratch[i] = T(0);
        panels_.w_hr.multiply(block, count, unprojected_h() + row * hidden, rows_.stride * hidden,
                              scratch, panel_layout_.proj_block, columns_p_);
        for (int m = 0; m < count; ++m) {
          for (int u = 0; u < plan_.back_vectors; ++u) {
            const std::int64_t unit = block * panel_layout_.proj_block + u * kLanes;
            const std::int64_t lanes = std::min<std::int64_t>(kLanes, output_size_ - unit);
            if (lanes <= 0) break;
            const Vec h_new = Vec::load(scratch + m * panel_layout_.proj_block + u * kLanes);
            const std::int64_t b = row + m * rows_.stride;
            store_values(h_new, h(1 - parity) + b * output_size_ + unit, lanes);
            store_output(at, b, unit, lanes, h_new);
            reset_h(resets, b, IndexRange(unit, unit + lanes), 1 - parity);
          }
        }
      });
    }
  }

  const LayerForward<Storage, T>& problem_;
  const LayerShape& shape_;
  const Plan& plan_;
  const Panels panels_;
  const PanelLayout& panel_layout_;
  const ForwardLayout& layout_;
  T* const scratch_;
  Team& team_;
  Barrier& barrier_;
  WorkQueues& work_queues_;
  Team* const below_;
  const int rank_, group_first_;
  const OwnRows rows_;
  const IndexRange blocks_, proj_blocks_;
  const std::int64_t output_size_;  // R
  const std::int64_t width_;        // Q*U: a row of a tile
  const Columns columns_x_, columns_h_, columns_p_;
  const int tile_height_;  // largest number of rows for the products with w_ih and w_hh
  std::int64_t chunk_first_row_ = 0;
};

FASTRNN_KERNELS_END
