// The CPU's kernels as the layers above see them: plans, capabilities, and one call a layer and
// direction. No torch in here; the caller brings its thread pool as a function.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem/layer.h"

#define FASTRNN_EXPORT __attribute__((visibility("default")))
#define FASTRNN_INLINE inline __attribute__((always_inline))

namespace fastrnn::cpu {

// How a layer will be walked through time (plan.cpp has the rules).
struct Plan {
  const char* isa;    // name of the instruction set in use
  int element_bytes;  // of a value of the dtype
  int vector_lanes;   // values of the dtype in one vector
  int threads;        // ranks that walk together: row_groups * unit_groups
  int together;       // directions that walk at the same time, each with so many threads
  int row_groups;     // the batch is cut in so many parts, which never wait for each other,
  int unit_groups;    // and within one the hidden units are cut in so many, with a barrier a step
  int unit_vectors;   // vectors of hidden units in a forward block
  int back_vectors;   // the same for the products of backward and of projections
  bool packed;        // weights are copied into panels first, or multiplied with as they lie
  bool input_fused;   // x_t w_ih^T inside the step (true), or for many steps ahead (false)
  bool shared;        // a rank that has finished its blocks of a step takes over others'
  std::int64_t chunk_rows;        // rows of x that are projected ahead at a time, if not fused
  WeightFormat recurrent_format;  // of the panels of w_hh in forward
};

enum class Pass { kForward, kBackward, kGradients };

// allowed_format: of w_hh, used where it is faster than the dtype itself.
FASTRNN_EXPORT Plan make_plan(const LayerShape& shape, Pass pass, int element_bytes, int threads,
                              int directions = 1,
                              WeightFormat allowed_format = WeightFormat::kNative);
// Of two layers of a stack that walk at the same time; false: they do so one after the other.
FASTRNN_EXPORT bool make_stacked_plans(const LayerShape& lower, const LayerShape& upper,
                                       int element_bytes, int threads, Plan* plans);

// Instruction sets compiled into this library that this machine runs, worst first.
FASTRNN_EXPORT std::vector<std::string> available_isas();
// The one in use: FASTRNN_ISA at first use, else the best there is.
FASTRNN_EXPORT std::string isa_in_use();
// Forces one; "" goes back to the choice at first use. False if it is not available.
FASTRNN_EXPORT bool set_isa(const std::string& name);
// All that were compiled in.
FASTRNN_EXPORT std::vector<std::string> compiled_isas();

// Throws std::invalid_argument where an environment variable of these kernels has a value that it
// cannot have (cpu/runtime/settings.h). They take effect at first use.
FASTRNN_EXPORT void check_settings();

// An upper bound for the threads of every call: FASTRNN_THREADS at first use; 0 is no bound.
FASTRNN_EXPORT int max_threads();
FASTRNN_EXPORT void set_max_threads(int threads);

// Float32 GFLOP/s that `threads` threads reach together on multiply-adds alone, over
// `seconds`. Throws std::runtime_error if the system does not grant so many threads.
FASTRNN_EXPORT double fma_peak(int threads, double seconds);

// Runs body over [0, n) in pieces, several at once where it can: piece 0 on the calling thread.
// It is asked for n pieces of length 1 and may give fewer, longer ones (at::parallel_for does
// this).
using ParallelFor = void (*)(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*),
                             void* context);

constexpr int kMaxDirections = 2;

// A long call asks this function, about ten times per second and on the calling thread, whether to
// give up; if so, the call throws std::runtime_error(kInterrupted). Null: it never asks.
FASTRNN_EXPORT void set_interrupted(bool (*function)());
constexpr const char* kInterrupted = "fastrnn: the call was interrupted by a signal.";

// The whole sequence, forward or backward, of a layer's directions (1 or 2, which differ in nothing
// but `reverse` and their pointers). T: float or double.
template <class T>
FASTRNN_EXPORT void forward(const LayerForward<T, T>* directions, int count, int threads,
                            ParallelFor parallel_for);
// Layers of one direction, each with y of the one before it as its x. Two at a time walk together
// where that pays, the upper one a few steps behind the lower one.
template <class T>
FASTRNN_EXPORT void forward_stack(const LayerForward<T, T>* layers, int count, int threads,
                                  ParallelFor parallel_for);
template <class T>
FASTRNN_EXPORT void backward(const LayerBackward<T, T>* directions, int count, int threads,
                             ParallelFor parallel_for);
// After backward: the gradients that are products over all steps. Both directions may add into one
// d_x, since they take turns.
template <class T>
FASTRNN_EXPORT void gradients(const LayerGradients<T>* directions, int count, int threads,
                              ParallelFor parallel_for);

}  // namespace fastrnn::cpu
