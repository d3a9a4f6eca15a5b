// The operator that cuts padded batches with lengths and resets into segments.
#include "problem/segments.h"

#include <cstring>
#include <optional>
#include <tuple>

#include "torch/arguments.h"
#include "torch/schemas.h"

namespace fastrnn {
namespace {

using SegmentTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_kind(const char* name, const Tensor& t, int64_t dims, int32_t code, const char* type,
                int64_t value_bytes) {
  FASTRNN_CHECK(t.is_cpu() && t.dim() == dims && dtype_code(t) == code, name, " must be ", dims,
                "-D ", type, " on the CPU, got another tensor.");
  check_memory(name, t, value_bytes);
}

SegmentTensors cut_segments(Tensor lengths_, std::optional<Tensor> resets_, int64_t steps,
                            bool backwards) {
  return guarded([&] {
    check_kind("lengths", lengths_, 1, aoti_torch_dtype_int64(), "int64", 8);
    const Tensor lengths = as_contiguous(lengths_);
    MarkedBatch batch{};
    batch.steps = steps;
    batch.batch = lengths.size(0);
    batch.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
    batch.backwards = backwards;
    FASTRNN_CHECK(steps >= 0 && steps < (int64_t(1) << 40), "steps must not be negative, got ",
                  steps, ".");
    for (int64_t b = 0; b < batch.batch; ++b)
      FASTRNN_CHECK(batch.lengths[b] >= 0 && batch.lengths[b] <= steps,
                    "lengths must be from 0 to the ", steps, " steps, got ", batch.lengths[b], ".");
    std::optional<Tensor> resets;
    if (resets_) {
      check_kind("resets", *resets_, 2, aoti_torch_dtype_bool(), "bool", 1);
      FASTRNN_CHECK(resets_->size(0) == steps && resets_->size(1) == batch.batch,
                    "resets must have the shape ", text(std::vector<int64_t>{steps, batch.batch}),
                    ", got ", text(sizes_of(*resets_)), ".");
      resets = as_contiguous(*resets_);
      batch.resets = static_cast<const uint8_t*>(resets->const_data_ptr());
    }
    const Segments segments = cut(batch);
    const auto copy = [&](const std::vector<int64_t>& values) {
      Tensor t = empty({int64_t(values.size())}, ScalarType::Long, lengths);
      std::memcpy(t.data_ptr(), values.data(), values.size() * sizeof(int64_t));
      return t;
    };
    return SegmentTensors(copy(segments.batch_sizes), copy(segments.rows), copy(segments.initial),
                          copy(segments.final));
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("cut_segments", TORCH_BOX(&fastrnn::cut_segments));
}
