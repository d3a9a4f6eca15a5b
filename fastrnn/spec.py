"""The cells and the weights as Python sees them: the kernels' contract, and facts about torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastrnn import _C
from fastrnn._torch_internals import VF


class Run(NamedTuple):
    """Neighbouring pre-activation columns that belong to neighbouring gates."""

    column: int
    gate: int
    width: int

    def columns(self, hidden: int) -> slice:
        """The place of the run in Q*H columns."""
        return slice(self.column * hidden, (self.column + self.width) * hidden)

    def gate_rows(self, hidden: int) -> slice:
        """The place of the run in G*H rows of a weight."""
        return slice(self.gate * hidden, (self.gate + self.width) * hidden)


def _runs(columns: Sequence[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for gate, column in enumerate(columns):
        if runs and column == runs[-1].column + runs[-1].width:
            runs[-1] = runs[-1]._replace(width=runs[-1].width + 1)
        else:
            runs.append(Run(column, gate, 1))
    return tuple(runs)


class TorchFacts(NamedTuple):
    """The names and rules that torch, autocast and ONNX have for a cell.

    Attributes:
        mode: the name of the cell in a module's ``mode``; torch's own where torch has the cell.
        torch_function: torch's own layer, in ``torch._VF``; None if torch has none.
        torch_step: torch's own single step; None if torch has none.
        keeps_state_dtype: whether autocast on the CPU leaves a state of a wider type as it is.
        onnx_type: the node of ONNX; None if ONNX has none.
        onnx_gates: ONNX's gates by their places in torch.
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


# Gates in torch: i,f,g,o and r,z,n; in ONNX: i,o,f,g and z,r,n.
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
    """The facts about a cell; for a cell that is not in `TORCH`, that torch and ONNX lack it."""
    return TORCH.get(cell) or TorchFacts(cell.upper(), None, None, False, None, (), {})


#: Bit i of an operator's ``outputs`` asks for its result i; these are the names of the results.
FORWARD_OUTPUTS = ("y", "h_n", "c_n", "saved")
GRADIENT_OUTPUTS = ("d_x", "d_h0", "d_c0", "d_h_all", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh")


@dataclass(frozen=True)
class CellSpec:
    """A cell as seen from outside its kernels. A "column" is H wide.

    All but ``torch`` comes from ``fastrnn._C.cells()``.

    Attributes:
        name: the cell's name in the kernels' registry.
        gates: G, gate columns of ``w_ih``, ``w_hh`` and the biases.
        saved: S, columns that the forward pass keeps for the backward pass.
        pre: Q, columns of the gradient of the pre-activations.
        pre_x: for each gate, the pre-activation column that the input side (``w_ih``, ``b_ih``)
            feeds.
        pre_h: the same for the hidden side (``w_hh``, ``b_hh``).
        states: 2 if there is a cell state c next to h, else 1.
        torch: the facts about torch.
        runs_x, runs_h: ``pre_x`` and ``pre_h`` as runs of neighbours, for few large products.
        inference_outputs, training_outputs: the results of ``recurrent_forward`` to ask for.
    """

    name: str
    gates: int
    saved: int
    pre: int
    pre_x: tuple[int, ...]
    pre_h: tuple[int, ...]
    states: int
    torch: TorchFacts
    runs_x: tuple[Run, ...] = field(init=False)
    runs_h: tuple[Run, ...] = field(init=False)
    inference_outputs: int = field(init=False)
    training_outputs: int = field(init=False)
    has_cell_state: bool = field(init=False)

    def __post_init__(self) -> None:
        outputs = 0b0111 if self.states == 2 else 0b0011
        for name, value in (
            ("runs_x", _runs(self.pre_x)),
            ("runs_h", _runs(self.pre_h)),
            ("inference_outputs", outputs),
            ("training_outputs", outputs | 1 << FORWARD_OUTPUTS.index("saved")),
            ("has_cell_state", self.states == 2),
        ):
            object.__setattr__(self, name, value)

    @property
    def mode(self) -> str:
        return self.torch.mode


def _spec(name: str, facts: _C.CellFacts) -> CellSpec:
    return CellSpec(
        name=name,
        gates=facts["gates"],
        saved=facts["saved"],
        pre=facts["pre"],
        pre_x=tuple(facts["pre_x"]),
        pre_h=tuple(facts["pre_h"]),
        states=facts["states"],
        torch=torch_facts(name),
    )


CELLS: dict[str, CellSpec] = {name: _spec(name, facts) for name, facts in _C.cells().items()}

BY_MODE: dict[str, CellSpec] = {spec.mode: spec for spec in CELLS.values()}


class DirectionWeights(NamedTuple):
    """The parameters of one layer and direction, by slot in the order of csrc/torch/slots.h.

    ``w_ih`` [G*H,I], ``w_hh`` [G*H,R], ``b_ih`` and ``b_hh`` [G*H] or None, ``w_hr`` [P,H] or None;
    R is P with a projection and H without.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


WEIGHT_SLOTS = DirectionWeights._fields

#: masks of weight slots: bit i stands for slot i
MATRICES = 0b00011
BIASES = 0b01100
PROJECTION = 0b10000

#: the slots of a mask, in their order
_PRESENT: dict[int, tuple[int, ...]] = {
    mask: tuple(slot for slot in range(len(WEIGHT_SLOTS)) if mask >> slot & 1)
    for mask in range(1 << len(WEIGHT_SLOTS))
}


def slots_of(has_biases: bool, has_projection: bool) -> int:
    """The mask of weight slots of a layer."""
    return MATRICES | (BIASES if has_biases else 0) | (PROJECTION if has_projection else 0)


def slots_of_names(names: Sequence[str]) -> int:
    """The mask of a module's parameters, which `torch.nn` names ``weight_ih_l0`` and so on."""
    slots = MATRICES | BIASES if "bias_ih_l0" in names else MATRICES
    return slots | PROJECTION if "weight_hr_l0" in names else slots


def present(slots: int) -> tuple[int, ...]:
    """The slots of a mask, in their order."""
    return _PRESENT[slots]


class Weights(NamedTuple):
    """The weights of one or more layers: ``flat`` holds ``slots`` of each layer and direction."""

    flat: Sequence[Tensor]
    slots: int

    def has(self, mask: int) -> bool:
        return self.slots & mask != 0

    def directions(self) -> list[DirectionWeights]:
        """The parameters of each layer and direction by name."""
        slots = _PRESENT[self.slots]
        count = len(slots)
        result = []
        for first in range(0, len(self.flat), count):
            own: list[Any] = [None] * len(WEIGHT_SLOTS)
            for position, slot in enumerate(slots):
                own[slot] = self.flat[first + position]
            result.append(DirectionWeights(*own))
        return result
