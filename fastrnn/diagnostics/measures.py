"""The measures: spectral radius, activations of gates, saturation, norms."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn.spec import DirectionWeights

#: for each cell, the names of its gates in order; a cell without an entry has no named gates
GATES: Final[dict[str, str]] = {
    "rnn_tanh": "h",
    "rnn_relu": "h",
    "rnn_sigmoid": "h",
    "lstm": "ifgo",
    "gru": "rzn",
}
_TANH: Final = {("rnn_tanh", "h"), ("lstm", "g"), ("gru", "n")}
#: activations beyond these bounds count as saturated
SIGMOID_BOUNDS: Final = (0.1, 0.9)
TANH_BOUNDS: Final = (-0.9, 0.9)


def gate_names(cell: str, gates: int) -> list[str]:
    """Returns the names of a cell's G gates; their numbers if the cell has no names for them."""
    return list(GATES[cell]) if cell in GATES else [str(gate) for gate in range(gates)]


def gate_activations(cell: str, x: Tensor, h: Tensor, w: DirectionWeights) -> dict[str, Tensor]:
    """Returns the activations of the gates that saturate; none for ReLU and for unnamed gates.

    Args:
        cell: name of the cell.
        x: [N,I], one row per sequence and step.
        h: [N,R], the states before these steps.
        w: weights of the direction.

    Returns:
        For each gate, [N,H].
    """
    if cell not in GATES or cell == "rnn_relu" or w.w_hh is None:
        return {}
    names = GATES[cell]
    from_x = linear(x, w.w_ih, w.b_ih).chunk(len(names), dim=-1)
    from_h = list(linear(h, w.w_hh, w.b_hh).chunk(len(names), dim=-1))
    if cell == "gru":  # n = tanh(xn + r*hn)
        from_h[2] = torch.sigmoid(from_x[0] + from_h[0]) * from_h[2]
    return {
        name: (torch.tanh if (cell, name) in _TANH else torch.sigmoid)(a + b)
        for name, a, b in zip(names, from_x, from_h, strict=True)
    }


def count_saturated(cell: str, gate: str, activation: Tensor) -> Tensor:
    """Returns [2], the numbers of activations below the lower and above the upper bound."""
    low, high = TANH_BOUNDS if (cell, gate) in _TANH else SIGMOID_BOUNDS
    return torch.stack([(activation < low).sum(), (activation > high).sum()]).cpu()


def spectral_radii(w: DirectionWeights, gates: int) -> Tensor:
    """Returns [G], for each gate the largest absolute eigenvalue of its block of ``w_hh``.

    With a projection h = w_hr h', the block [H,P] is first multiplied by ``w_hr`` [P,H]. A matrix
    with infinities or NaNs has the radius NaN. A cell without ``w_hh`` has no radii: [0].
    """
    if w.w_hh is None:
        return torch.empty(0, dtype=torch.float64)
    blocks = exact(w.w_hh).unflatten(0, (gates, -1))
    if w.w_hr is not None:
        blocks = exact(w.w_hr) @ blocks
    return torch.stack([_spectral_radius(block) for block in blocks])


def _spectral_radius(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):  # eigvals would raise
        return matrix.new_tensor(float("nan"))
    radius: Tensor = torch.linalg.eigvals(matrix).abs().max()
    return radius


def norms(tensors: list[Tensor]) -> Tensor:
    """Returns [T], the 2-norm of each tensor. float64, because squares may overflow float32."""
    return torch.stack([torch.linalg.vector_norm(exact(tensor)) for tensor in tensors])


def exact(t: Tensor) -> Tensor:
    """Returns the values as float64 on the CPU, without a graph."""
    return t.detach().to("cpu", torch.float64)
