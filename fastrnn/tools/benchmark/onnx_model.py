"""Export of a ``torch.nn`` layer as an ONNX model of standard RNN, GRU and LSTM nodes.

Each stacked layer, with D directions and T steps, becomes three nodes::

    x [T,B,I] -> RNN | GRU | LSTM -> Y [T,D,B,H] -> Transpose [T,B,D,H] -> Reshape x' [T,B,D*H]

The last x' is the output. Rows beyond the length of a sequence are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .shapes import GATES, Shape

if TYPE_CHECKING:
    from onnx import ModelProto

#: index in torch (gru: r,z,n; lstm: i,f,g,o) of each gate of ONNX (gru: z,r,n; lstm: i,o,f,g)
GATE_ORDER = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
OPSET = 17
IR_VERSION = 8  # the oldest IR version of opset 17, which every runtime reads


def onnx_model(cell: str, shape: Shape, weights: Mapping[str, Tensor]) -> ModelProto:
    """Returns the ONNX model of a layer.

    Args:
        cell: one of `shapes.CELLS`.
        shape: shape of the layer. A packed shape adds a second input, ``lengths`` [B] int32.
        weights: ``state_dict`` of a ``torch.nn`` layer with biases.

    Returns:
        A model from ``x`` [T,B,I] to ``output`` [T,B,D*H], float32.
    """
    from onnx import TensorProto, helper, numpy_helper

    directions, hidden = shape.directions, shape.hidden_size
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.numpy(), name))
        return name

    def stacked(name: str, layer: int) -> Tensor:
        """Returns a parameter of both directions, [D,G*H,...], in ONNX's order of gates."""
        per_direction = [
            weights[f"{name}_l{layer}{suffix}"] for suffix in ("", "_reverse")[:directions]
        ]
        gates = torch.stack(per_direction).reshape(directions, GATES[cell], hidden, -1)
        return gates[:, GATE_ORDER[cell]].reshape(directions, GATES[cell] * hidden, -1)

    output_shape = constant("shape", torch.tensor([shape.steps, shape.batch, directions * hidden]))
    x = "x"
    for layer in range(shape.layers):
        biases = torch.cat([stacked("bias_ih", layer), stacked("bias_hh", layer)], dim=1)
        inputs = [
            x,
            constant(f"w_ih{layer}", stacked("weight_ih", layer)),
            constant(f"w_hh{layer}", stacked("weight_hh", layer)),
            constant(f"bias{layer}", biases[..., 0]),
            "lengths" if shape.packed else "",
        ]
        settings: dict[str, Any] = {"linear_before_reset": 1} if cell == "gru" else {}
        nodes.append(
            helper.make_node(
                cell.upper(),
                inputs,
                [f"y{layer}"],
                hidden_size=hidden,
                direction="bidirectional" if shape.bidirectional else "forward",
                **settings,
            )
        )
        last = layer == shape.layers - 1
        x = "output" if last else f"x{layer + 1}"
        nodes.append(helper.make_node("Transpose", [f"y{layer}"], [f"z{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"z{layer}", output_shape], [x]))

    def value(name: str, *sizes: int, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, sizes)

    given = [value("x", shape.steps, shape.batch, shape.input_size)]
    if shape.packed:
        given.append(value("lengths", shape.batch, kind=TensorProto.INT32))
    returned = [value("output", shape.steps, shape.batch, directions * hidden)]
    graph = helper.make_graph(nodes, "layer", given, returned, constants)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
