"""One line a cell: the sizes that the Python side has to know about each recurrent cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Pre-activation columns that lie side by side and belong to gates that lie side by side."""

    column: int
    gate: int
    width: int

    def columns(self, hidden: int) -> slice:
        """Where the run lies in Q*H columns."""
        return slice(self.column * hidden, (self.column + self.width) * hidden)

    def gate_rows(self, hidden: int) -> slice:
        """Where the run lies in G*H rows of a weight."""
        return slice(self.gate * hidden, (self.gate + self.width) * hidden)


def _runs(columns: tuple[int, ...]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for gate, column in enumerate(columns):
        if runs and column == runs[-1].column + runs[-1].width:
            runs[-1] = runs[-1]._replace(width=runs[-1].width + 1)
        else:
            runs.append(Run(column, gate, 1))
    return tuple(runs)


@dataclass(frozen=True)
class CellSpec:
    """What a cell looks like from outside its kernels. A "column" is H wide.

    Attributes:
        name: the cell's name in the kernels' registry.
        gates: G, gate columns of ``w_ih``, ``w_hh`` and the biases.
        saved: S, columns that the forward pass keeps for the backward pass.
        pre: Q, columns of the gradient of the pre-activations.
        pre_x: for each gate, the pre-activation column that the input side (``w_ih``, ``b_ih``)
            feeds.
        pre_h: the same for the hidden side (``w_hh``, ``b_hh``).
        states: 2 if there is a cell state c beside h, else 1.
        mode: the name ``torch.nn.RNNBase`` gives this cell.
        torch_step: torch's own single step of this cell, None if it has none.
        runs_x, runs_h: ``pre_x`` and ``pre_h`` as runs of neighbours, for few large products.
    """

    name: str
    gates: int
    saved: int
    pre: int
    pre_x: tuple[int, ...]
    pre_h: tuple[int, ...]
    states: int
    mode: str
    torch_step: Callable[..., Any] | None
    runs_x: tuple[Run, ...] = field(init=False)
    runs_h: tuple[Run, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs_x", _runs(self.pre_x))
        object.__setattr__(self, "runs_h", _runs(self.pre_h))

    @property
    def has_cell_state(self) -> bool:
        return self.states == 2


# gate order i,f,g,o and r,z,n; a GRU keeps both sides of n apart: pre-activations r,z,hn,xn
CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", 1, 0, 1, (0,), (0,), 1, "RNN_TANH", torch._VF.rnn_tanh_cell),
        CellSpec("rnn_relu", 1, 0, 1, (0,), (0,), 1, "RNN_RELU", torch._VF.rnn_relu_cell),
        CellSpec("rnn_sigmoid", 1, 0, 1, (0,), (0,), 1, "RNN_SIGMOID", None),
        CellSpec("lstm", 4, 5, 4, (0, 1, 2, 3), (0, 1, 2, 3), 2, "LSTM", torch._VF.lstm_cell),
        CellSpec("gru", 3, 4, 4, (0, 1, 3), (0, 1, 2), 1, "GRU", torch._VF.gru_cell),
    )
}

BY_MODE: dict[str, CellSpec] = {spec.mode: spec for spec in CELLS.values()}


class DirectionWeights(NamedTuple):
    """The parameters of one layer and direction, in torch's flat order.

    ``w_ih`` [G*H,I], ``w_hh`` [G*H,R], ``b_ih`` and ``b_hh`` [G*H] or None, ``w_hr`` [P,H] or None;
    R is P with a projection and H without.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def split_weights(weights: Sequence[Tensor], directions: int) -> list[DirectionWeights]:
    """Names the flat weights of one layer: 2, 3, 4 or 5 of them a direction say what is there."""
    count = len(weights) // directions
    result = []
    for start in range(0, count * directions, count):
        part = weights[start : start + count]
        has_bias = count >= 4
        result.append(
            DirectionWeights(
                part[0],
                part[1],
                part[2] if has_bias else None,
                part[3] if has_bias else None,
                part[-1] if count in (3, 5) else None,
            )
        )
    return result
