// Which schedule walks a layer through time on a GPU, and in what portions. Plain C++: the rules
// can be asked where there is no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace fastrnn::cuda {

enum class Schedule : int { kStepwise };

// The table, best first: the first row that fits a shape walks it.
struct ScheduleInfo {
  Schedule schedule;
  const char* name;
  bool (*fits)(const LayerShape& shape, int element_bytes);  // bytes of a value of the tensors
};

inline bool fits_always(const LayerShape&, int) { return true; }

inline constexpr ScheduleInfo kSchedules[] = {
    {Schedule::kStepwise, "stepwise", fits_always},
};

struct Plan {
  const ScheduleInfo* schedule;
  std::int64_t chunk_rows;  // rows of x that are multiplied by w_ih at a time, where steps allow
};

// gates_x [rows, G*H] of a chunk, written by one product and read step by step, should still lie in
// the L2 cache (40 MB on an A100, 50 MB on an H100) when its step comes, and the memory for it
// should not grow with T.
inline constexpr std::int64_t kChunkBytes = std::int64_t(24) << 20;

inline Plan make_plan(const LayerShape& shape, int element_bytes) {
  const ScheduleInfo* chosen = kSchedules;
  while (!chosen->fits(shape, element_bytes)) ++chosen;  // the last row fits every shape
  const std::int64_t accumulate_bytes = std::max(element_bytes, 4);
  const std::int64_t row_bytes = cell_info(shape.cell).gates * shape.hidden_size * accumulate_bytes;
  const std::int64_t rows = kChunkBytes / std::max<std::int64_t>(row_bytes, 1);
  return {chosen, std::max<std::int64_t>(rows, 1)};
}

}  // namespace fastrnn::cuda
