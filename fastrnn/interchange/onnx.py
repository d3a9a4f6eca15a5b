"""Nodes LSTM, GRU and RNN of an ONNX model.

========== ============ ============================================================
W          [D,G*H,I]    input weights, gates in the order of ``TorchFacts.onnx_gates``
R          [D,G*H,H]    recurrent weights
B          [D,2*G*H]    optional: biases of x, then of h
========== ============ ============================================================

Source: the operators' specifications, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastrnn.checks import describe
from fastrnn.interchange.reverse import Reversed
from fastrnn.interchange.weights import as_tensor, build, check_shape, from_order
from fastrnn.spec import CELLS, TORCH, DirectionWeights

_OWNER = "from_onnx"

_TYPES = ("LSTM", "GRU", "RNN")

_DIRECTIONS = {b"forward": 1, b"reverse": 1, b"bidirectional": 2}

#: activations of one direction that fastrnn computes, in lower case, and the cell with them
_ACTIVATIONS: dict[str, dict[tuple[str, ...], str]] = {
    "LSTM": {("sigmoid", "tanh", "tanh"): "lstm", ("hardsigmoid", "tanh", "tanh"): "lstm"},
    "GRU": {("sigmoid", "tanh"): "gru", ("hardsigmoid", "tanh"): "gru"},
    "RNN": {("tanh",): "rnn_tanh", ("relu",): "rnn_relu", ("sigmoid",): "rnn_sigmoid"},
}

#: a and b of ONNX's HardSigmoid, max(0, min(1, a*x + b)), if a node does not give them
_HARD_SIGMOID = (0.2, 0.5)
#: the candidate of a cell in fastrnn's order, whose activation is tanh
_CANDIDATE = {"lstm": 2, "gru": 2}


def from_onnx(
    model: Any,
    *,
    name: str | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Returns fastrnn modules for the LSTM, GRU and RNN nodes of an ONNX model.

        modules = fastrnn.from_onnx("model.onnx")            # {"/encoder/LSTM": LSTM(...), ...}
        encoder = fastrnn.from_onnx("model.onnx", name="/encoder/LSTM")

    A module computes the outputs of its node: Y [T,D,B,H] is output [T,B,D*H] with the directions
    side by side, Y_h and Y_c are the final states. A node with ``layout=1`` becomes a module with
    ``batch_first=True``; the final states stay [D,B,H]. A node with ``direction="reverse"`` becomes
    a `fastrnn.Reversed`. The inputs ``sequence_lens``, ``initial_h`` and ``initial_c`` belong to
    the call, as ``lengths`` and ``hx``, also where the model holds them as constants.

    Needs the package onnx: ``pip install 'fastrnn[onnx]'``. Only nodes of the main graph are read,
    not those inside loops, conditions or functions.

    Args:
        model: a path, or an ``onnx.ModelProto``.
        name: of one node. A node without a name, or whose name another node has too, is called by
            its first output.
        device, dtype: of the parameters; by default the CPU and the type of the weights.

    Returns:
        The modules by the names of their nodes in the order of the graph, or the module of the node
        with the given name.

    Raises:
        ImportError: onnx is not installed.
        TypeError: an argument has another type.
        ValueError: the model has no such node, or it is not valid; the message names the node.
        NotImplementedError: a node computes something that fastrnn does not: ``clip``,
            ``input_forget``, peepholes, other activations, or weights that are not constants. With
            ``name``, other nodes are not read.
    """
    graph = _load(model).graph
    nodes = [node for node in graph.node if node.op_type in _TYPES and node.domain in _DOMAINS]
    if not nodes:
        raise ValueError(
            f"{_OWNER}: model must have a node LSTM, GRU or RNN in its main graph, got none "
            f"among {len(graph.node)} nodes."
        )
    counts = Counter(node.name for node in nodes)
    by_name = {
        node.name
        if node.name and counts[node.name] == 1
        else next(filter(None, node.output), ""): node
        for node in nodes
    }
    constants = _constants(graph)
    if name is None:
        return {key: _convert(key, by_name[key], constants, device, dtype) for key in by_name}
    if name not in list(by_name):  # a list: any object can be looked for
        raise ValueError(
            f"{_OWNER}: name must be one of {', '.join(map(repr, by_name))}, got {describe(name)}."
        )
    return _convert(name, by_name[name], constants, device, dtype)


