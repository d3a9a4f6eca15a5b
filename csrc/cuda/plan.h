// Which schedule walks a layer through time on a GPU, and in what portions. Plain C++: the rules
// can be asked where there is no CUDA.
//
//   persistent   one launch walks all steps; block (unit block, row group, direction) keeps the
//                recurrent weights of `units` hidden units, all gates, in its shared memory:
//
//                      unit blocks: 0      1      2    ...         all blocks are resident at once,
//        row tiles 0      |      |      |      |  row group 0      so there may not be more of them
//        (of 16    1      |      |      |      |  row group 1      than multiprocessors
//        rows)     2      |      |      |      |  row group 0
//
//   stepwise     a cuBLAS product and a pointwise kernel a step; fits everything
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "problem/layer.h"

namespace fastrnn::cuda {

enum class Schedule : int { kPersistent, kStepwise };
enum class Pass : int { kForward, kBackward };

// What values are multiplied as. Sums are float32, for float64 float64.
enum class Arithmetic : int { kFloat16, kBFloat16, kTf32, kFloat32, kFloat64 };

inline int element_bytes(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
    case Arithmetic::kBFloat16:
      return 2;
    case Arithmetic::kFloat64:
      return 8;
    default:
      return 4;
  }
}

// What the rules have to know of a GPU.
struct Chip {
  int major;  // of the compute capability
  int multiprocessors;
  int shared_bytes;  // that a block may have
};
inline constexpr Chip kH100 = {9, 132, 232448};

// What the caller asks for, beside the shape.
enum class Choice : int { kAutomatic, kPersistent, kStepwise };

// The name of one, as FASTRNN_SCHEDULE has it; null and "" are automatic. A persistent walk is
// taken wherever the weights fit on the chip; what does not fit goes stepwise.
inline Choice choice_named(const char* name) {
  const std::string given = name == nullptr ? "" : name;
  if (given.empty() || given == "auto") return Choice::kAutomatic;
  if (given == "persistent") return Choice::kPersistent;
  if (given == "stepwise") return Choice::kStepwise;
  throw std::runtime_error("fastrnn: FASTRNN_SCHEDULE must be auto, persistent or stepwise, got '" +
                           given + "'.");
}

struct Request {
  LayerShape shape;
  int directions;
  Pass pass;
  Arithmetic arithmetic;
  Chip chip;
  Choice choice = Choice::kAutomatic;
};

inline constexpr int kWalkThreads = 256, kWarp = 32;
inline constexpr int kWalkWarps = kWalkThreads / kWarp;
inline constexpr int kRowTile = 16;     // rows of a tensor core's product
inline constexpr int kColumnTile = 8;   // and columns
inline constexpr int kGroupBytes = 64;  // of a row that a step of the product takes: 4 x 16 bytes
inline constexpr int kFewRows = 4;      // up to which the tensor cores would mostly idle
inline constexpr int kUnitChoices[] = {8, 16};  // units of a block

// Where a warp's partial sums lie: [row, column], a row's columns exchanged so that what a warp
// writes or reads at a time (4 rows x 8 columns, 2 rows x 16 columns) lies in 32 banks.
FASTRNN_HD constexpr int partial_at(int column_tiles, int row, int column) {
  const int exchanged = column_tiles % 4 == 0   ? (row & 1) * 16 + (row & 2) * 4
                        : column_tiles % 2 == 0 ? (row & 2) * 4
                                                : 0;
  return row * column_tiles * kColumnTile + (column ^ exchanged);
}

// How the persistent schedule cuts a layer up.
struct Tiling {
  bool tensor_cores = false;  // or dot products on the CUDA cores
  int units = 0;              // hidden units of a block
  int unit_blocks = 0;
  int output_blocks = 0;  // that own some of the R outputs: all of them without a projection
  int row_tiles = 0;
  int row_groups = 0;       // groups of blocks that share the row tiles
  int column_tiles = 0;     // tiles of a block's columns: gates * units forward, units backward
  std::int64_t groups = 0;  // of kGroupBytes in a row of the recurrent product
  std::int64_t second_groups = 0;  // and in one of the product with w_hr, or its transpose
  std::int64_t shared_bytes = 0;   // of a block
  int tiles_a_block = 0;           // at most
  int blocks = 0;                  // 0: it does not fit
};

