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

#include "../problem.h"

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

// Floats between the rows of a warp's partial sums: rows that a warp writes or reads at a time
// should start 8 banks apart.
FASTRNN_HD constexpr int partial_stride(int column_tiles) {
  return column_tiles * kColumnTile + (column_tiles % 2 == 0 ? kColumnTile : 0);
}

// How the persistent schedule cuts a layer up.
struct Tiling {
  bool fits = false;
  bool tensor_cores = false;  // or dot products on the CUDA cores
  int units = 0;              // hidden units of a block
  int unit_blocks = 0;
  int row_tiles = 0;
  int row_groups = 0;       // groups of blocks that share the row tiles
  int column_tiles = 0;     // tiles of a block's columns: gates * units forward, units backward
  std::int64_t groups = 0;  // of kGroupBytes in a row of the recurrent product
  std::int64_t shared_bytes = 0;  // of a block
  int blocks = 0;

  int tiles_a_block() const { return (row_tiles + row_groups - 1) / row_groups; }
};

inline Tiling make_tiling(const Request& request) {
  const LayerShape& shape = request.shape;
  const int gates = cell_info(shape.cell).gates;
  Tiling tiling;
  if (request.arithmetic == Arithmetic::kFloat64 || request.chip.major < 8 || shape.proj_size > 0 ||
      shape.batch == 0 || shape.steps == 0)
    return tiling;
  tiling.tensor_cores = request.arithmetic != Arithmetic::kFloat32 && shape.batch > kFewRows;
  tiling.row_tiles = int(std::min<std::int64_t>((shape.batch - 1) / kRowTile + 1, 1 << 24));
  const bool forward = request.pass == Pass::kForward;
  const std::int64_t row_bytes =
      shape.hidden_size * (forward ? 1 : gates) * element_bytes(request.arithmetic);
  tiling.groups = (row_bytes + kGroupBytes - 1) / kGroupBytes;
  for (const int units : kUnitChoices) {
    const std::int64_t unit_blocks = (shape.hidden_size + units - 1) / units;
    if (unit_blocks * request.directions > request.chip.multiprocessors) continue;
    tiling.units = units;
    tiling.unit_blocks = int(unit_blocks);
    tiling.column_tiles = units / kColumnTile * (forward ? gates : 1);
    tiling.shared_bytes =
        tiling.groups * tiling.column_tiles * kColumnTile * kGroupBytes +
        std::int64_t(kWalkWarps) * kRowTile * partial_stride(tiling.column_tiles) * 4;
    if (tiling.shared_bytes > request.chip.shared_bytes) continue;
    tiling.row_groups = std::min(
        tiling.row_tiles, request.chip.multiprocessors / (tiling.unit_blocks * request.directions));
    tiling.blocks = tiling.unit_blocks * tiling.row_groups * request.directions;
    tiling.fits = true;
    return tiling;
  }
  return tiling;
}

// A launch and its preparation pay from some steps on; and blocks that walk very many row tiles
// read their weights from shared memory for each, where a large product of cuBLAS reads them once.
// (Both by reckoning, not measured on a GPU yet.)
inline constexpr std::int64_t kFewSteps = 4;
inline constexpr int kManyTiles = 16;

inline bool fits_persistent(const Request& request, const Tiling& tiling) {
  if (!tiling.fits) return false;
  return request.choice == Choice::kPersistent ||
         (request.shape.steps >= kFewSteps && tiling.tiles_a_block() <= kManyTiles);
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
