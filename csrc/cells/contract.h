// The contract between a cell and the schedules that run it through time.
//
// A cell is a struct of constants (its traits) and two functions over a value type A, which is a
// scalar on CUDA and a vector of units on the CPU (cells/math.h lists what A offers). The functions
// compute one hidden unit. They must be free of branches and must not know the time loop.
//
//     x_t  --w_ih, b_ih-->  gates of the input side  --kPreX-->  +
//                                                                |--> pre --> forward --> h', c'
//     h    --w_hh, b_hh-->  gates of the hidden side --kPreH-->  +
//                           (only with kDenseRecurrence)
//
// Sizes of weights: w_ih [kGates*H, I], w_hh [kGates*H, R], biases [kGates*H], w_unit
// [kParameters*H].
//
//   kGates               gates: row blocks of H rows in w_ih and w_hh
//   kPre                 pre-activations per unit that forward reads
//   kPreX[kGates]        index of the pre-activation that gate g of the input side is added to
//   kPreH[kGates]        the same for the hidden side; must be 0, 1, ..., kGates - 1: backward
//                        multiplies the first kGates columns of d_pre by w_hh
//   kDenseRecurrence     the hidden side exists: w_hh multiplies h. Otherwise the layer has no w_hh
//                        and no b_hh, and h reaches h' through forward alone.
//   kParameters          values per unit that are the same at every step, such as peepholes; 0:
//                        the layer has no w_unit
//   kSaved               values per unit and step that forward leaves for backward
//   kStates              states per unit. State 0 is h, the output. The others are the cell states,
//                        which a layer holds side by side in c [B, (kStates-1)*H].
//   kSavedState          index in `saved` of state 1 after the step; the other cell states follow
//                        it. Backward finds the cell states before a step there. -1 if kStates is 1
//   kForwardReadsH       forward reads state[0]
//   kBackwardReadsH      backward reads state[0]
//   kBackwardReadsNextH  backward reads next_state[0]
//   kDirectPath          h reaches h' around the recurrent product: backward writes d_state[0].
//                        Otherwise backward leaves it alone. Backward writes the gradients of all
//                        cell states.
//   kBoundedState        |h'| is at most max(1, |h|): h can be rounded with one scale for all steps
//   kProjects            a layer may multiply h' by w_hr (an LSTM's projection). The recurrent
//                        state then has R columns, so such a cell must not read h and has no direct
//                        path.
//
// A schedule loads only what the flags name; the other entries of an array are zero.
#pragma once

namespace fastrnn::cells {

constexpr int kMostStates = 4;

template <class A>
struct StepInputs {
  const A* pre;         // [kPre]
  const A* state;       // [kStates] h, c
  const A* parameters;  // [kParameters]
};
template <class A>
struct StepOutputs {
  A* saved;       // [kSaved]
  A* next_state;  // [kStates] h', c'
};

// Gradients have the name of the value with d_ before it.
template <class A>
struct StepGradientInputs {
  const A* saved;         // [kSaved]
  const A* state;         // [kStates] h, c
  const A* next_state;    // [kStates] h', c'
  const A* d_next_state;  // [kStates]
  const A* parameters;    // [kParameters]
};
template <class A>
struct StepGradientOutputs {
  A* d_pre;         // [kPre]
  A* d_state;       // [kStates]
  A* d_parameters;  // [kParameters] this step's contribution
};

// What a step of backward leaves in a row of d_pre [(kPre + kParameters)*H]: the gradients at the
// pre-activations, then those of the parameters. The gradients of weights and biases are products
// and sums over all rows.
template <class Cell>
inline constexpr int kGradientColumns = Cell::kPre + Cell::kParameters;
// Cell states per unit.
template <class Cell>
inline constexpr int kCellStates = Cell::kStates - 1;
// Lengths of arrays that may be empty.
template <class Cell>
inline constexpr int kSavedLength = Cell::kSaved > 0 ? Cell::kSaved : 1;
template <class Cell>
inline constexpr int kParametersLength = Cell::kParameters > 0 ? Cell::kParameters : 1;

// Fails to compile where a cell's traits contradict each other.
template <class Cell>
constexpr bool check_cell() {
  static_assert(Cell::kGates >= 1 && Cell::kPre >= Cell::kGates,
                "every gate needs a pre-activation");
  static_assert(Cell::kStates >= 1 && Cell::kStates <= kMostStates, "a cell has 1 to 4 states");
  static_assert(
      (Cell::kStates > 1) == (Cell::kSavedState >= 0) &&
          (Cell::kSavedState < 0 || Cell::kSavedState + kCellStates<Cell> <= Cell::kSaved),
      "saved must hold the cell states from kSavedState on; -1 without a cell state");
  static_assert(Cell::kParameters >= 0, "kParameters must not be negative");
  static_assert(Cell::kDenseRecurrence || Cell::kDirectPath,
                "without a recurrent product h reaches h' around it");
  static_assert(!Cell::kProjects || (Cell::kStates == 2 && Cell::kDenseRecurrence),
                "a cell with a projection has h and c and a recurrent product");
  static_assert(!Cell::kProjects || !(Cell::kForwardReadsH || Cell::kBackwardReadsH ||
                                      Cell::kBackwardReadsNextH || Cell::kDirectPath),
                "a cell with a projection must not read h");
  static_assert(sizeof(Cell::kPreX) / sizeof(int) == Cell::kGates &&
                    sizeof(Cell::kPreH) / sizeof(int) == Cell::kGates,
                "kPreX and kPreH must have an entry for each gate");
  constexpr auto is_valid = [] {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      if (Cell::kPreH[gate] != gate) return false;
      if (Cell::kPreX[gate] < 0 || Cell::kPreX[gate] >= Cell::kPre) return false;
      if (gate > 0 && Cell::kPreX[gate] <= Cell::kPreX[gate - 1]) return false;
    }
    return true;
  };
  static_assert(is_valid(),
                "kPreH must be 0, 1, ..., kGates - 1, and kPreX must ascend within kPre");
  return true;
}

}  // namespace fastrnn::cells
