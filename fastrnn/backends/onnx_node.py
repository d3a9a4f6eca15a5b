"""Layers as nodes of an ONNX graph, for ``torch.onnx.export(..., dynamo=True)``.

A layer of D directions becomes one standard node, whatever its T and B::

    x [T,B,I] -> RNN | GRU | LSTM -> Y [T,D,B,H] -> Transpose [T,B,D,H] -> Reshape y [T,B,D*H]

with its gates in ONNX's order. The older exporter, ``dynamo=False``, translates torch's own
operators instead, so `fastrnn.backends.torch_builtin` is used for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.conditions import unsupported_tensors
from fastrnn.layer_call import LayerCall, Results
from fastrnn.spec import CellSpec
from fastrnn.tracing import is_in_onnx_export, is_tracing, size

NAME = "ONNX node"
WHOLE_STACK = False


def unsupported(call: LayerCall) -> str:
    if not is_in_onnx_export():
        return "no ONNX graph is captured"
    if is_tracing():
        return "the older ONNX exporter cannot create this node"
    if call.is_step:
        return "ONNX has no single steps"
    if call.spec.torch.onnx_type is None:
        return "ONNX has no node for {cell}"
    return unsupported_tensors(call)


def run(call: LayerCall) -> Results:
    """Adds one layer to the graph as a node.

    Raises:
        RuntimeError: the input is packed or the LSTM has a projection.
    """
    check_projection(call)
    spec, x, sequence, h0, c0, weights, _ = call
    node_type = spec.torch.onnx_type
    assert node_type is not None, "see unsupported"
    if sequence.flat:
        raise RuntimeError(
            "torch.onnx.export: ONNX has no packed sequences, expected a padded input, got a "
            "PackedSequence"
        )
    directions, batch, hidden = h0.shape[0], x.shape[1], h0.shape[2]
    per_direction = weights.directions()
    inputs: list[Tensor | None] = [
        x,
        torch.stack([_in_order(w.w_ih, spec) for w in per_direction]),
        torch.stack([_in_order(w.w_hh, spec) for w in per_direction if w.w_hh is not None]),
        None,
        None,  # lengths: all sequences are as long as x
        h0,
    ]
    biases = [
        torch.cat((_in_order(w.b_ih, spec), _in_order(w.b_hh, spec)))
        for w in per_direction
        if w.b_ih is not None and w.b_hh is not None
    ]
    if biases:
        inputs[3] = torch.stack(biases)
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
        **spec.torch.onnx_attributes,
    }
    if "activations" in attributes:  # one per direction
        attributes["activations"] = attributes["activations"] * directions
    shapes: list[Sequence[int | torch.SymInt]] = [
        (x.shape[0], directions, batch, hidden),
        h0.shape,
    ]
    if c0 is not None:
        inputs.append(c0)
        shapes.append(c0.shape)
    y, *states = torch.onnx.ops.symbolic_multi_out(
        node_type, inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    y = y.transpose(1, 2).reshape(x.shape[0], batch, directions * hidden)
    return y, states[0], states[1] if c0 is not None else None


def check_projection(call: LayerCall) -> None:
    """Raises for an LSTM whose outputs [..,R] are not as wide as its cell state [..,H]."""
    if call.c0 is None:
        return
    projected, hidden = size(call.h0, -1), size(call.c0, -1)
    if projected != hidden:
        raise RuntimeError(
            "torch.onnx.export: ONNX has no LSTM with a projection, expected proj_size 0, "
            f"got {projected}"
        )


def _in_order(weight: Tensor, spec: CellSpec) -> Tensor:
    """Returns a weight [G*H,...] with its gates in ONNX's order."""
    order = spec.torch.onnx_gates
    if len(order) == 1:
        return weight
    hidden = weight.shape[0] // spec.gates
    # slices, because the exporter folds slices of a constant but not chunks
    return torch.cat([weight[g * hidden : (g + 1) * hidden] for g in order])
