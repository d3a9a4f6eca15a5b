// The rules by which a layer's shape becomes a plan, each one function so that each can be tested.
#pragma once

#include "cpu/isa/isa.h"

namespace fastrnn::cpu {

// A rank earns its keep if a step gives it at least this many multiply-adds: below, meeting the
// others at the barrier costs more than the work they take over.
constexpr std::int64_t kMinStepWork = 8192;
// A block that takes this many multiply-adds (a microsecond or two) is worth asking who does it.
constexpr std::int64_t kMinSharedWork = 100'000;
// And the whole call must be worth waking the pool (about a microsecond).
constexpr std::int64_t kMinCallWork = 100'000;
// ... which costs more where its threads are made for the call (in a forked process).
constexpr std::int64_t kMinForkedWork = 100 * kMinCallWork;
// Weights that stay in a core's own cache are cheap to walk again for other rows; larger ones are
// not.
constexpr std::int64_t kPrivateCacheBytes = 512 * 1024;
// Rows a thread that pay for walking all weights: cached ones, or ones from further away.
constexpr std::int64_t kMinRowsPerThreadCached = 4, kMinRowsPerThread = 16;
// Beyond this, streaming w_ih anew each step is dearer than keeping pre-activations.
constexpr std::int64_t kSharedCacheBytes = 24 * 1024 * 1024;
// When packing the weights pays. Backward multiplies with rows that are nearly panels already, so a
// few steps pay for packing. Forward packs transposed weights. It pays from min(R, kMaxUnits) / k
// rows (steps * batch) on: a dot over few units costs more per product than a long one, and k
// depends on the kind of call.
struct PackingRule {
  static constexpr std::int64_t kBackwardSteps = 6;       // least number of steps in backward
  static constexpr std::int64_t kUnitsPerRow = 5;         // k
  static constexpr std::int64_t kUnitsPerRowBatched = 2;  // k from kManySequences on
  static constexpr std::int64_t kUnitsPerRowOneStep = 1;  // k of a single step
  static constexpr std::int64_t kManySequences = 8;
  static constexpr std::int64_t kMaxUnits = 512;
};
// A step waits for w_hh rather than for its own instructions from this many values on; rounding and
// packing them takes some steps to pay.
constexpr std::int64_t kMinHalfWeights = 16 * 1024, kMinHalfSteps = 24;
// Two layers at the same time pay while all weights of one stay close to its core: half of them
// would be closer.
constexpr std::int64_t kStackedBytes = 256 * 1024;
// A layer follows the one below in so many parts of the sequence, each projected ahead at once.
constexpr std::int64_t kFollowParts = 8;
// From this batch on, rows enough share each weight that is loaded: the input product joins the
// step.
constexpr std::int64_t kFusedBatch = 4;

// Multiply-adds of a whole call.
std::int64_t call_work(const LayerShape& shape, Pass pass);
int pick_threads(const LayerShape& shape, Pass pass, int max_threads);
int pick_row_groups(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                    int threads);
int pick_unit_vectors(std::int64_t units, int lanes, int gates, int groups);
bool pick_packed(const LayerShape& shape, Pass pass);
WeightFormat pick_recurrent_format(const LayerShape& shape, Pass pass, const Isa& isa,
                                   int element_bytes, WeightFormat allowed);
int pick_together(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                  int max_threads, int directions);
bool pick_stacked(const LayerShape& upper, int element_bytes, const Plan& lower_plan,
                  const Plan& upper_plan);
std::int64_t pick_follow_rows(const LayerShape& upper, const Plan& plan);
bool pick_shared(const LayerShape& shape, const Plan& plan);
bool pick_input_fused(const LayerShape& shape, int element_bytes, int row_groups);

Plan make_plan_for(const LayerShape& shape, Pass pass, const Isa& isa, int element_bytes,
                   int max_threads, int directions, WeightFormat allowed_format);
// The same for one thread: what a team does that was granted no others.
Plan single_threaded(Plan plan);

}  // namespace fastrnn::cpu
