// Training in less memory. Forward keeps the states before each chunk of steps instead of the
// values that backward reads (LayerForward::saved). Backward goes through the chunks in reverse
// order and computes these values of each chunk again:
//
//   forward    states[0] | chunk 0 | states[1] | chunk 1 | ...
//   backward   for each chunk, from the last one: forward with `saved`, then backward
//
// The results have the same bits as those of forward, backward and gradients (cpu/api.h) for all
// steps at once.
//
// Chunks are counted in the order of computation. A chunk holds at least `length` steps: it ends
// where the time loop of forward has used all rows that it projects ahead (kernels/schedule/
// forward.h), so that the tiles of this product are the same.
#pragma once

#include "cpu/bfloat16.h"

namespace fastrnn::cpu {

// Number of chunks of a direction of a layer.
FASTRNN_EXPORT std::int64_t chunk_count(const LayerShape& shape, std::int64_t length);
// Number of elements of the states before a chunk: h [B, R], then c [B, C*H].
FASTRNN_EXPORT std::int64_t chunk_state_size(const LayerShape& shape);

// Runs the directions of a layer; in bfloat16 if computes_bfloat16(shape). states: for each
// direction [chunk_count, chunk_state_size] or more.
template <class T>
FASTRNN_EXPORT void forward_in_chunks(const LayerForward<T, T>* directions, int count,
                                      std::int64_t length, T* const* states, int threads,
                                      ParallelFor parallel_for);
FASTRNN_EXPORT void forward_in_chunks(const Bfloat16Forward* directions, int count,
                                      std::int64_t length, float* const* states, int threads,
                                      ParallelFor parallel_for);

// One direction of a layer without a projection. `forward` needs no results, `backward` neither
// saved nor d_pre, `gradients` neither rows nor d_pre.
template <class Storage, class T>
struct ChunkedBackward {
  LayerForward<Storage, T> forward;
  LayerBackward<T, T> backward;
  LayerGradients<T> gradients;
  const T* states;  // of forward_in_chunks; not read if the cell saves no values
  int directions;   // of the layer
};

// Computes all gradients of a direction. Directions run one after the other, because the second one
// adds to the d_x of the first.
template <class T>
FASTRNN_EXPORT void backward_in_chunks(const ChunkedBackward<T, T>& direction, std::int64_t length,
                                       int threads, ParallelFor parallel_for);
FASTRNN_EXPORT void backward_in_chunks(const ChunkedBackward<Bfloat16, float>& direction,
                                       std::int64_t length, int threads, ParallelFor parallel_for);

}  // namespace fastrnn::cpu
