// What an instruction set offers to the schedules, and the macros an isa_*.cpp needs before it
// includes the generic text in its own namespace.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/api.h"
#include "cpu/layout.h"
#include "cpu/runtime/team.h"

namespace fastrnn::cpu {

constexpr int kCellCount = int(sizeof(kCells) / sizeof(kCells[0]));

template <class T>
struct Walk {
  void (*forward)(const LayerForward<T, T>&, const Plan&, const ForwardLayout&, T* workspace, Team&,
                  int rank);
  void (*backward)(const LayerBackward<T, T>&, const Plan&, const BackwardLayout&, T* workspace,
                   Team&, int rank);
  void (*gradients)(const LayerGradients<T>&, const Plan&, const GradientLayout&, T* workspace,
                    Team&, int rank);
};

template <class T>
struct Walks {
  Walk<T> of[kCellCount];           // by CellKind
  WeightFormats recurrent_formats;  // of w_hh in forward (cpu/kernels/product/formats.h)
};

// Multiply-adds on registers alone (cpu/kernels/peak.h).
struct PeakLoop {
  float (*run)(std::int64_t rounds, float factor, float term);
  double flops_a_round;
};

struct Isa {
  const char* name;
  int vector_bytes;
  Walks<float> walks_float;
  Walks<double> walks_double;
  PeakLoop peak;

  // Whether forward can hold w_hh in this format.
  bool has_recurrent_format(WeightFormat format, int element_bytes) const {
    return (element_bytes == 4 ? walks_float.recurrent_formats : walks_double.recurrent_formats)
        .has(format);
  }
  template <class T>
  const Walk<T>& walk(CellKind cell) const {
    if constexpr (sizeof(T) == 4) {
      return walks_float.of[int(cell)];
    } else {
      return walks_double.of[int(cell)];
    }
  }
};

// The one in use (dispatch.cpp).
const Isa& isa();

// Whether this machine with AVX-512 converts float16 faster into vectors of 32 bytes than into
// those of 64.
bool widens_by_halves();

}  // namespace fastrnn::cpu