inline Tiling make_tiling(const Request& request) {
  const LayerShape& shape = request.shape;
  const Chip& chip = request.chip;
  const int gates = cell_info(shape.cell).gates;
  constexpr std::int64_t kMostRows = std::int64_t(1) << 24;
  if (request.arithmetic == Arithmetic::kFloat64 || chip.major < 8 || shape.sequence.steps == 0 ||
      shape.hidden_size == 0 || shape.sequence.batch == 0 || shape.sequence.batch > kMostRows)
    return {};
  const bool forward = request.pass == Pass::kForward;
  const auto groups_of = [&](std::int64_t values) {
    return (values * element_bytes(request.arithmetic) + kGroupBytes - 1) / kGroupBytes;
  };
  // a product's weights in shared memory, and the partial sums of its warps
  const auto bytes_of = [](std::int64_t groups, int column_tiles) {
    return column_tiles * kColumnTile * (groups * kGroupBytes + kWalkWarps * kRowTile * 4);
  };
  Tiling best;
  for (const int units : kUnitChoices) {
    Tiling tiling;
    const std::int64_t unit_blocks = (shape.hidden_size + units - 1) / units;
    if (unit_blocks * request.directions > chip.multiprocessors) continue;
    tiling.tensor_cores =
        request.arithmetic != Arithmetic::kFloat32 && shape.sequence.batch > kFewRows;
    tiling.units = units;
    tiling.unit_blocks = int(unit_blocks);
    tiling.output_blocks = int((shape.output_size() + units - 1) / units);
    tiling.column_tiles = units / kColumnTile * (forward ? gates : 1);
    tiling.groups = groups_of(forward ? shape.output_size() : gates * shape.hidden_size);
    tiling.shared_bytes = bytes_of(tiling.groups, tiling.column_tiles);
    if (shape.proj_size > 0) {
      tiling.second_groups = groups_of(forward ? shape.hidden_size : shape.proj_size);
      tiling.shared_bytes += bytes_of(tiling.second_groups, units / kColumnTile);
    }
    if (tiling.shared_bytes > chip.shared_bytes) continue;
    tiling.row_tiles = int((shape.sequence.batch - 1) / kRowTile + 1);
    const int most_groups = chip.multiprocessors / (tiling.unit_blocks * request.directions);
    tiling.tiles_a_block = (tiling.row_tiles - 1) / most_groups + 1;
    tiling.row_groups = (tiling.row_tiles - 1) / tiling.tiles_a_block + 1;
    tiling.blocks = tiling.unit_blocks * tiling.row_groups * request.directions;
    // A block walks its tiles one after the other: the fewer the better. Where that is the same,
    // fewer units a block are more blocks at work.
    if (best.blocks == 0 || tiling.tiles_a_block < best.tiles_a_block) best = tiling;
  }
  return best;
}

// A launch and its preparation pay from some steps on; and with many row tiles a block, a large
// product of cuBLAS is faster than one tile after the other. (On an H200 a step of 1024 LSTM units
// took 2 us a tile on tensor cores, 13 us in dot products, and 17 to 40 us in cuBLAS.)
inline constexpr std::int64_t kFewSteps = 4;
inline constexpr int kManyTiles = 4, kManyTilesOfDots = 2;

inline bool fits_persistent(const Request& request, const Tiling& tiling) {
  if (tiling.blocks == 0) return false;
  return request.choice == Choice::kPersistent ||
         (request.shape.sequence.steps >= kFewSteps &&
          tiling.tiles_a_block <= (tiling.tensor_cores ? kManyTiles : kManyTilesOfDots));
}
inline bool fits_always(const Request&, const Tiling&) { return true; }

// The table, best first: the first row that fits a request walks it.
struct ScheduleInfo {
  Schedule schedule;
  const char* name;
  bool (*fits)(const Request& request, const Tiling& tiling);
};
inline constexpr ScheduleInfo kSchedules[] = {
    {Schedule::kPersistent, "persistent", fits_persistent},
    {Schedule::kStepwise, "stepwise", fits_always},
};

struct Plan {
  const ScheduleInfo* schedule;
  Tiling tiling;            // where the schedule is persistent
  std::int64_t chunk_rows;  // rows of x that are multiplied by w_ih at a time, where steps allow
};

// gates_x [rows, G*H] of a chunk is written by one product and read step by step. The memory for it
// should not grow with T; stepwise it should still lie in the L2 cache (40 MB on an A100, 50 MB on
// an H100) when its step comes, while a persistent walk reads ahead and would rather not stop.
inline constexpr std::int64_t kStepwiseChunkBytes = std::int64_t(24) << 20;
inline constexpr std::int64_t kPersistentChunkBytes = std::int64_t(256) << 20;

inline Plan plan_with(const ScheduleInfo& schedule, const Request& request, const Tiling& tiling) {
  const LayerShape& shape = request.shape;
  const std::int64_t accumulate_bytes = std::max(element_bytes(request.arithmetic), 4);
  const std::int64_t row_bytes = cell_info(shape.cell).gates * shape.hidden_size * accumulate_bytes;
  const std::int64_t chunk_bytes = schedule.schedule == Schedule::kPersistent
                                       ? kPersistentChunkBytes / request.directions
                                       : kStepwiseChunkBytes;
  const std::int64_t rows = chunk_bytes / std::max<std::int64_t>(row_bytes, 1);
  return {&schedule, tiling, std::max<std::int64_t>(rows, 1)};
}

inline Plan make_plan(const Request& request) {
  const Tiling tiling = make_tiling(request);
  const ScheduleInfo* chosen = kSchedules;
  if (request.choice == Choice::kStepwise) chosen = &kSchedules[int(Schedule::kStepwise)];
  while (!chosen->fits(request, tiling)) ++chosen;  // the last row fits every request
  return plan_with(*chosen, request, tiling);
}
// The same where the blocks of a persistent launch turn out not to be resident together.
inline Plan stepwise_plan(const Request& request) {
  return plan_with(kSchedules[int(Schedule::kStepwise)], request, Tiling{});
}

}  // namespace fastrnn::cuda
