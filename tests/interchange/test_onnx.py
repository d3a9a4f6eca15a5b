"""`fastrnn.from_onnx` against ONNX Runtime, and against the models that torch exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build
from tolerance import Change, assert_agrees
from torch import Tensor, nn
from torch.func import functional_call

import fastrnn

onnx = pytest.importorskip("onnx")
np = pytest.importorskip("numpy")
runtime = pytest.importorskip("onnxruntime")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ONLY_GRU = {"GRU": {"linear_before_reset": 1}}


def arrays_of(kind: str, directions: int, inputs: int, hidden: int, bias: bool) -> dict[str, Any]:
    rows = GATES[kind] * hidden
    shapes = {"W": (directions, rows, inputs), "R": (directions, rows, hidden)}
    if bias:
        shapes["B"] = (directions, 2 * rows)
    return {name: torch.randn(shape).numpy() / 2 for name, shape in shapes.items()}


def model_of(
    kind: str,
    arrays: dict[str, Any],
    *,
    name: str = "node",
    inputs: tuple[str, ...] = (),
    constants: bool = False,
    **attributes: Any,
) -> Any:
    """Returns a model with one node, whose weights are initializers or Constant nodes."""
    stored = [onnx.numpy_helper.from_array(array, key) for key, array in arrays.items()]
    names = inputs or ("X", *arrays)
    node = onnx.helper.make_node(
        kind, names, ["Y", "Y_h"], name=name, **{**ONLY_GRU.get(kind, {}), **attributes}
    )
    nodes = [node]
    if constants:
        nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in stored] + nodes
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("X", floats, ["a", "b", arrays["W"].shape[-1]])],
        [onnx.helper.make_tensor_value_info(key, floats, None) for key in ("Y", "Y_h")],
        [] if constants else stored,
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8
    )


def runtime_results(model: Any, x: Tensor) -> list[Tensor]:
    """Returns Y as [T,B,D*H], and Y_h."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y, h_n = map(torch.from_numpy, session.run(None, {"X": x.numpy()}))
    return [y.transpose(1, 2).flatten(2), h_n]


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    output, states = module(x)
    return [output, states[0] if isinstance(states, tuple) else states]


def assert_same_as_runtime(module: nn.Module, model: Any, x: Tensor) -> None:
    double = copy.deepcopy(module).double()

    def exact(change: Change) -> list[Tensor]:
        weights = {name: change(p) for name, p in module.named_parameters()}
        output, states = functional_call(double, weights, (change(x),))
        return [output, states[0] if isinstance(states, tuple) else states]

    with torch.no_grad():
        # the module in float64 is the truth that ONNX Runtime must agree with
        assert_agrees(runtime_results(model, x), results(module, x), exact)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 5), (17, 33)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", GATES)
def test_node_computes_what_onnx_runtime_computes(
    kind: str, direction: str, bias: bool, sizes: tuple[int, int]
) -> None:
    directions = 2 if direction == "bidirectional" else 1
    arrays = arrays_of(kind, directions, *sizes, bias)
    model = model_of(kind, arrays, direction=direction, hidden_size=sizes[1])
    module = fastrnn.from_onnx(model, name="node")
    assert isinstance(module, fastrnn.Reversed) == (direction == "reverse")
    assert_same_as_runtime(module, model, torch.randn(7, 2, sizes[0]))


@pytest.mark.parametrize("activation", ["Tanh", "Relu", "Sigmoid"])
def test_activation_of_an_rnn(activation: str) -> None:
    arrays = arrays_of("RNN", 2, 3, 5, True)
    model = model_of(
        "RNN", arrays, direction="bidirectional", hidden_size=5, activations=[activation] * 2
    )
    module = fastrnn.from_onnx(model)["node"]
    assert module.nonlinearity == activation.lower()
    assert_same_as_runtime(module, model, torch.randn(7, 2, 3))


def test_constants_files_and_names(tmp_path: Path) -> None:
    model = model_of("LSTM", arrays_of("LSTM", 1, 3, 5, True), hidden_size=5, constants=True)
    onnx.save(model, tmp_path / "model.onnx")
    [(name, module)] = fastrnn.from_onnx(tmp_path / "model.onnx").items()
    assert name == "node"
    assert_same_as_runtime(module, model, torch.randn(7, 2, 3))
    model.graph.node[-1].name = ""
    assert list(fastrnn.from_onnx(model)) == ["Y"]
    again = model.graph.node.add()
    again.CopyFrom(model.graph.node[-2])
    again.output[0] = "Z"
    for node in list(model.graph.node)[-2:]:
        node.name = "same"
    assert list(fastrnn.from_onnx(model)) == ["Y", "Z"]


def test_layout_1_is_batch_first() -> None:
    arrays = arrays_of("GRU", 2, 3, 5, True)
    options = {"direction": "bidirectional", "hidden_size": 5}
    module = fastrnn.from_onnx(model_of("GRU", arrays, layout=1, **options), name="node")
    other = fastrnn.from_onnx(model_of("GRU", arrays, **options), name="node")
    assert module.batch_first
    x = torch.randn(7, 2, 3)
    torch.testing.assert_close(module(x.transpose(0, 1))[0], other(x)[0].transpose(0, 1))


