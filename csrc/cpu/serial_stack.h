// Runs packed layers on the calling thread, in memory that it acquires once: a call allocates
// nothing, waits for no thread and makes no system call.
#pragma once

#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/packed_stack.h"

namespace fastrnn::cpu {

template <class T>
class SerialStack {
 public:
  // The stack has one direction. It must outlive this object.
  SerialStack(const PackedStack<T>& stack, std::int64_t batch);

  // Runs the next steps: x [T, B, I], y [T, B, R]. They may overlap if T is 1. The states h [L, B,
  // R] and c [L, B, H] (null if the cell has no c) are replaced. asks: whether a signal may end a
  // long call (set_interrupted), which then throws; the states are undefined afterwards.
  void run(const T* x, std::int64_t steps, T* y, T* h, T* c, bool asks);

 private:
  // How a layer runs one step, or several at once.
  struct Prepared {
    LayerShape shape;
    Plan plan;
    PanelLayout panel_layout;
    ForwardLayout layout;
    decltype(Walk<T>::forward) forward;
    T* panels;
  };

  std::vector<Prepared> prepare(std::int64_t steps) const;
  void run_part(const std::vector<Prepared>& layers, const T* x, std::int64_t steps, T* y, T* h,
                T* c, Interruption& interruption, bool asks);

  const PackedStack<T>& stack_;
  bool backwards_ = false;                 // the direction of the next step (Team::backwards)
  const std::int64_t batch_, part_steps_;  // part_steps_: steps that run at once
  std::vector<std::int64_t> step_rows_;    // [part_steps_] offsets, [part_steps_] numbers of rows
  const std::vector<Prepared> one_step_, part_;  // [L]
  std::int64_t between_at_[2];  // [part_steps_, B, R] outputs of layers, read by the next layer
  std::int64_t input_at_;       // [B, I] a copy of x
  std::int64_t scratch_at_;     // for the time loop
  std::unique_ptr<Workspace> memory_;
};

}  // namespace fastrnn::cpu
