// The rules that turn the shape of a layer into a plan. Each is a function, so that each can be
// tested.
#pragma once

#include "cpu/isa/bfloat16.h"
#include "cpu/isa/int8.h"
#include "cpu/isa/isa.h"

namespace fastrnn::cpu {

// Minimum multiply-adds per thread and step: below, the barrier costs more than another thread
// gains.
constexpr std::int64_t kMinStepWork = 8192;
// Minimum multiply-adds per block for work queues (one or two microseconds): below, asking for a
// block costs too much.
constexpr std::int64_t kMinSharedWork = 100'000;
// Minimum multiply-adds per call that pay for waking the pool (about a microsecond).
constexpr std::int64_t kMinCallWork = 100'000;
// The same in a forked process, where threads are created for the call.
constexpr std::int64_t kMinForkedWork = 100 * kMinCallWork;
// Bytes of weights that stay in the private cache of a core; reading larger ones again for other
// rows is expensive.
constexpr std::int64_t kPrivateCacheBytes = 512 * 1024;
// Minimum rows per thread that pay for reading all weights: from the private cache, or from further
// away.
constexpr std::int64_t kMinRowsPerThreadCached = 4, kMinRowsPerThread = 16;
// Bytes of weights beyond which re-reading w_ih in every step costs more than storing the
// pre-activations.
constexpr std::int64_t kSharedCacheBytes = 24 * 1024 * 1024;
// When packing the weights is faster. Rows of w_hh in backward are nearly panels, so packing pays
// from a few steps on. Forward transposes its weights to pack them, and its unpacked products
// (dots) get cheaper per row the longer they are: packing pays from min(R, kMaxUnits) / k rows of
// the call (steps * batch) on, where k depends on the kind of call.
struct PackingRule {
  static constexpr std::int64_t kBackwardSteps = 6;       // least number of steps in backward
  static constexpr std::int64_t kUnitsPerRow = 5;         // k
  static constexpr std::int64_t kUnitsPerRowBatched = 2;  // k from kManySequences on
  static constexpr std::int64_t kUnitsPerRowOneStep = 1;  // k of a single step
  static constexpr std::int64_t kManySequences = 8;
  static constexpr std::int64_t kMaxUnits = 512;
  // On Intel CPUs, one sequence of an LSTM or GRU also needs min(R, kMaxUnits)^2 / this many steps
  // (Emerald Rapids: packing gains from about 90 steps on for 256 units, from 300 on for 512).
  static constexpr std::int64_t kSquaredUnitsPerStep = 750;
};
// Minimum multiply-adds per thread of a single step with packed weights: 512 KB of float32 weights,
// about as many as a private cache holds beside other data. (AMD Zen 4, LSTM, batch 1: reading them
// takes 4.4 us, waking a thread of the pool 1 to 2 us.)
constexpr std::int64_t kMinPackedStepWork = 128 * 1024;
// float16: minimum number of values of w_hh, from which a step waits for memory, and minimum steps,
// from which rounding and packing pay.
constexpr std::int64_t kMinHalfWeights = 16 * 1024, kMinHalfSteps = 24;
// Bytes of weights of a layer up to which two layers at the same time are faster: a core then reads
// all weights of one layer, where it would read half of them if one layer ran on both cores.
constexpr std::int64_t kStackedBytes = 256 * 1024;
// Number of parts of the sequence by which an upper layer follows the layer below; each part is
// projected ahead at once.
constexpr std::int64_t kFollowParts = 8;
// Minimum batch for computing the input product in the step: enough rows then share each weight
// that is loaded.
constexpr std::int64_t kFusedBatch = 4;

// Before a slow L3 (cpu/runtime/cache.h): rows per step from which computing the input product in
// the step is faster although its weights do not stay in the private cache, and how many halves of
// a private cache the weights of a rank may fill then.
constexpr std::int64_t kFusedSlowBatch = 48, kFusedSlowHalfCaches = 5;
// Before a slow L3: rows that are projected ahead at once.
constexpr std::int64_t kSlowChunkRows = 96;

// int8: minimum multiply-adds per thread and step, and per call that pay for two directions at the
// same time. (LSTM, batch 1, on an Intel Xeon with VNNI: a step of 128 units takes 1.3 us on one
// thread and no less on two; of 256 units, two threads are 1.2 times as fast.)
constexpr std::int64_t kMinInt8StepWork = 16 * kMinStepWork;
constexpr std::int64_t kMinInt8TogetherWork = 16 * kMinCallWork;
// int8: rows of x whose pre-activations stay in a private cache together with the weights.
constexpr std::int64_t kInt8ChunkRows = 96;

// bfloat16: most sequences of a batch. Without an instruction for the product each tile of rows
// widens the same weights again. (AMD EPYC (Zen 4), one thread: vectors of 32 bytes take 0.9 to 1.2
// of the time of float32 copies with 3 or 4 sequences, and less with 1 or 2; vectors of 64 bytes
// take less with up to 4.) With the instruction, larger batches were measured on AMD CPUs alone.
constexpr std::int64_t kMostWidenedNarrow = 2, kMostWidened = 4, kMostDotElsewhere = 4;
// AMX: minimum batch and units. From instruction counts, not measured: a product with a tile of
// weights takes 16 cycles for any number of rows, an instruction for pairs 8 cycles per row. With 8
// rows and 64 units a tile product with its loads and stores takes about half as long, and a batch
// of 16 to 128 took a third of the time of float32 in an experiment (Emerald Rapids).
constexpr std::int64_t kMinTileBatch = 8, kMinTileUnits = 64;
// AMX with int8: minimum batch; the units are as above. From instruction counts, not measured: 16
// rows, 16 units and 64 values along K take 16 cycles, with VNNI 128. With 4 rows tiles would still
// take half as long, but a step then waits for the weights. In an experiment (Emerald Rapids) tiles
// took a third to a half of the time with batches of 16 and 64; smaller ones were not tried.
constexpr std::int64_t kMinInt8TileBatch = 16;
// bfloat16: minimum steps times batch for backward.
constexpr std::int64_t kMinGradientRows = 32;
// Autocast: minimum steps times batch for bfloat16 copies of float32 tensors, made in each call. On
// Zen 4, with the copies, calls of 64 rows and more took 0.5 to 0.9 of the time of float32, calls
// of 32 to 40 rows 0.9 to 1.6.
constexpr std::int64_t kMinCastRows = 64;
// AMX: units of a tile, and minimum rows per thread where threads split the rows: two tiles.
constexpr std::int64_t kTileUnits = 16, kMinTileRowsPerThread = 32;

// Multiply-adds of a whole call.
std::int64_t call_work(const LayerShape& shape, Pass pass);
int pick_threads(const LayerShape& shape, Pass pass, int max_threads);
int pick_row_groups(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                    int threads);
int pick_unit_vectors(std::int64_t units, int lanes, int gates, int groups);
bool pick_packed(const LayerShape& shape, Pass pass);
WeightFormat pick_recurrent_format(const LayerShape& shape, Pass pass, const Isa& isa,
                                   int element_bytes, WeightFormat allowed);
int pick_bfloat16_row_groups(const LayerShape& shape, const Isa& isa, WeightFormat format,
                             int weight_bytes, int threads);
int pick_together(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                  int max_threads, int directions);
bool pick_stacked(const LayerShape& upper, int element_bytes, const Plan& lower_plan,
                  const Plan& upper_plan);
std::int64_t pick_follow_rows(const LayerShape& upper, const Plan& plan);
bool pick_shared(const LayerShape& shape, const Plan& plan);
bool pick_input_fused(const LayerShape& shape, int element_bytes, int row_groups, int unit_groups);
std::int64_t pick_chunk_rows(const LayerShape& shape);
bool pick_prefetch(const LayerShape& shape, Pass pass, const Plan& plan);
std::int64_t pick_gradient_depth(const LayerShape& shape, int element_bytes);

Plan make_plan_for(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                   int max_threads, int directions, WeightFormat allowed_format);
// The plan of one direction of a layer of two, on the threads of both, with the tiles that it has
// in the plan of both: its results have the same bits.
Plan make_direction_plan(const LayerShape& shape, Pass pass, const Plan& both, int threads);
// The plan for panels that outlive a call (cpu/panels.h), and the plan of a call that uses them.
Plan make_panel_plan_for(const LayerShape& shape, const Isa& isa, int element_bytes,
                         int max_threads);
Plan make_packed_plan(const LayerShape& shape, const Isa& isa, const Plan& panel_plan,
                      int max_threads, int directions);
// The kernels that compute forward in bfloat16 as it is stored, or null: float32 copies are faster.
struct Bfloat16Choice {
  const Bfloat16Kernels* kernels;
  const char* reason;  // for users
};
Bfloat16Choice pick_bfloat16_kernels(const LayerShape& shape);
// The same for the backward time loop and for the products after it.
Bfloat16Choice pick_bfloat16_backward(const LayerShape& shape);
Bfloat16Choice pick_bfloat16_gradients(const LayerShape& shape);
Plan make_bfloat16_plan_for(const LayerShape& shape, const Isa& isa, WeightFormat format,
                            int max_threads, int directions);
Plan make_bfloat16_backward_plan_for(const LayerShape& shape, const Isa& isa, WeightFormat format,
                                     int max_threads, int directions);
// The kernels and the plan for int8 weights.
struct Int8Choice {
  const Int8Kernels* kernels;
  const char* reason;  // for users
};
Int8Choice pick_int8_kernels(const LayerShape& shape);
Plan make_int8_plan_for(const LayerShape& shape, const Isa& isa, int max_threads, int directions);
// The same plan for one thread, for teams that get no other threads.
Plan single_threaded(Plan plan);

}  // namespace fastrnn::cpu
