// What a schedule is given and what it returns. Plain C++, so that a plan can be made where there
// is no CUDA.
//
// A schedule is a way to run the time loop of a layer on a GPU. It is a struct of static functions
// and a row of the table in cuda/plan.h:
//
//   Plan plan(request)             how it would divide the layer
//   bool fits(request, plan)       whether it can run the layer so
//   bool pays(request, plan)       whether it should, if the caller asks for no schedule
//   bool kRuns<S>                  whether it has kernels for tensors of type S
//
// and, called through schedules/runner.h, for tensors of type S on a machine (a GPU, or the host in
// the tests):
//
//   std::size_t workspace_bytes<S>(shape, directions, plan, pass)
//   bool can_launch<S>(request, plan, machine)    whether this machine can run the plan
//   void forward<S>(problems, directions, plan, workspace, machine)
//   void backward<S>(problems, directions, plan, workspace, machine)
//
// `problems` has one problem per direction, of the same shape except for `reverse`.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "cuda/math/half.h"
#include "problem/layer.h"

namespace fastrnn::cuda {

// Pointers of problems are device pointers. S: Float16, BFloat16, float or double.
template <class S>
using Forward = LayerForward<S, Accumulate<S>>;
template <class S>
using Backward = LayerBackward<S, Accumulate<S>, S>;

enum class Schedule : int;  // the rows of the table in cuda/plan.h
enum class Pass : int { kForward, kBackward };

// The schedule that the caller asks for; none: the first one that fits and pays.
using Choice = std::optional<Schedule>;

// The type of the factors of products. Sums are float64 for float64, otherwise float32.
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

// The properties of a GPU that plans depend on.
struct Chip {
  int major;  // of the compute capability
  int multiprocessors;
  int shared_bytes;  // largest shared memory of a block
};
inline constexpr Chip kH100 = {9, 132, 232448};

struct Request {
  LayerShape shape;
  int directions;
  Pass pass;
  Arithmetic arithmetic;
  Chip chip;
  Choice choice = std::nullopt;
  bool has_step_gradients = false;  // d_c_steps
  bool has_resets = false;
};

// How the persistent schedule divides a layer among blocks.
struct Tiling {
  bool tensor_cores = false;  // or dot products on the CUDA cores
  int units = 0;              // hidden units of a block
  int unit_blocks = 0;
  int output_blocks = 0;  // that own some of the R outputs: all of them without a projection
  int row_tiles = 0;
  int row_groups = 0;       // groups of blocks that share the row tiles
  int column_tiles = 0;     // tiles of a block's columns: gates * units forward, units backward
  std::int64_t groups = 0;  // of kGroupBytes in a row of the recurrent product
  std::int64_t projection_groups = 0;  // and in one of the product with w_hr, or its transpose
  std::int64_t shared_bytes = 0;       // of a block
  int tiles_per_block = 0;             // at most
  int blocks = 0;                      // 0: it does not fit
};

struct ScheduleInfo;

struct Plan {
  const ScheduleInfo* schedule;
  Tiling tiling;            // empty unless the schedule is persistent
  std::int64_t chunk_rows;  // rows of x per product with w_ih, but at least those of one step
  bool has_resets = false;
};

// The resets before one step. Without a step all pointers are null.
template <class S>
struct ResetsOfStep {
  std::int64_t step = 0;               // t
  const std::uint8_t* mask = nullptr;  // [B]
  const S *h = nullptr, *c = nullptr;  // [B, R], [B, C*H], or null: zeros

  ResetsOfStep() = default;
  FASTRNN_HD ResetsOfStep(const Resets<S>& resets, std::int64_t t, std::int64_t first_row)
      : step(t),
        mask(resets.mask + first_row),
        h(resets.h == nullptr ? nullptr : resets.h + t * resets.h_stride),
        c(resets.c == nullptr ? nullptr : resets.c + t * resets.c_stride) {}
  ResetsOfStep(const Resets<S>& resets, const StepRows& at)  // the batch is padded
      : ResetsOfStep(resets, at.rows == 0 ? 0 : at.first / at.rows, at.first) {}
};

// Rows whose gates_x [rows, G*H] fit into `bytes`, at least 1.
inline std::int64_t rows_of_gates(const Request& request, std::int64_t bytes) {
  const LayerShape& shape = request.shape;
  const std::int64_t accumulate_bytes = std::max(element_bytes(request.arithmetic), 4);
  const std::int64_t row_bytes = cell_info(shape.cell).gates * shape.hidden_size * accumulate_bytes;
  return std::max<std::int64_t>(bytes / std::max<std::int64_t>(row_bytes, 1), 1);
}

}  // namespace fastrnn::cuda
