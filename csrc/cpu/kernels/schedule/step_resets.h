// The rows of a padded batch whose state before a step is replaced, and the states that replace it.
#pragma once

#include "problem/layer.h"

FASTRNN_KERNELS_BEGIN

template <class Storage>
struct StepResets {
  const std::uint8_t* mask = nullptr;  // [B], or null: none
  const Storage* h = nullptr;          // [B, R]
  const Storage* c = nullptr;          // [B, C*H]

  StepResets() = default;
  // Of the k-th step in order of computation; none after the last one.
  StepResets(const Resets<Storage>& all, const Sequence& sequence, std::int64_t k) {
    if (all.mask == nullptr || k >= sequence.steps) return;
    const std::int64_t t = sequence.step(k);
    mask = all.mask + t * sequence.batch;
    h = all.h + t * all.h_stride;
    if (all.c != nullptr) c = all.c + t * all.c_stride;
  }

  bool at(std::int64_t b) const { return mask != nullptr && mask[b] != 0; }
};

FASTRNN_KERNELS_END
