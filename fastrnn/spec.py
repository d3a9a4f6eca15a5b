"""The cells and their weights: properties of the kernels, and facts about torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn._torch_internals import VF


class ColumnRange(NamedTuple):
    """Neighbouring pre-activation columns that belong to neighbouring gates, in units of H."""

    column: int
    gate: int
    width: int

    def columns(self, hidden: int) -> slice:
        """Returns the columns of the range in a matrix of Q*H columns."""
        return slice(self.column * hidden, (self.column + self.width) * hidden)

    def gate_rows(self, hidden: int) -> slice:
        """Returns the rows of the range in a weight of G*H rows."""
        return slice(self.gate * hidden, (self.gate + self.width) * hidden)


def _column_ranges(columns: Sequence[int]) -> tuple[ColumnRange, ...]:
    ranges: list[ColumnRange] = []
    for gate, column in enumerate(columns):
        if ranges and column == ranges[-1].column + ranges[-1].width:
            ranges[-1] = ranges[-1]._replace(width=ranges[-1].width + 1)
        else:
            ranges.append(ColumnRange(column, gate, 1))
    return tuple(ranges)


class TorchFacts(NamedTuple):
    """The names and rules that torch, autocast and ONNX have for a cell.

    Attributes:
        mode: the value of a module's ``mode`` for this cell; torch's value if torch has the cell.
        torch_function: torch's own layer, in ``torch._VF``; None if torch does not have it.
        torch_step: torch's own single step; None if torch does not have it.
        keeps_state_dtype: whether autocast on the CPU keeps the type of a wider state.
        onnx_type: the type of the ONNX node; None if ONNX does not have it.
        onnx_gates: for each gate of ONNX, its index in torch.
        onnx_attributes: attributes of the node; ``activations`` has one entry per direction.
    """

    mode: str
    torch_function: Callable[..., Any] | None
    torch_step: Callable[..., Any] | None
    keeps_state_dtype: bool
    onnx_type: str | None
    onnx_gates: tuple[int, ...]
    onnx_attributes: dict[str, Any]


def _elman(mode: str, activation: str, function: Any = None, step: Any = None) -> TorchFacts:
    return TorchFacts(mode, function, step, False, "RNN", (0,), {"activations": [activation]})


# LSTM gates are i,f,g,o in torch and i,o,f,g in ONNX; GRU gates are r,z,n and z,r,n.
TORCH: dict[str, TorchFacts] = {
    "rnn_tanh": _elman("RNN_TANH", "Tanh", VF.rnn_tanh, VF.rnn_tanh_cell),
    "rnn_relu": _elman("RNN_RELU", "Relu", VF.rnn_relu, VF.rnn_relu_cell),
    "rnn_sigmoid": _elman("RNN_SIGMOID", "Sigmoid"),
    "lstm": TorchFacts("LSTM", VF.lstm, VF.lstm_cell, False, "LSTM", (0, 3, 1, 2), {}),
    "gru": TorchFacts(
        "GRU", VF.gru, VF.gru_cell, True, "GRU", (1, 0, 2), {"linear_before_reset": 1}
    ),
}


def torch_facts(cell: str) -> TorchFacts:
    """Returns the facts about a cell. torch and ONNX have no cells besides those in `TORCH`."""
    return TORCH.get(cell) or TorchFacts(cell.upper(), None, None, False, None, (), {})


#: The names of the operators' results. Bit i of an operator's ``outputs`` requests result i.
FORWARD_OUTPUTS = ("y", "h_n", "c_n", "saved")
GRADIENT_OUTPUTS = ("d_x", "d_h0", "d_c0", "d_h_all", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh")


@dataclass(frozen=True)
class CellSpec:
    """Properties of a cell. A "column" is H wide.

    All except ``torch`` come from ``fastrnn._C.cells()``, or from `fastrnn.define_cell`.

    Attributes:
        name: the cell's name in the kernels' registry.
        gates: G, gate columns of ``w_ih``, ``w_hh`` and the biases.
        saved: S, columns that the forward pass saves for the backward pass.
        pre: Q, columns of the gradient of the pre-activations.
        pre_x: for each gate, the pre-activation column to which the input side (``w_ih``,
            ``b_ih``) contributes.
        pre_h: the same for the hidden side (``w_hh``, ``b_hh``).
        states: h and the cell states; a layer holds the cell states side by side in c.
        parameters: E, values per unit that are the same at every step, in ``w_unit``.
        dense: whether there is a recurrent product: ``w_hh`` and ``b_hh``.
        projects: whether a layer of this cell may have a projection.
        reduced: whether there are CPU kernels that multiply float16, bfloat16 and int8 as they are
            stored; otherwise half types are computed in float32 copies.
        torch: the facts about torch.
        defined: whether `fastrnn.define_cell` has made the cell.
        second_gates: the last gates, which a second product of the step computes; 0 for most cells.
        loops_only: whether only the time loops with options run the cell.
        least_hidden: the smallest H for which there are kernels.
        ranges_x, ranges_h: ``pre_x`` and ``pre_h`` as ranges, so that products are few and large.
        inference_outputs, training_outputs: the results to request from ``recurrent_forward``.
        cell_states: C, states besides h.
        gradient_columns: columns of d_pre: the pre-activations, then the parameters.
    """

    name: str
    gates: int
    saved: int
    pre: int
    pre_x: tuple[int, ...]
    pre_h: tuple[int, ...]
    states: int
    parameters: int
    dense: bool
    projects: bool
    reduced: bool
    torch: TorchFacts
    defined: bool = False
    second_gates: int = 0
    loops_only: bool = False
    least_hidden: int = 0
    ranges_x: tuple[ColumnRange, ...] = field(init=False)
    ranges_h: tuple[ColumnRange, ...] = field(init=False)
    inference_outputs: int = field(init=False)
    training_outputs: int = field(init=False)
    has_cell_state: bool = field(init=False)
    cell_states: int = field(init=False)
    gradient_columns: int = field(init=False)

    def __post_init__(self) -> None:
        outputs = 0b0111 if self.states > 1 else 0b0011
        for name, value in (
            ("ranges_x", _column_ranges(self.pre_x)),
            ("ranges_h", _column_ranges(self.pre_h)),
            ("inference_outputs", outputs),
            ("training_outputs", outputs | 1 << FORWARD_OUTPUTS.index("saved")),
            ("has_cell_state", self.states > 1),
            ("cell_states", self.states - 1),
            ("gradient_columns", self.pre + self.parameters),
        ):
            object.__setattr__(self, name, value)

    @property
    def mode(self) -> str:
        return self.torch.mode

    @property
    def has_options(self) -> bool:
        """Whether there are kernels with layer normalisation, zoneout and recurrent dropout."""
        has_loops = self.states == 1 or without_variant(self.name) == "lstm"
        return self.dense and self.parameters == 0 and has_loops and not self.defined

    def slots(self, has_biases: bool, has_projection: bool = False) -> int:
        """Returns the mask of weight slots of a layer."""
        slots = slots_of(has_biases, has_projection)
        if not self.dense:
            slots &= ~RECURRENT
        return slots | UNIT if self.parameters else slots


def _spec(name: str, facts: _C.CellFacts, loops_only: bool = False) -> CellSpec:
    return CellSpec(
        name=name,
        gates=facts["gates"],
        saved=facts["saved"],
        pre=facts["pre"],
        pre_x=tuple(facts["pre_x"]),
        pre_h=tuple(facts["pre_h"]),
        states=facts["states"],
        parameters=facts["parameters"],
        dense=facts["dense"],
        projects=facts["projects"],
        reduced=facts["reduced"],
        torch=torch_facts(name),
        second_gates=facts["gates"] - facts["first_gates"],
        loops_only=loops_only,
    )


CELLS: dict[str, CellSpec] = {name: _spec(name, facts) for name, facts in _C.cells().items()}
#: names of the cells of the kernels' library; `CELLS` also gets those of `fastrnn.define_cell`
BUILT_IN: tuple[str, ...] = tuple(CELLS)

#: the names of cells of `fastrnn.define_cell` that have kernels
COMPILED: set[str] = set()

#: cells that only the time loops with options run (csrc/cells/loop_cells.h)
LOOP_CELLS: dict[str, CellSpec] = {
    name: _spec(name, facts, loops_only=True) for name, facts in _C.loop_cells().items()
}
#: the cells that the operator ``recurrence`` may run
RECURRENCE_CELLS: dict[str, CellSpec] = {**CELLS, **LOOP_CELLS}

BY_MODE: dict[str, CellSpec] = {spec.mode: spec for spec in RECURRENCE_CELLS.values()}


#: before the name of a cell whose gates see the cell state
PEEPHOLE = "peephole_"


def variant_of(cell: str, hard_gates: bool, reset_after: bool = True) -> str:
    """Returns the name of a cell with hard gates, or with the reset gate before the product."""
    return cell + ("" if reset_after else "_reset_before") + ("_hard_sigmoid" if hard_gates else "")


def without_variant(cell: str) -> str:
    """Returns the name of the cell that options have made the cell of this name from."""
    plain = cell.removesuffix("_hard_sigmoid").removesuffix("_reset_before")
    return plain.removeprefix(PEEPHOLE)


def plain_spec(mode: str) -> CellSpec:
    """Returns the cell of a module of this mode without its options."""
    spec = BY_MODE[mode]
    return spec if spec.defined else RECURRENCE_CELLS[without_variant(spec.name)]


class DirectionWeights(NamedTuple):
    """The weights of one layer and direction, by slot in the order of csrc/torch/slots.h.

    ``w_ih`` [G*H,I], ``w_hh`` [G*H,R], ``b_ih`` and ``b_hh`` [G*H] or None, ``w_hr`` [P,H] or None;
    R is P with a projection and H without. ``w_unit`` [E*H] for a cell with parameters, else None.
    A cell that is not dense has neither ``w_hh`` nor ``b_hh``. With layer normalisation ``gain_ih``
    and ``gain_hh`` [G*H], and for an LSTM ``gain_c`` [H] and ``bias_c`` [H] or None.
    """

    w_ih: Tensor
    w_hh: Tensor | None
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    w_unit: Tensor | None = None
    gain_ih: Tensor | None = None
    gain_hh: Tensor | None = None
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None


WEIGHT_SLOTS = DirectionWeights._fields

#: bits from here on represent the sequence slots of csrc/torch/slots.h, bits below weight slots
FIRST_SEQUENCE_SLOT = 16
WEIGHT_BITS = (1 << FIRST_SEQUENCE_SLOT) - 1

#: masks of weight slots: bit i represents slot i
MATRICES = 0b000011
BIASES = 0b001100
PROJECTION = 0b010000
UNIT = 0b100000
#: the slots of layer normalisation: of every cell, of a cell with a cell state, of its bias
NORM, NORM_CELL, NORM_CELL_BIAS = 0b011000000, 0b100000000, 0b1000000000
#: the slot of layer normalisation of the input side alone
GAIN_IH = 0b001000000
#: the slots of the recurrent product
RECURRENT = 0b001010

#: the slots of each mask, in order
_PRESENT: dict[int, tuple[int, ...]] = {
    mask: tuple(slot for slot in range(len(WEIGHT_SLOTS)) if mask >> slot & 1)
    for mask in range(1 << len(WEIGHT_SLOTS))
}


def slots_of(has_biases: bool, has_projection: bool) -> int:
    """Returns the mask of weight slots of a layer of a cell of torch."""
    return MATRICES | (BIASES if has_biases else 0) | (PROJECTION if has_projection else 0)


def slots_of_names(names: Sequence[str]) -> int:
    """Returns the mask for a module's parameter names, such as ``weight_ih_l0``."""
    slots = MATRICES | BIASES if "bias_ih_l0" in names else MATRICES
    if "weight_hh_l0" not in names:
        slots &= ~RECURRENT
    return slots | PROJECTION if "weight_hr_l0" in names else slots


def present(slots: int) -> tuple[int, ...]:
    """Returns the weight slots of a mask, in order."""
    return _PRESENT[slots & WEIGHT_BITS]


class Weights(NamedTuple):
    """The weights of one or more layers: ``flat`` holds ``slots`` of each layer and direction."""

    flat: Sequence[Tensor]
    slots: int

    def has(self, mask: int) -> bool:
        return self.slots & mask != 0

    def directions(self) -> list[DirectionWeights]:
        """Returns the weights of each layer and direction by name."""
        slots = present(self.slots)
        count = len(slots)
        result = []
        for first in range(0, len(self.flat), count):
            own: list[Any] = [None] * len(WEIGHT_SLOTS)
            for position, slot in enumerate(slots):
                own[slot] = self.flat[first + position]
            result.append(DirectionWeights(*own))
        return result


#: number of the format in which the CPU may hold w_hh, by weight_dtype
WEIGHT_FORMATS: dict[torch.dtype | None, int] = {
    None: 0,
    **{getattr(torch, name): n for n, name in enumerate(_C.weight_formats()) if n > 0},
}
