"""Layers as nodes of an ONNX graph, for ``torch.onnx.export(..., dynamo=True)``.

A layer of D directions becomes one standard node, whatever its T and B::

    x [T,B,I] -> RNN | GRU | LSTM -> Y [T,D,B,H] -> Transpose [T,B,D,H] -> Reshape y [T,B,D*H]

with its gates in ONNX's order. (The older exporter, ``dynamo=False``, has rules of its own for
torch's operators, which `fastrnn.functional` gives it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.spec import CellSpec, split_weights

#: ONNX's gates (gru: z,r,n; lstm: i,o,f,g) by their places in torch (gru: r,z,n; lstm: i,f,g,o)
GATE_ORDER = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu", "rnn_sigmoid": "Sigmoid"}


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer as a node. Arguments and results are those of `fastrnn.reference.layer`.

    Raises:
        RuntimeError: ONNX's nodes have no packed rows and no projection.
    """
    if batch_sizes is not None:
        raise RuntimeError(
            "torch.onnx.export: ONNX has no packed sequences, expected a padded input, got a "
            "PackedSequence"
        )
    directions, batch, hidden = h0.shape[0], x.shape[1], h0.shape[2]
    ways = split_weights(weights, directions)
    if c0 is not None:
        check_projection(hidden, c0.shape[2])
    inputs: list[Tensor | None] = [
        x,
        torch.stack([_in_order(w.w_ih, spec) for w in ways]),
        torch.stack([_in_order(w.w_hh, spec) for w in ways]),
        None,
        None,  # lengths: all sequences are as long as x
        h0,
    ]
    biases = [
        torch.cat((_in_order(w.b_ih, spec), _in_order(w.b_hh, spec)))
        for w in ways
        if w.b_ih is not None and w.b_hh is not None
    ]
    if biases:
        inputs[3] = torch.stack(biases)
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if spec.name in ACTIVATIONS:
        attributes["activations"] = [ACTIVATIONS[spec.name]] * directions
    if spec.name == "gru":
        attributes["linear_before_reset"] = 1
    shapes: list[Sequence[int | torch.SymInt]] = [
        (x.shape[0], directions, batch, hidden),
        h0.shape,
    ]
    if c0 is not None:
        inputs.append(c0)
        shapes.append(c0.shape)
    y, *states = torch.onnx.ops.symbolic_multi_out(
        spec.mode.split("_")[0], inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    y = y.transpose(1, 2).reshape(x.shape[0], batch, directions * hidden)
    return y, states[0], states[1] if c0 is not None else None


def check_projection(size: int, hidden: int) -> None:
    """Raises for an LSTM whose outputs [..,R] are not as wide as its cell state [..,H]."""
    if size != hidden:
        raise RuntimeError(
            "torch.onnx.export: ONNX has no LSTM with a projection, expected proj_size 0, "
            f"got {size}"
        )


def _in_order(weight: Tensor, spec: CellSpec) -> Tensor:
    """The gates [G*H,...] of a weight in ONNX's order."""
    if spec.name not in GATE_ORDER:
        return weight
    hidden = weight.shape[0] // spec.gates
    # slices of a constant are folded by the exporter, chunks are not
    return torch.cat([weight[g * hidden : (g + 1) * hidden] for g in GATE_ORDER[spec.name]])
