// The persistent schedule: one launch runs all steps. Block (unit block, row group, direction)
// keeps the recurrent weights of `units` hidden units, all gates, in its shared memory:
//
//                      unit blocks: 0      1      2    ...         all blocks are resident at once,
//        row tiles 0      |      |      |      |  row group 0      so there may not be more of them
//        (of 16    1      |      |      |      |  row group 1      than multiprocessors
//        rows)     2      |      |      |      |  row group 0
//
// This header has the rules; persistent.h has what runs.
#pragma once

#include <type_traits>

#include "cuda/schedules/schedule.h"

namespace fastrnn::cuda {

inline constexpr int kWalkThreads = 256, kWarp = 32;
inline constexpr int kWalkWarps = kWalkThreads / kWarp;
inline constexpr int kRowTile = 16;     // rows of a tensor core's product
inline constexpr int kColumnTile = 8;   // and columns
inline constexpr int kGroupBytes = 64;  // of an operand's row: 4 lanes of a warp load 16 bytes each
inline constexpr int kDotProductRows = 4;  // largest batch for which tensor cores would mostly idle
inline constexpr int kUnitChoices[] = {8, 16};  // units of a block

// The index of a warp's partial sum in shared memory: [row, column], with the columns of a row
// permuted so that a warp's accesses (4 rows x 8 columns, 2 rows x 16 columns) hit 32 banks.
FASTRNN_HD constexpr int partial_at(int column_tiles, int row, int column) {
  const int exchanged = column_tiles % 4 == 0   ? (row & 1) * 16 + (row & 2) * 4
                        : column_tiles % 2 == 0 ? (row & 2) * 4
                                                : 0;
  return row * column_tiles * kColumnTile + (column ^ exchanged);
}

// The cells whose kernels are also compiled with resets (resets.h), with and without a projection.
// Half types then run on tensor cores only. These are a fifth of all kernels; with all cells and
// both ways to multiply they would be two fifths.
constexpr bool has_reset_kernels(CellKind cell) {
  return cell == CellKind::kRnnTanh || cell == CellKind::kGru || cell == CellKind::kLstm;
}

// The cells that have kernels here. A cell has dozens of them, for each type, way to multiply and
// number of units, so that most cells that torch lacks run stepwise only.
constexpr bool has_persistent_kernels(CellKind cell) {
  return cell_info(cell).dense && cell != CellKind::kLiGru && cell != CellKind::kJanet &&
         cell != CellKind::kFastGrnn;
}

inline Tiling make_tiling(const Request& request) {
  const LayerShape& shape = request.shape;
  const Chip& chip = request.chip;
  const CellInfo& cell = cell_info(shape.cell);
  const int gates = cell.gates;
  constexpr std::int64_t kMostRows = std::int64_t(1) << 24;
  if (request.arithmetic == Arithmetic::kFloat64 || chip.major < 8 || shape.sequence.steps == 0 ||
      !has_persistent_kernels(shape.cell) || shape.hidden_size == 0 || shape.sequence.batch == 0 ||
      shape.sequence.batch > kMostRows)
    return {};
  if (request.has_resets && !has_reset_kernels(shape.cell)) return {};
  // The kernel with a projection has no register left for the gradients of c of every step.
  if (request.has_step_gradients && shape.proj_size > 0) return {};
  const bool forward = request.pass == Pass::kForward;
  const auto groups_of = [&](std::int64_t values) {
    return (values * element_bytes(request.arithmetic) + kGroupBytes - 1) / kGroupBytes;
  };
  // the weights of a product in shared memory and the partial sums of the warps
  const auto bytes_of = [](std::int64_t groups, int column_tiles) {
    return column_tiles * kColumnTile * (groups * kGroupBytes + kWalkWarps * kRowTile * 4);
  };
  const bool fills_tensor_cores = shape.sequence.batch > kDotProductRows ||
                                  (request.has_resets && element_bytes(request.arithmetic) == 2);
  Tiling best;
  for (const int units : kUnitChoices) {
    Tiling tiling;
    const std::int64_t unit_blocks = (shape.hidden_size + units - 1) / units;
    if (unit_blocks * request.directions > chip.multiprocessors) continue;
    tiling.tensor_cores = request.arithmetic != Arithmetic::kFloat32 && fills_tensor_cores;
    tiling.units = units;
    tiling.unit_blocks = int(unit_blocks);
    tiling.output_blocks = int((shape.output_size() + units - 1) / units);
    tiling.column_tiles = units / kColumnTile * (forward ? gates : 1);
    tiling.groups = groups_of(forward ? shape.output_size() : gates * shape.hidden_size);
    tiling.shared_bytes = bytes_of(tiling.groups, tiling.column_tiles);
    if (shape.proj_size > 0) {
      tiling.projection_groups = groups_of(forward ? shape.hidden_size : shape.proj_size);
      tiling.shared_bytes += bytes_of(tiling.projection_groups, units / kColumnTile);
    }
    if (tiling.shared_bytes > chip.shared_bytes) continue;
    tiling.row_tiles = int((shape.sequence.batch - 1) / kRowTile + 1);
    const int most_groups = chip.multiprocessors / (tiling.unit_blocks * request.directions);
    tiling.tiles_per_block = (tiling.row_tiles - 1) / most_groups + 1;
    tiling.row_groups = (tiling.row_tiles - 1) / tiling.tiles_per_block + 1;
    tiling.blocks = tiling.unit_blocks * tiling.row_groups * request.directions;
    // A block walks its tiles one after the other, so fewer tiles are better. For the same number
    // of tiles, fewer units per block put more blocks to work.
    if (best.blocks == 0 || tiling.tiles_per_block < best.tiles_per_block) best = tiling;
  }
  return best;
}

// The fewest steps that repay the launch and its preparation.
inline constexpr std::int64_t kFewestSteps = 4;
// The most row tiles per block; with more, one large cuBLAS product is faster than one tile after
// the other. Measured on an H200 for a step of 1024 LSTM units: 2 us per tile on tensor cores, 13
// us per tile in dot products, 17 to 40 us in cuBLAS.
inline constexpr int kMostTiles = 4, kMostDotProductTiles = 2;

// Memory for gates_x, which should not grow with T. The launch of a chunk reads ahead, so large
// chunks are better than chunks that fit into the L2 cache.
inline constexpr std::int64_t kPersistentChunkBytes = std::int64_t(256) << 20;

struct Persistent {
  static Plan plan(const Request& request) {
    return {nullptr, make_tiling(request),
            rows_of_gates(request, kPersistentChunkBytes / request.directions), request.has_resets};
  }
  static bool fits(const Request&, const Plan& plan) { return plan.tiling.blocks > 0; }
  static bool pays(const Request& request, const Plan& plan) {
    return request.shape.sequence.steps >= kFewestSteps &&
           plan.tiling.tiles_per_block <=
               (plan.tiling.tensor_cores ? kMostTiles : kMostDotProductTiles);
  }

  // Defined in persistent.h.
  template <class S>
  static constexpr bool kRuns = !std::is_same_v<S, double>;
  template <class S>
  static std::size_t workspace_bytes(const LayerShape& shape, int directions, const Plan& plan,
                                     Pass pass);
  template <class S, class Machine>
  static bool can_launch(const Request& request, const Plan& plan, Machine& machine);
  template <class S, class Machine>
  static void forward(const Forward<S>* problems, int directions, const Plan& plan, void* workspace,
                      Machine& machine);
  template <class S, class Machine>
  static void backward(const Backward<S>* problems, int directions, const Plan& plan,
                       void* workspace, Machine& machine);
};

}  // namespace fastrnn::cuda
