// The CPU kernels as the layers above see them: plans, capabilities, and calls that run the
// directions of a layer. Nothing here depends on torch: the caller passes its thread pool as a
// function.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem/layer.h"

#define FASTRNN_EXPORT __attribute__((visibility("default")))
#define FASTRNN_INLINE inline __attribute__((always_inline))

namespace fastrnn::cpu {

// How a layer runs (plan.cpp has the rules). A rank is one thread of a call.
struct Plan {
  const char* isa;          // name of the instruction set in use
  int element_bytes;        // of a value of the dtype
  int vector_lanes;         // values of the dtype in one vector
  int threads;              // ranks of a direction: row_groups * unit_groups
  int together;             // directions that run at the same time, each with `threads` threads
  int row_groups;           // number of parts of the batch, which never wait for each other
  int unit_groups;          // number of parts of the hidden units, with a barrier per step
  int unit_vectors;         // vectors of hidden units in a forward block
  int back_vectors;         // the same for the products of backward and of projections
  bool packed;              // weights are copied into panels first; false: used unpacked
  bool input_fused;         // x_t w_ih^T is computed in the step; false: for many steps ahead
  bool shared;              // a rank that has finished its blocks of a step takes blocks of others
  std::int64_t chunk_rows;  // rows of x that are projected ahead at once, if not fused
  bool prefetch;  // panels are loaded into the private cache while those before them are used
  std::int64_t gradient_depth;    // rows of x and d_pre per block of the products after backward
  WeightFormat recurrent_format;  // of the panels of w_hh in forward
};

enum class Pass { kForward, kBackward, kGradients };

// allowed_format: a format that w_hh may have where that is faster than the dtype itself.
FASTRNN_EXPORT Plan make_plan(const LayerShape& shape, Pass pass, int element_bytes, int threads,
                              int directions = 1,
                              WeightFormat allowed_format = WeightFormat::kNative);
// Makes the plans of two layers of a stack that run at the same time. Returns false if they run one
// after the other.
FASTRNN_EXPORT bool make_stacked_plans(const LayerShape& lower, const LayerShape& upper,
                                       int element_bytes, int threads, Plan* plans);

// Instruction sets of this library that this machine can run, the slowest first.
FASTRNN_EXPORT std::vector<std::string> available_isas();
// The instruction set in use: FASTRNN_ISA, read at first use, else the fastest available.
FASTRNN_EXPORT std::string isa_in_use();
// Forces an instruction set; "" restores the choice at first use. Returns false if it is not
// available.
FASTRNN_EXPORT bool set_isa(const std::string& name);
// All instruction sets of this library.
FASTRNN_EXPORT std::vector<std::string> compiled_isas();

// Vendor of this CPU: "amd", "intel" or "other". For rules whose constants were measured on CPUs of
// one vendor.
FASTRNN_EXPORT const char* cpu_vendor();

// The cell with this name in the registry, or of those that were defined at run time; null if there
// is none.
FASTRNN_EXPORT const CellInfo* find_cell(const std::string& name);
// The names of all cells in the registry, with commas between them.
FASTRNN_EXPORT std::string cell_names();
// Adds the cell of a library that was compiled with cpu/kernels/defined_cell.h against headers with
// this hash. The library stays loaded. Adding a cell again, for another instruction set, adds its
// kernels. Throws std::invalid_argument with the reason if the library is not usable.
FASTRNN_EXPORT void add_defined_cell(const std::string& path, const std::string& headers);
// Whether a cell was defined at run time and has kernels for the instruction set in use.
FASTRNN_EXPORT bool has_defined_cell(const std::string& name);

// Throws std::invalid_argument if an environment variable of these kernels has an invalid value
// (cpu/runtime/settings.h). Most of them take effect at first use.
FASTRNN_EXPORT void check_settings();

// Upper bound for the threads of every call: FASTRNN_THREADS, read at first use; 0: no bound.
FASTRNN_EXPORT int max_threads();
FASTRNN_EXPORT void set_max_threads(int threads);

// Float32 GFLOP/s that `threads` threads reach together with multiply-adds in registers, measured
// for `seconds`. Throws std::runtime_error if the system does not grant that many threads.
FASTRNN_EXPORT double fma_peak(int threads, double seconds);

// Runs body over [0, n) in chunks, in parallel where possible; chunk 0 runs on the calling thread.
// Callers want n chunks of length 1; the function may merge chunks (as at::parallel_for does).
using ParallelFor = void (*)(std::int64_t n, void (*body)(std::int64_t, std::int64_t, void*),
                             void* context);

constexpr int kMaxDirections = 2;

// A long call asks this function about ten times per second, on the calling thread, whether to
// stop; if so, the call throws std::runtime_error(kInterrupted). Null: calls do not ask.
FASTRNN_EXPORT void set_interrupted(bool (*function)());
constexpr const char* kInterrupted = "fastrnn: the call was interrupted by a signal.";

// The layer of whose steps and directions a call computes a part (cpu/recompute.h). The call packs
// and divides the weights as a call for the whole layer does, so that the results have the same
// bits.
struct WholeLayer {
  LayerShape shape;
  int directions;
};

// Run the whole sequence of the directions of a layer (1 or 2, which differ only in `reverse` and
// their pointers), or the part of a layer. T: float or double.
template <class T>
FASTRNN_EXPORT void forward(const LayerForward<T, T>* directions, int count, int threads,
                            ParallelFor parallel_for, const WholeLayer* whole = nullptr);
// Runs layers of one direction; the y of a layer is the x of the next. Two layers run at the same
// time where that is faster: the upper one then follows the lower one by a few steps.
template <class T>
FASTRNN_EXPORT void forward_stack(const LayerForward<T, T>* layers, int count, int threads,
                                  ParallelFor parallel_for);
template <class T>
FASTRNN_EXPORT void backward(const LayerBackward<T, T>* directions, int count, int threads,
                             ParallelFor parallel_for, const WholeLayer* whole = nullptr);
// Computes the gradients that are products over steps, after backward. Both directions may add to
// one d_x: they run one after the other.
template <class T>
FASTRNN_EXPORT void gradients(const LayerGradients<T>* directions, int count, int threads,
                              ParallelFor parallel_for);

}  // namespace fastrnn::cpu