class Wrapped(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
@pytest.mark.filterwarnings("ignore")
def test_exported_layer_comes_back(cell: str, dynamo: bool, tmp_path: Path) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    layer = build(cell, 3, 5, 2, bidirectional=True).eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(Wrapped(layer), (torch.randn(7, 2, 3),), path, dynamo=dynamo, verbose=False)
    modules = list(fastrnn.from_onnx(path).values())
    assert [module.input_size for module in modules] == [3, 10]
    weights = [p for module in modules for p in module.parameters()]
    assert all(map(torch.equal, weights, layer.parameters()))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_reset_before_the_product(direction: str, bias: bool) -> None:
    arrays = arrays_of("GRU", 2 if direction == "bidirectional" else 1, 3, 5, bias)
    model = model_of("GRU", arrays, direction=direction, hidden_size=5, linear_before_reset=0)
    module = fastrnn.from_onnx(model, name="node")
    assert "reset_after=False" in repr(module)
    assert_same_as_runtime(module, model, torch.randn(7, 2, 3))


@pytest.mark.parametrize("own", [False, True], ids=["default", "own"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_hard_sigmoids(kind: str, direction: str, bias: bool, own: bool) -> None:
    directions = 2 if direction == "bidirectional" else 1
    arrays = arrays_of(kind, directions, 3, 5, bias)
    attributes: dict[str, Any] = {
        "activations": ["HardSigmoid", "Tanh", "Tanh"][: 3 if kind == "LSTM" else 2] * directions
    }
    if own:
        attributes |= {"activation_alpha": [0.3, 0.4][:directions]}
        attributes |= {"activation_beta": [0.45, 0.6][:directions]}
    model = model_of(kind, arrays, direction=direction, hidden_size=5, **attributes)
    module = fastrnn.from_onnx(model, name="node")
    assert "gate_activation='hard_sigmoid'" in repr(module)
    assert_same_as_runtime(module, model, 2 * torch.randn(7, 2, 3))


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("LSTM", {"clip": 3.0}, "clip of LSTM node 'node' must be absent, got 3.0"),
        ("LSTM", {"input_forget": 1}, "input_forget of LSTM node 'node' must be 0, got 1"),
        (
            "GRU",
            {"activations": ["HardSigmoid", "Tanh"], "activation_alpha": [0.1, 0.2]},
            "activation_alpha of GRU node 'node' must be 1 values",
        ),
        ("RNN", {"activations": ["Elu"]}, "activations of RNN node 'node' must be .* got .'Elu'"),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}, "activations of GRU node 'node' must be"),
        ("LSTM", {"activations": ["Sigmoid"]}, "activations of LSTM node 'node' must be"),
        ("RNN", {"direction": "both"}, "direction of RNN node 'node' must be forward, .*'both'"),
    ],
)
def test_other_recurrences_are_rejected(
    kind: str, attributes: dict[str, Any], message: str
) -> None:
    model = model_of(kind, arrays_of(kind, 1, 3, 5, True), hidden_size=5, **attributes)
    with pytest.raises(NotImplementedError, match=f"from_onnx: .*{message}"):
        fastrnn.from_onnx(model)


def test_peepholes_and_computed_weights_are_rejected() -> None:
    arrays = {**arrays_of("LSTM", 1, 3, 5, True), "P": np.zeros((1, 15), "float32")}
    model = model_of("LSTM", arrays, inputs=("X", "W", "R", "B", "", "", "", "P"), hidden_size=5)
    with pytest.raises(NotImplementedError, match="LSTM node 'node' must be without the input P"):
        fastrnn.from_onnx(model)
    model = model_of("LSTM", arrays, inputs=("X", "X", "R"), hidden_size=5)
    with pytest.raises(NotImplementedError, match="W of LSTM node 'node' must be an initializer"):
        fastrnn.from_onnx(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"W": (1, 19, 3)},
            r"W of LSTM node 'node' must be of shape \[D, 4\*H, I\] = \[1, 20, 3\]",
        ),
        ({"W": (2, 20, 3)}, r"W of LSTM node 'node' must be of shape .*got \[2, 20, 3\]"),
        ({"R": (1, 20, 4)}, r"R of LSTM node 'node' must be of shape .*hidden_size = 5, got"),
        ({"R": (20, 5)}, r"R of LSTM node 'node' must be of shape"),
        ({"B": (1, 20)}, r"B of LSTM node 'node' must be of shape \[D, 8\*H\] = \[1, 40\]"),
    ],
)
def test_wrong_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    arrays = arrays_of("LSTM", 1, 3, 5, True)
    arrays |= {name: np.zeros(shape, "float32") for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"from_onnx: {message}"):
        fastrnn.from_onnx(model_of("LSTM", arrays, hidden_size=5))


def test_wrong_models(tmp_path: Path) -> None:
    model = model_of("LSTM", arrays_of("LSTM", 1, 3, 5, True), hidden_size=5)
    with pytest.raises(ValueError, match="name must be one of 'node', got 'other'"):
        fastrnn.from_onnx(model, name="other")
    with pytest.raises(ValueError, match="name must be one of 'node', got 3"):
        fastrnn.from_onnx(model, name=3)
    with pytest.raises(TypeError, match=r"must be a path or an onnx\.ModelProto, got torch\.nn"):
        fastrnn.from_onnx(nn.LSTM(3, 4))
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        fastrnn.from_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="model must be an ONNX file, got "):
        fastrnn.from_onnx(tmp_path / "text.onnx")
    del model.graph.node[:]
    with pytest.raises(ValueError, match=r"model must have a node LSTM, GRU or RNN .* 0 nodes"):
        fastrnn.from_onnx(model)