_DOMAINS = ("", "ai.onnx")


def _load(model: Any) -> Any:
    try:
        import onnx
    except ImportError:
        raise ImportError(
            f"{_OWNER}: needs the package onnx. Install it with: pip install 'fastrnn[onnx]'"
        ) from None
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"{_OWNER}: model must be a path or an onnx.ModelProto, got {describe(model)}."
        )
    try:
        return onnx.load(model)
    except OSError:
        raise  # its message names the path
    except Exception as error:
        raise ValueError(
            f"{_OWNER}: model must be an ONNX file, got {os.fspath(model)!r}: {error}"
        ) from None


def _constants(graph: Any) -> dict[str, Any]:
    """Returns the stored tensors of a graph by name: initializers, Constant and Identity nodes."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _DOMAINS:
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return constants


class _Node:
    """A node with its place in messages."""

    def __init__(self, key: str, node: Any, constants: dict[str, Any]) -> None:
        import onnx

        self.type: str = node.op_type
        self.place = f"{self.type} node {key!r}"
        self._to_array = onnx.numpy_helper.to_array
        self._inputs = list(node.input)
        self._constants = constants
        self.attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in node.attribute
        }

    def has(self, index: int) -> bool:
        """Whether the node has its index-th input."""
        return len(self._inputs) > index and self._inputs[index] != ""

    def weight(self, index: int, name: str) -> Tensor:
        """Returns the index-th input, which must be constant."""
        if not self.has(index):
            raise ValueError(f"{_OWNER}: {self.place} must have the input {name}, got none.")
        tensor = self._constants.get(self._inputs[index])
        if tensor is None:
            raise NotImplementedError(
                f"{_OWNER}: {name} of {self.place} must be an initializer or a Constant, got the "
                f"result {self._inputs[index]!r} of a computation or an input of the model."
            )
        try:
            array = self._to_array(tensor)
        except Exception as error:
            raise ValueError(f"{_OWNER}: {name} of {self.place} cannot be read: {error}") from None
        return as_tensor(_OWNER, f"{name} of {self.place}", array)

    def raise_unsupported(self, what: str, expected: str, actual: Any) -> NoReturn:
        raise NotImplementedError(
            f"{_OWNER}: {what} of {self.place} must be {expected}, got {actual!r}."
        )


def _convert(
    key: str, proto: Any, constants: dict[str, Any], device: Any, dtype: torch.dtype | None
) -> nn.Module:
    node = _Node(key, proto, constants)
    attributes = node.attributes
    direction = attributes.get("direction", b"forward")
    directions = _DIRECTIONS.get(direction)
    if directions is None:
        node.raise_unsupported("direction", "forward, reverse or bidirectional", direction.decode())
    _check_attributes(node)
    cell = _cell_of(node, directions)
    gates, order = CELLS[cell].gates, TORCH[cell].onnx_gates
    w, r = node.weight(1, "W"), node.weight(2, "R")
    hidden = r.shape[-1] if r.dim() == 3 else 0
    rows, inputs = gates * hidden, w.shape[-1] if w.dim() == 3 else 0
    if attributes.get("hidden_size", hidden) != hidden or hidden == 0:
        raise ValueError(
            f"{_OWNER}: R of {node.place} must be of shape [D, {gates}*H, H] with H = hidden_size "
            f"= {attributes.get('hidden_size')}, got {list(r.shape)}."
        )
    letters = f"{gates}*H" if gates > 1 else "H"
    for name, weight, columns, letter in (("W", w, inputs, "I"), ("R", r, hidden, "H")):
        shape = (directions, rows, columns)
        meaning = f"[D, {letters}, {letter}]"
        check_shape(_OWNER, f"{name} of {node.place}", weight, shape, meaning)
    b = node.weight(3, "B") if node.has(3) else None
    if b is not None:
        check_shape(_OWNER, f"B of {node.place}", b, (directions, 2 * rows), f"[D, {2 * gates}*H]")
    weights = []
    for d in range(directions):
        parts = [w[d], r[d]] if b is None else [w[d], r[d], b[d, :rows], b[d, rows:]]
        weights.append(DirectionWeights(*(from_order(part, order) for part in parts)))
    options: dict[str, Any] = {}
    if node.type == "GRU" and attributes.get("linear_before_reset", 0) == 0:
        options["reset_after"] = False
    if _activations(node)[:1] == ["hardsigmoid"]:
        options["gate_activation"] = "hard_sigmoid"
        weights = _fold(node, cell, weights)
    module = build(
        f"{_OWNER}: {node.place}",
        cell,
        [weights],
        batch_first=attributes.get("layout", 0) == 1,
        device=device,
        dtype=dtype,
        **options,
    )
    return Reversed(module) if direction == b"reverse" else module


def _check_attributes(node: _Node) -> None:
    """Raises if the node has something that no fastrnn layer computes."""
    attributes = node.attributes
    if "clip" in attributes:
        node.raise_unsupported("clip", "absent", attributes["clip"])
    if attributes.get("input_forget", 0) != 0:
        node.raise_unsupported("input_forget", "0", attributes["input_forget"])
    if node.type == "LSTM" and node.has(7):
        raise NotImplementedError(
            f"{_OWNER}: {node.place} must be without the input P, got one; fastrnn has no layer "
            "with peepholes."
        )


def _activations(node: _Node) -> list[str]:
    return [a.decode().lower() for a in node.attributes.get("activations", [])]


def _fold(node: _Node, cell: str, weights: list[DirectionWeights]) -> list[DirectionWeights]:
    """Returns weights with which hard_sigmoid, max(0, min(1, x/6 + 1/2)), is the node's function.

    a*x + b = (6*a*x + 6*b - 3) / 6 + 1/2. Each direction has its own a and b: tanh has none.
    """
    factors = []
    for name, default in zip(("alpha", "beta"), _HARD_SIGMOID, strict=True):
        values = list(node.attributes.get(f"activation_{name}", [])) or [default] * len(weights)
        if len(values) != len(weights):
            expected = f"{len(weights)} values, one per HardSigmoid"
            node.raise_unsupported(f"activation_{name}", expected, values)
        factors.append(values)
    needs_biases = any(beta != 0.5 for beta in factors[1])
    folded = []
    for w, alpha, beta in zip(weights, *factors, strict=True):
        if w.b_ih is None and needs_biases:
            zeros = w.w_ih.new_zeros(w.w_ih.shape[0])
            w = w._replace(b_ih=zeros, b_hh=zeros)
        units = w.w_ih.shape[0] // CELLS[cell].gates
        scale = torch.full((w.w_ih.shape[0], 1), 6 * alpha, dtype=torch.float64)
        shift = torch.full((w.w_ih.shape[0],), 6 * beta - 3, dtype=torch.float64)
        candidate = slice(_CANDIDATE[cell] * units, (_CANDIDATE[cell] + 1) * units)
        scale[candidate], shift[candidate] = 1, 0
        own: list[Any] = [None if t is None else t.double() for t in w[:4]]
        own[0], own[1] = own[0] * scale, own[1] * scale
        if own[2] is not None:
            own[2], own[3] = own[2] * scale[:, 0] + shift, own[3] * scale[:, 0]
        rounded: list[Any] = [None if t is None else t.to(w.w_ih.dtype) for t in own]
        folded.append(DirectionWeights(*rounded))
    return folded


def _cell_of(node: _Node, directions: int) -> str:
    known = _ACTIVATIONS[node.type]
    default = next(iter(known))
    found = [a.decode() for a in node.attributes.get("activations", [])]
    each = tuple(a.lower() for a in found[: len(default)]) or default
    is_same = not found or _activations(node) == list(each) * directions
    if each not in known or not is_same:
        names = {"hardsigmoid": "HardSigmoid"}
        choices = " or ".join(str([names.get(a, a.capitalize()) for a in key]) for key in known)
        node.raise_unsupported("activations", f"{choices}, the same in each direction", found)
    return known[each]
