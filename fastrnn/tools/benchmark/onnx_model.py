"""Export of a ``torch.nn`` layer as an ONNX model of standard RNN, GRU and LSTM nodes.

An LSTM with int8 weights is ONNX Runtime's own node, ``DynamicQuantizeLSTM``.

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
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
IR_VERSION = 8  # the oldest IR version of opset 17, which every runtime reads


def onnx_model(
    cell: str, shape: Shape, weights: Mapping[str, Tensor], int8: bool = False
) -> ModelProto:
    """Returns the ONNX model of a layer.

    Args:
        cell: one of `shapes.CELLS`.
        shape: shape of the layer. A packed shape adds a second input, ``lengths`` [B] int32.
        weights: ``state_dict`` of a ``torch.nn`` layer with biases.
        int8: rounds the weight matrices to int8, with a scale per row. ``cell`` must be ``lstm``.

    Returns:
        A model from ``x`` [T,B,I] to ``output`` [T,B,D*H], float32.
    """
    if int8 and cell != "lstm":
        raise ValueError(f"onnx_model: cell must be 'lstm' for int8, got {cell!r}.")
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

    def quantized(name: str, layer: int) -> tuple[str, list[str]]:
        """Returns a matrix as int8 [D,K,G*H], and its scales and zero points [D,G*H]."""
        rows = stacked(name, layer)
        scales = rows.abs().amax(-1).clamp_min(1e-30) / 127
        integers = (rows / scales.unsqueeze(-1)).round().to(torch.int8).transpose(1, 2).contiguous()
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        facts = [constant(f"{name}{layer}_scale", scales), constant(f"{name}{layer}_zero", zeros)]
        return constant(f"{name}{layer}", integers), facts

    output_shape = constant("shape", torch.tensor([shape.steps, shape.batch, directions * hidden]))
    x = "x"
    for layer in range(shape.layers):
        biases = torch.cat([stacked("bias_ih", layer), stacked("bias_hh", layer)], dim=1)
        rest = [constant(f"bias{layer}", biases[..., 0]), "lengths" if shape.packed else ""]
        settings: dict[str, Any] = {"linear_before_reset": 1} if cell == "gru" else {}
        if int8:
            (w_ih, facts_ih), (w_hh, facts_hh) = (
                quantized(name, layer) for name in ("weight_ih", "weight_hh")
            )
            no_states = ["", "", ""]  # h0, c0, peepholes
            inputs = [x, w_ih, w_hh, *rest, *no_states, *facts_ih, *facts_hh]
            settings["domain"] = CONTRIB
        else:
            w_ih = constant(f"w_ih{layer}", stacked("weight_ih", layer))
            w_hh = constant(f"w_hh{layer}", stacked("weight_hh", layer))
            inputs = [x, w_ih, w_hh, *rest]
        nodes.append(
            helper.make_node(
                "DynamicQuantizeLSTM" if int8 else cell.upper(),
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
    domains = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * int8
    return helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION)
