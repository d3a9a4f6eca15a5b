// Turns the shape of a layer into a plan.
#include "cpu/plan.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/runtime/cache.h"
#include "problem/int8_layer.h"

namespace fastrnn::cpu {
namespace {

// Number of weights that each step reads. Backward leaves those of the input to the products after
// the loop.
std::int64_t step_weights(const LayerShape& shape, Pass pass) {
  const CellInfo& cell = cell_info(shape.cell);
  const std::int64_t inputs = pass == Pass::kForward ? shape.input_size : 0;
  const std::int64_t outputs = cell.dense ? shape.output_size() : 0;
  return cell.gates * shape.hidden_size * (inputs + outputs) + shape.proj_size * shape.hidden_size;
}

}  // namespace

std::int64_t call_work(const LayerShape& shape, Pass pass) {
  const std::int64_t rows = std::max<std::int64_t>(shape.sequence.steps * shape.sequence.batch, 1);
  if (pass != Pass::kGradients) return rows * (step_weights(shape, pass) + 1);
  const CellInfo& cell = cell_info(shape.cell);
  return rows * cell.gates * shape.hidden_size *
         (2 * shape.input_size + (cell.dense ? shape.output_size() : 0));
}

// Each thread needs enough work per step, or per call in the products after the loop.
int pick_threads(const LayerShape& shape, Pass pass, int max_threads) {
  const std::int64_t work = call_work(shape, pass);
  if (work < kMinCallWork) return 1;
  const std::int64_t share =
      pass == Pass::kGradients
          ? work / kMinCallWork
          : work / std::max<std::int64_t>(shape.sequence.steps, 1) / kMinStepWork;
  return int(std::clamp<std::int64_t>(share, 1, std::min(max_threads, kMaxTeam)));
}

// Splits the batch between the threads if each gets enough rows to share a loaded weight: the
// threads then never wait for each other. Otherwise splits the units, with a barrier per step: each
// thread reads fewer weights, but in backward it reads all of d_pre from the others, which makes
// backward 20-50% slower.
int pick_row_groups(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                    int threads) {
  const std::int64_t vectors = divide_up(shape.hidden_size, isa.vector_bytes / element_bytes);
  const std::int64_t rows = shape.sequence.batch / threads;
  if (rows >= 1 && vectors < threads) return threads;  // too few units to split
  const std::int64_t bytes = step_weights(shape, pass) * element_bytes;
  // Before a slow L3 no number of rows pays for reading all weights from there. (Backward reads
  // them in parts that all rows use.)
  if (const std::int64_t cache = slow_cache_boundary(); cache > 0 && pass == Pass::kForward)
    return rows >= kMinRowsPerThreadCached && bytes <= cache ? threads : 1;
  const bool cached = bytes <= kPrivateCacheBytes;
  const bool cheap = pass == Pass::kBackward || cached;
  return rows >= (cheap ? kMinRowsPerThreadCached : kMinRowsPerThread) ? threads : 1;
}

// Vectors of units per block: the widest block (fewest loads per multiply-add) whose load balance
// between the groups is within an eighth of the best one.
int pick_unit_vectors(std::int64_t units, int lanes, int gates, int groups) {
  const std::int64_t vectors = std::max<std::int64_t>(divide_up(units, lanes), 1);
  auto heaviest = [&](int width) {  // vectors of the most loaded group
    const std::int64_t most = divide_up(divide_up(vectors, width), groups) * width;
    return gates > 1 ? most : std::min(most, vectors);  // with one gate a last block may be narrow
  };
  int best = 1;
  for (int width : {2, 4})
    if (width * gates <= 4 && heaviest(width) * 8 <= heaviest(1) * 9) best = width;
  return best;
}

// Runs two directions at the same time, each on half of the threads, if one alone would split its
// units: fewer ranks, or none, then wait for each other. Not if the weights no longer fit in the
// private caches, which costs more than the barriers.
int pick_together(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                  int max_threads, int directions) {
  if (directions < 2 || pass == Pass::kGradients) return 1;
  const int threads = pick_threads(shape, pass, max_threads / 2);
  if (max_threads < 2 || step_weights(shape, pass) * element_bytes > threads * kPrivateCacheBytes)
    return 1;
  const int all = pick_threads(shape, pass, max_threads);
  return pick_row_groups(shape, pass, isa, element_bytes, all) < all || all == 1 ? 2 : 1;
}

// Reading a panel is faster than reading rows of weights, but packing it takes time.
bool pick_packed(const LayerShape& shape, Pass pass) {
  using Rule = PackingRule;
  const std::int64_t steps = shape.sequence.steps, batch = shape.sequence.batch;
  if (pass == Pass::kBackward) return steps >= Rule::kBackwardSteps;
  const std::int64_t units_per_row = steps == 1                      ? Rule::kUnitsPerRowOneStep
                                     : batch >= Rule::kManySequences ? Rule::kUnitsPerRowBatched
                                                                     : Rule::kUnitsPerRow;
  const std::int64_t units = std::min(shape.output_size(), Rule::kMaxUnits);
  // Intel CPUs read rows faster: one sequence must be longer to pay for packing several gates.
  const bool reads_rows_fast = std::strcmp(cpu_vendor(), "intel") == 0;
  if (reads_rows_fast && batch == 1 && steps > 1 && cell_info(shape.cell).gates > 1 &&
      steps * Rule::kSquaredUnitsPerStep < units * units)
    return false;
  return steps * batch * units_per_row >= units;
}

// float16 is faster for one sequence, whose steps wait for w_hh. Each row of a larger batch would
// convert the same weights again.
WeightFormat pick_recurrent_format(const LayerShape& shape, Pass pass, const Isa& isa,
                                   int element_bytes, WeightFormat allowed) {
  const std::int64_t values = cell_info(shape.cell).gates * shape.hidden_size * shape.output_size();
  const CellInfo& cell = cell_info(shape.cell);
  const bool has_format = cell.reduced || is_defined_at_run_time(cell);
  const bool pays = has_format && shape.sequence.batch == 1 &&
                    shape.sequence.steps >= kMinHalfSteps && values >= kMinHalfWeights;
  return pass == Pass::kForward && pays && isa.has_recurrent_format(allowed, element_bytes)
             ? allowed
             : WeightFormat::kNative;
}

// The step computes x_t w_ih^T in its own tile if enough rows share the weights and the weights
// stay cached.
bool pick_input_fused(const LayerShape& shape, int element_bytes, int row_groups, int unit_groups) {
  // Rows of several steps are not contiguous for a part of the batch.
  if (row_groups > 1) return true;
  if (shape.sequence.batch < kFusedBatch) return false;
  const std::int64_t bytes = step_weights(shape, Pass::kForward) * element_bytes;
  if (const std::int64_t cache = slow_cache_boundary(); cache > 0) {
    const std::int64_t share = bytes / unit_groups;
    return share <= cache ||
           (shape.sequence.batch >= kFusedSlowBatch && 2 * share <= kFusedSlowHalfCaches * cache);
  }
  return bytes <= kSharedCacheBytes;
}

// About a hundred rows reuse each loaded weight well, and their gates stay in the cache.
std::int64_t pick_chunk_rows(const LayerShape& shape) {
  const std::int64_t batch = shape.sequence.batch;
  const std::int64_t rows = slow_cache_boundary() > 0 ? kSlowChunkRows
                            : batch > 16              ? 4 * batch
                                                      : 96;
  return std::max(batch, rows);
}

// Where the panels of a rank come from a slow L3 in each step, the next one is loaded while this
// one is used.
bool pick_prefetch(const LayerShape& shape, Pass pass, const Plan& plan) {
  const std::int64_t cache = slow_cache_boundary();
  return cache > 0 && plan.packed && plan.recurrent_format == WeightFormat::kNative &&
         step_weights(shape, pass) * plan.element_bytes / plan.unit_groups > cache;
}

// Blocks that fill the private cache are added to the result least often. This pays where the
// result comes from a slow L3 each time; elsewhere small blocks need less memory.
std::int64_t pick_gradient_depth(const LayerShape& shape, int element_bytes) {
  const std::int64_t cache = slow_cache_boundary();
  if (step_weights(shape, Pass::kForward) * element_bytes <= cache) return 256;
  const std::int64_t rows = cache / element_bytes / 512;
  return rows >= 1024 ? 1024 : rows >= 512 ? 512 : 256;
}

// Runs a layer and the one above it at the same time, each on half of the threads, for the same
// reason as two directions: both plans, made for two directions, must run two at once. Both need
// the same number of threads.
bool pick_stacked(const LayerShape& upper, int element_bytes, const Plan& lower_plan,
                  const Plan& upper_plan) {
  return step_weights(upper, Pass::kForward) * element_bytes <= kStackedBytes &&
         lower_plan.together == 2 && upper_plan.together == 2 && upper.proj_size == 0 &&
         !cell_info(upper.cell).computes_rows && lower_plan.threads == upper_plan.threads &&
         upper.sequence.steps >= 2 * kFollowParts;
}

// Projects few rows ahead in both layers, so that the upper layer starts soon.
std::int64_t pick_follow_rows(const LayerShape& upper, const Plan& plan) {
  const std::int64_t part = divide_up(upper.sequence.steps, kFollowParts) * upper.sequence.batch;
  return std::min(plan.chunk_rows, part);
}

// Shares blocks between ranks that wait for each other in each step: one of them may be slower for
// a moment, because its CPU is busy or it has one block more. Not if each rank keeps its weights in
// its private cache, or reads pre-activations that it projected ahead itself.
bool pick_shared(const LayerShape& shape, const Plan& plan) {
  if (plan.unit_groups == 1 || !plan.input_fused || !plan.packed) return false;
  const std::int64_t units = std::int64_t(plan.unit_vectors) * plan.vector_lanes;
  return shape.sequence.batch / plan.row_groups * step_weights(shape, Pass::kForward) /
             shape.hidden_size * units >=
         kMinSharedWork;
}

Plan make_plan_for(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                   int max_threads, int directions, WeightFormat allowed_format) {
  check_kernels(isa, shape.cell);
  if (shape.hidden_size < cell_info(shape.cell).saved_rows)
    throw std::invalid_argument("fastrnn: the cell " + std::string(cell_info(shape.cell).name) +
                                " needs at least " +
                                std::to_string(cell_info(shape.cell).saved_rows) + " units.");
  Plan plan{};
  plan.isa = isa.name;
  plan.element_bytes = element_bytes;
  plan.vector_lanes = isa.vector_bytes / element_bytes;
  plan.together = pick_together(shape, pass, isa, element_bytes, max_threads, directions);
  plan.threads = pick_threads(shape, pass, max_threads / plan.together);
  plan.row_groups = pick_row_groups(shape, pass, isa, element_bytes, plan.threads);
  plan.unit_groups = plan.threads / plan.row_groups;
  const int gates = cell_info(shape.cell).gates;
  plan.unit_vectors =
      pick_unit_vectors(shape.hidden_size, plan.vector_lanes, gates, plan.unit_groups);
  plan.back_vectors =
      pick_unit_vectors(shape.output_size(), plan.vector_lanes, 1, plan.unit_groups);
  plan.recurrent_format = pick_recurrent_format(shape, pass, isa, element_bytes, allowed_format);
  plan.packed = plan.recurrent_format != WeightFormat::kNative || pick_packed(shape, pass);
  plan.input_fused = pick_input_fused(shape, element_bytes, plan.row_groups, plan.unit_groups);
  plan.shared = pass == Pass::kForward && pick_shared(shape, plan);
  plan.chunk_rows = pick_chunk_rows(shape);
  plan.prefetch = pick_prefetch(shape, pass, plan);
  plan.gradient_depth = pick_gradient_depth(shape, element_bytes);
  return plan;
}

Plan make_direction_plan(const LayerShape& shape, Pass pass, const Plan& both, int threads) {
  Plan plan = both;
  plan.together = 1;
  plan.unit_groups = std::max(pick_threads(shape, pass, threads) / plan.row_groups, 1);
  plan.threads = plan.row_groups * plan.unit_groups;
  plan.shared = pass == Pass::kForward && pick_shared(shape, plan);
  plan.prefetch = pick_prefetch(shape, pass, plan);
  return plan;
}

Plan make_panel_plan_for(const LayerShape& shape, const Isa& isa, int element_bytes,
                         int max_threads) {
  Plan plan = make_plan_for(shape, Pass::kForward, isa, element_bytes, max_threads, 1,
                            WeightFormat::kNative);
  plan.packed = true;
  return plan;
}

// A single step needs more work per thread, because it does not pack, and projects nothing ahead.
Plan make_packed_plan(const LayerShape& shape, const Isa& isa, const Plan& panel_plan,
                      int max_threads, int directions) {
  const bool one_step = shape.sequence.steps == 1;
  if (one_step) {
    const std::int64_t most = call_work(shape, Pass::kForward) * directions / kMinPackedStepWork;
    max_threads = int(std::clamp<std::int64_t>(most, 1, max_threads));
  }
  Plan plan = make_plan_for(shape, Pass::kForward, isa, panel_plan.element_bytes, max_threads,
                            directions, WeightFormat::kNative);
  plan.packed = true;
  plan.unit_vectors = panel_plan.unit_vectors;
  plan.back_vectors = panel_plan.back_vectors;
  plan.recurrent_format = panel_plan.recurrent_format;
  plan.input_fused = plan.input_fused || one_step;
  plan.shared = pick_shared(shape, plan);
  plan.prefetch = pick_prefetch(shape, Pass::kForward, plan);
  return plan;
}

constexpr const char* kNotReduced = "the cell has no kernels for bfloat16";

// AMX multiplies 16 rows with a tile of weights in the time in which an instruction for pairs
// multiplies two or three. An instruction for pairs has twice the multiply-adds of float32. Without
// it bfloat16 pays where a step waits for its weights, because half the bytes arrive sooner. One
// long sequence of a small layer waits for neither, and keeps float32 copies.
Bfloat16Choice pick_bfloat16_kernels(const LayerShape& shape) {
  const Bfloat16Kernels* kernels;
  if (!cell_info(shape.cell).reduced) return {nullptr, kNotReduced};
  if (forced_bfloat16_kernels(&kernels)) return {kernels, "forced"};
  const std::int64_t values = cell_info(shape.cell).gates * shape.hidden_size * shape.output_size();
  const std::int64_t batch = shape.sequence.batch;
  if (batch == 1 && shape.sequence.steps >= kMinHalfSteps && values < kMinHalfWeights)
    return {nullptr, "one sequence of a small layer does not wait for weights"};
  if (batch >= kMinTileBatch && shape.hidden_size >= kMinTileUnits &&
      (kernels = bfloat16_kernels(Bfloat16Product::kTiles)) != nullptr)
    return {kernels, "an instruction multiplies tiles of pairs"};
  if ((kernels = bfloat16_kernels(Bfloat16Product::kDot)) != nullptr) {
    if (batch > kMostDotElsewhere && std::strcmp(cpu_vendor(), "amd") != 0)
      return {nullptr, "larger batches were measured on AMD CPUs only"};
    return {kernels, "an instruction multiplies pairs of values"};
  }
  if ((kernels = bfloat16_kernels(Bfloat16Product::kWidened)) == nullptr)
    return {nullptr, "the instruction set has no kernels for bfloat16"};
  if (batch > (isa().vector_bytes < 64 ? kMostWidenedNarrow : kMostWidened))
    return {nullptr, "without an instruction for bfloat16 only small batches are faster"};
  return {kernels, "the weights are widened as they are loaded"};
}

bool bfloat16_pays_for_copies(const LayerShape& shape) {
  const Bfloat16Kernels* kernels;
  if (!cell_info(shape.cell).reduced) return false;
  if (forced_bfloat16_kernels(&kernels)) return kernels != nullptr;
  if (shape.sequence.steps * shape.sequence.batch < kMinCastRows) return false;
  kernels = pick_bfloat16_kernels(shape).kernels;
  return kernels != nullptr && kernels != bfloat16_kernels(Bfloat16Product::kWidened);
}

Bfloat16Copies bfloat16_copies(const LayerShape& shape) {
  static_assert(kMinCastRows >= kMinHalfSteps, "with one sequence, all these rows are many steps");
  const Bfloat16Kernels* kernels;
  Bfloat16Copies copies{forced_bfloat16_kernels(&kernels) ? 1 : kMinCastRows, {}};
  LayerShape of = shape;
  of.sequence.steps = kMinCastRows;
  for (const std::int64_t batch :
       {std::int64_t(1), std::int64_t(2), kMostDotElsewhere + 1, kMinTileBatch}) {
    of.sequence.batch = batch;
    const bool paid = copies.batches.size() % 2 == 1;
    if (bfloat16_pays_for_copies(of) != paid) copies.batches.push_back(batch);
  }
  return copies;
}

// The product with w_hh of a backward step is faster where an instruction multiplies pairs.
Bfloat16Choice pick_bfloat16_backward(const LayerShape& shape) {
  return pick_bfloat16_gradients(shape);
}

// The products after backward read each factor often, so a conversion of x and w_ih to float32 is
// not what they wait for: they are faster where an instruction multiplies pairs.
Bfloat16Choice pick_bfloat16_gradients(const LayerShape& shape) {
  const Bfloat16Kernels* kernels;
  if (!cell_info(shape.cell).reduced) return {nullptr, kNotReduced};
  if (forced_bfloat16_kernels(&kernels)) {
    if (kernels != nullptr && kernels->gradients[0] == nullptr) kernels = nullptr;
    return {kernels, "forced"};
  }
  if (shape.sequence.steps * shape.sequence.batch < kMinGradientRows)
    return {nullptr, "few rows do not pay for packing pairs"};
  if ((kernels = bfloat16_kernels(Bfloat16Product::kTiles)) != nullptr)
    return {kernels, "an instruction multiplies tiles of pairs"};
  if ((kernels = bfloat16_kernels(Bfloat16Product::kDot)) == nullptr)
    return {nullptr, "no instruction multiplies pairs"};
  if (std::strcmp(cpu_vendor(), "amd") != 0)
    return {nullptr, "an instruction for pairs was measured on AMD CPUs only"};
  return {kernels, "an instruction multiplies pairs of values"};
}

// Threads that split the rows of a batch leave parts of the tiles of AMX empty, which take as long
// as full ones.
int pick_bfloat16_row_groups(const LayerShape& shape, const Isa& isa, WeightFormat format,
                             int weight_bytes, int threads) {
  const int groups = pick_row_groups(shape, Pass::kForward, isa, weight_bytes, threads);
  const bool has_tiles = format == WeightFormat::kBfloat16Tiles;
  const bool splits_units = divide_up(shape.hidden_size, kTileUnits) >= threads;
  return has_tiles && splits_units && shape.sequence.batch < kMinTileRowsPerThread * threads
             ? 1
             : groups;
}

// The rules of float32, for weights of half the size that are always packed: float32 copies would
// take as long.
Plan make_bfloat16_plan_for(const LayerShape& shape, const Isa& isa, WeightFormat format,
                            int max_threads, int directions) {
  constexpr Pass kPass = Pass::kForward;
  constexpr int kWeightBytes = 2;
  Plan plan{};
  plan.isa = isa.name;
  plan.element_bytes = sizeof(float);
  plan.vector_lanes = isa.vector_bytes / plan.element_bytes;
  plan.recurrent_format = format;
  plan.packed = true;
  plan.together = pick_together(shape, kPass, isa, kWeightBytes, max_threads, directions);
  plan.threads = pick_threads(shape, kPass, max_threads / plan.together);
  plan.row_groups = pick_bfloat16_row_groups(shape, isa, format, kWeightBytes, plan.threads);
  plan.unit_groups = plan.threads / plan.row_groups;
  plan.unit_vectors = pick_unit_vectors(shape.hidden_size, plan.vector_lanes,
                                        cell_info(shape.cell).gates, plan.unit_groups);
  plan.back_vectors =
      pick_unit_vectors(shape.output_size(), plan.vector_lanes, 1, plan.unit_groups);
  plan.input_fused = pick_input_fused(shape, kWeightBytes, plan.row_groups, plan.unit_groups);
  plan.shared = pick_shared(shape, plan);
  plan.chunk_rows = pick_chunk_rows(shape);
  return plan;
}

// The rules of float32, except that threads share the units where they would leave tiles empty.
Plan make_bfloat16_backward_plan_for(const LayerShape& shape, const Isa& isa, WeightFormat format,
                                     int max_threads, int directions) {
  Plan plan = make_plan_for(shape, Pass::kBackward, isa, sizeof(float), max_threads, directions,
                            WeightFormat::kNative);
  plan.recurrent_format = format;
  plan.packed = true;
  plan.prefetch = false;
  const std::int64_t tiles = divide_up(shape.output_size(), kTileUnits);
  if (format == WeightFormat::kBfloat16Tiles && tiles >= plan.threads &&
      shape.sequence.batch < kMinTileRowsPerThread * plan.threads) {
    plan.row_groups = 1;
    plan.unit_groups = plan.threads;
    plan.back_vectors =
        pick_unit_vectors(shape.output_size(), plan.vector_lanes, 1, plan.unit_groups);
  }
  return plan;
}

// Tiles multiply faster, if a step has rows for a whole tile and units for one along K.
Int8Choice pick_int8_kernels(const LayerShape& shape) {
  if (const Int8Kernels* forced = forced_int8_kernels()) return {forced, "forced"};
  const Int8Kernels* tiles = int8_tile_kernels();
  if (tiles == nullptr) return {&int8_kernels(), "the fastest kernels that run here"};
  if (shape.sequence.batch >= kMinInt8TileBatch && shape.hidden_size >= kMinTileUnits)
    return {tiles, "an instruction multiplies tiles of bytes"};
  return {&int8_kernels(), "few rows or units do not fill tiles"};
}

// Ranks share the units of a direction. Two directions run at the same time if there are threads
// for both: no rank, or only half of them, then waits for the others.
Plan make_int8_plan_for(const LayerShape& shape, const Isa& isa, int max_threads, int directions) {
  const std::int64_t work = call_work(shape, Pass::kForward);
  Plan plan{};
  plan.isa = isa.name;
  plan.element_bytes = 1;
  plan.vector_lanes = int(kInt8Units);
  plan.threads = 1;
  plan.together = 1;
  if (work >= kMinCallWork) {
    const int teams = directions > 1 && max_threads > 1 ? 2 : 1;
    const std::int64_t most =
        std::min<std::int64_t>({max_threads / teams, kMaxTeam, int8_blocks(shape.hidden_size)});
    const std::int64_t step_work = work / std::max<std::int64_t>(shape.sequence.steps, 1);
    plan.threads = int(std::clamp<std::int64_t>(step_work / kMinInt8StepWork, 1, most));
    if (work >= kMinInt8TogetherWork) plan.together = teams;
  }
  plan.row_groups = 1;
  plan.unit_groups = plan.threads;
  plan.unit_vectors = 1;
  plan.packed = true;
  plan.chunk_rows = std::max(shape.sequence.batch, kInt8ChunkRows);
  return plan;
}

Plan single_threaded(Plan plan) {
  plan.threads = plan.row_groups = plan.unit_groups = 1;
  plan.shared = false;
  return plan;
}

}  // namespace fastrnn::cpu
